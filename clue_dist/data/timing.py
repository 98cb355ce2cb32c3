"""Where a loader's time goes: marked functions add up their seconds while a caller records them."""

from __future__ import annotations

import functools
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import ParamSpec, TypeVar

P = ParamSpec("P")
T = TypeVar("T")

_lock = threading.Lock()
_recorded: dict[str, float] | None = None  # seconds by phase; None: nobody records


def time_phase(phase: str) -> Callable[[Callable[P, T]], Callable[P, T]]:
    """Mark a function as one phase of loading.

    Phases must not call each other, or seconds would count twice.
    """

    def mark(function: Callable[P, T]) -> Callable[P, T]:
        @functools.wraps(function)
        def timed(*args: P.args, **kwargs: P.kwargs) -> T:
            if _recorded is None:
                return function(*args, **kwargs)
            started = time.perf_counter()
            try:
                return function(*args, **kwargs)
            finally:
                _add_seconds(phase, time.perf_counter() - started)

        return timed

    return mark


@contextmanager
def record_phases() -> Iterator[dict[str, float]]:
    """Record seconds by phase, summed over all threads of this process, until the block ends."""
    global _recorded
    seconds: dict[str, float] = {}
    _recorded = seconds
    try:
        yield seconds
    finally:
        _recorded = None


def _add_seconds(phase: str, seconds: float) -> None:
    """Add to a phase; the caller may have stopped to record since the phase began."""
    with _lock:
        if _recorded is not None:
            _recorded[phase] = _recorded.get(phase, 0.0) + seconds
