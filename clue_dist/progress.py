"""Progress of work that takes long: a bar where a person looks, now and then a line in a log."""

from __future__ import annotations

import sys
import threading
import time

from tqdm import tqdm

PATIENCE = 5.0  # seconds that a question to a model may take before progress is shown


def has_spectator() -> bool:
    """Whether a person looks on: stderr is a terminal, or a notebook, which is none."""
    return sys.stderr.isatty() or "ipykernel" in sys.modules


class Progress:
    """A bar on a terminal and in a notebook; elsewhere a line every few seconds, which logs keep.

    Args:
        title: title of the bar or line.
        total: number of what is counted.
        done: how many an earlier run has done.
        unit: what is counted, for the bar.
        every: seconds between two lines.
        patience: seconds before anything is shown. Of shorter work nothing is.
        is_shown: whether this process shows it; of several ranks one does.
    """

    def __init__(
        self,
        title: str,
        total: int,
        done: int = 0,
        *,
        unit: str = "task",
        every: float = 10.0,
        patience: float = 0.0,
        is_shown: bool = True,
    ) -> None:
        self.title, self.total, self.done, self.every = title, total, done, every
        self.patience, self.is_shown = patience, is_shown
        self.lock = threading.Lock()  # tasks end on every worker thread
        self.started = self.last_print = time.monotonic()
        self.bar = None
        if is_shown and has_spectator():
            self.bar = tqdm(
                total=total,
                initial=done,
                desc=title,
                unit=unit,
                unit_scale=total >= 10_000,
                delay=patience,
                dynamic_ncols=True,
            )
        if done and self.bar is None:
            self._print_line(f"{done:,} of {total:,} were done before")

    def mark_done(self, count: int = 1) -> None:
        """Count some more as done."""
        with self.lock:
            self.done += count
            now = time.monotonic()
            if self.bar is not None:
                self.bar.update(count)
            elif now - self.last_print > self.every and self.done < self.total:
                self.last_print = now
                self._print_line(f"{self.done:,} of {self.total:,}")

    def close(self) -> None:
        """Close the bar, or say how long all took, if it is done."""
        seconds = time.monotonic() - self.started
        if self.bar is not None:
            self.bar.close()
        elif self.done == self.total and seconds >= self.patience:
            self._print_line(f"{self.done:,} of {self.total:,}, {seconds:.1f} s")

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _print_line(self, text: str) -> None:
        if self.is_shown:
            print(f"{self.title}: {text}", file=sys.stderr, flush=True)


def show_progress(title: str, total: int, *, unit: str = "cell", is_shown: bool = True) -> Progress:
    """Show how a question to a model goes on, if it takes long.

    Args:
        title: title of the bar or line; "" shows none.
        total: number of what is counted.
        unit: what that is.
        is_shown: as of `Progress`.
    """
    is_shown = is_shown and bool(title)
    return Progress(title, total, unit=unit, patience=PATIENCE, is_shown=is_shown)
