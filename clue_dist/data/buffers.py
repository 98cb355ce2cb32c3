"""Memory that batches are built in, used again once nobody holds the batch: fresh pages cost more than the rows."""

from __future__ import annotations

import sys
import threading
from typing import Any

import numpy as np
import torch

_UNUSED = (
    3  # references to an array that nobody uses: the list's, the variable's, and that of asking
)
_SPARE = 8  # 1/8 more than asked for: batches differ in size


class Buffers:
    """Arrays for any number of threads. As many are kept as were ever held at a time."""

    def __init__(self) -> None:
        self._kept: dict[np.dtype[Any], list[np.ndarray]] = {}
        self._ones = torch.ones(0)
        self._lock = threading.Lock()

    def empty(self, n: int, dtype: Any) -> np.ndarray:
        """(n,), not initialised. It is free again when the last reference to it, or to a tensor made of it, is gone."""
        with self._lock:
            kept = self._kept.setdefault(np.dtype(dtype), [])
            for i in range(len(kept)):
                array = kept[i]
                if sys.getrefcount(array) == _UNUSED:
                    if len(array) >= n:
                        return array[:n]
                    del kept[i]  # too small for what comes now
                    break
            kept.append(np.empty(n + n // _SPARE, dtype))
            return kept[-1][:n]

    def ones(self, n: int) -> torch.Tensor:
        """(n,) float32, the same memory for all who ask: nobody may write to it.

        Raises:
            RuntimeError: somebody did.
        """
        with self._lock:
            if self._ones._version:
                raise RuntimeError(
                    "the values of a batch of binary counts were written to; other batches share them"
                )
            if len(self._ones) < n:
                self._ones = torch.ones(n + n // _SPARE)
            return self._ones[:n]
