"""Where a loader's time goes: functions marked with `phase` add up their seconds while somebody watches."""

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
_watching: dict[str, float] | None = None


def time_phase(name: str) -> Callable[[Callable[P, T]], Callable[P, T]]:
    """Mark a function as one phase of loading. Phases must not call each other, or seconds would count twice."""

    def mark(function: Callable[P, T]) -> Callable[P, T]:
        @functools.wraps(function)
        def timed(*args: P.args, **kwargs: P.kwargs) -> T:
            if _watching is None:
                return function(*args, **kwargs)
            started = time.perf_counter()
            try:
                return function(*args, **kwargs)
            finally:
                _add(name, time.perf_counter() - started)

        return timed

    return mark


@contextmanager
def record_phases() -> Iterator[dict[str, float]]:
    """Seconds by phase, summed over all threads of this process, from here to the end of the block."""
    global _watching
    seconds: dict[str, float] = {}
    _watching = seconds
    try:
        yield seconds
    finally:
        _watching = None


def _add(name: str, seconds: float) -> None:
    with _lock:
        if _watching is not None:
            _watching[name] = _watching.get(name, 0.0) + seconds
