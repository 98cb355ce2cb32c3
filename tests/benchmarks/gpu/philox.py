"""Philox 4x32-10 in NumPy, the twin of the kernel that draws."""

from __future__ import annotations

import numpy as np

MULTIPLIERS = np.uint64(0xD2511F53), np.uint64(0xCD9E8D57)
STEPS_OF_KEY = 0x9E3779B9, 0xBB67AE85
LOW, HALF = np.uint64(0xFFFFFFFF), np.uint64(32)


def compute_philox(counter: np.ndarray, key: tuple[int, int]) -> np.ndarray:
    """Turn counters into random words, both (n, 4) uint64 of 32 bits."""
    a, b, c, d = counter.astype(np.uint64).T
    for i in range(10):
        key_a, key_b = (
            np.uint64((k + i * step) % 2**32) for k, step in zip(key, STEPS_OF_KEY, strict=True)
        )
        first, second = MULTIPLIERS[0] * a, MULTIPLIERS[1] * c
        a, b, c, d = (
            (second >> HALF) ^ b ^ key_a,
            second & LOW,
            (first >> HALF) ^ d ^ key_b,
            first & LOW,
        )
    return np.stack([a, b, c, d], 1)


def draw_plainly(cells: list[int], width: int, key: int, draw: int) -> np.ndarray:
    """What `draw_for_cells` gives of kind "integers", (n, width) int32."""
    groups = -(-width // 4)
    counters = [(g, cell % 2**32, draw, 0) for cell in cells for g in range(groups)]
    words = compute_philox(np.array(counters), (key % 2**32, key >> 32))
    return words.astype(np.uint32).view(np.int32).reshape(len(cells), -1)[:, :width]
