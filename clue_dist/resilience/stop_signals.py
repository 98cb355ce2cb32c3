"""Stops training in time: a signal to any rank sets a flag, which they compare after each step."""

from __future__ import annotations

import signal
import threading
from types import FrameType

# What Slurm and launchers send, what a terminal sends that is closed, and Ctrl-C
SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP, signal.SIGINT)


class StopFlag:
    """Is true once a signal has come to this rank; while open, signals do nothing else.

    Ctrl-C typed again ends the process. In a thread beside the main one no signal can be heard.
    """

    def __init__(self) -> None:
        self._is_set = False
        self.was_interrupted = False  # whether Ctrl-C was among the signals

    def __bool__(self) -> bool:
        return self._is_set

    def __enter__(self) -> StopFlag:
        # nohup and `&` have the process ignore what a keyboard sends: that stays so.
        ignored = {
            number
            for number in (signal.SIGHUP, signal.SIGINT)
            if signal.getsignal(number) == signal.SIG_IGN
        }
        self._previous = {
            number: signal.signal(number, self._handle)
            for number in SIGNALS
            if number not in ignored and threading.current_thread() is threading.main_thread()
        }
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self._is_set and number == signal.SIGINT:
            raise KeyboardInterrupt
        self._is_set = True
        self.was_interrupted |= number == signal.SIGINT
