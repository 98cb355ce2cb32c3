"""Reuses the memory of batches. Getting fresh pages from the system takes longer than filling them.

The rule of reuse: a pool lends memory as arrays and takes it back, array by array, when the array
is gone. Whatever is made of the array (NumPy slices and shapes, torch tensors and their views)
keeps the array alive. So memory comes back only when nothing can read it any more, whether a batch
was dropped whole or a part of it was kept.
"""

from __future__ import annotations

import threading
import weakref
from collections import deque
from typing import Any

import numpy as np
import torch

_SPARE = 8  # memory is larger by 1/8 than what it was first asked for, as batches differ in size


class BufferPool:
    """Arrays for any number of threads. The pool holds as many as were ever lent at a time."""

    def __init__(self) -> None:
        # Deques need no lock. With a lock, a thread that holds it would wait for itself where the
        # garbage collector ends an array at that very moment.
        self._free: dict[np.dtype[Any], deque[np.ndarray]] = {}
        self._ones = torch.ones(0)
        self._ones_lock = threading.Lock()

    def lend_array(self, size: int, dtype: Any) -> np.ndarray:
        """Lend an array (size,), not initialised, that nothing else can reach while it lives."""
        free = self._free.setdefault(np.dtype(dtype), deque())
        try:
            memory = free.pop()
        except IndexError:
            memory = None
        if memory is None or len(memory) < size:  # memory too small for today's batches is let go
            memory = np.empty(size + size // _SPARE, dtype)
        # NumPy lets a slice of a slice refer to the array at its origin. Made from a memoryview,
        # the array lent is such an origin; made by slicing `memory`, it would not be.
        lent = np.asarray(memory.data[:size])
        weakref.finalize(lent, free.append, memory).atexit = False
        return lent

    def share_ones(self, size: int) -> torch.Tensor:
        """Give ones (size,), float32, in memory that all callers share and none may write to.

        Raises:
            RuntimeError: a caller wrote to it.
        """
        with self._ones_lock:
            if self._ones._version:
                raise RuntimeError(
                    "the values of a batch of binary counts were written to; "
                    "other batches share them"
                )
            if len(self._ones) < size:
                # Writes to a tensor that was made in inference mode are not counted.
                with torch.inference_mode(False):
                    self._ones = torch.ones(size + size // _SPARE)
            return self._ones[:size]
