"""Stopping in time: a signal to any rank sets a flag, about which all ranks agree at the end of the step."""

from __future__ import annotations

import signal
from types import FrameType, TracebackType

# What Slurm and launchers send, a terminal that is closed, and Ctrl-C, which ends the process when typed again
SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP, signal.SIGINT)


class StopFlag:
    """True once a signal came to this rank. Restores the handlers on exit."""

    def __init__(self) -> None:
        self._set = False

    def __bool__(self) -> bool:
        return self._set

    def __enter__(self) -> StopFlag:
        keyboard = {
            s for s in (signal.SIGHUP, signal.SIGINT) if signal.getsignal(s) == signal.SIG_IGN
        }  # nohup, `&`
        self._before = {s: signal.signal(s, self._handle) for s in SIGNALS if s not in keyboard}
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self._set and number == signal.SIGINT:
            raise KeyboardInterrupt
        self._set = True
