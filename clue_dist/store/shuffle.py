"""Keyed permutations: the i-th element of a shuffled range without holding the range.

A Feistel network over the next even power of two, walked until it lands inside (Black and Rogaway, 2002):
bijective for any n, O(1) memory, the same on every machine. The plan of cells uses it; conversion shuffles cells by a
hash of their names instead.
"""

from __future__ import annotations

import hashlib

import numpy as np
from numba import njit

_ROUNDS = 6


def derive_key(*parts: object) -> int:
    """A 64-bit key out of anything with a stable `repr`: seeds, names, pass numbers."""
    return int.from_bytes(hashlib.blake2b(repr(parts).encode(), digest_size=8).digest(), "little")


def permute_positions(i: np.ndarray, n: int, key: int | np.ndarray) -> np.ndarray:
    """Where a shuffle of range(n) puts or takes element `i`. i: any shape, values in [0, n). Returns int64.

    key: of the shuffle, or one for each element, uint64 of i's shape: of many shuffles at once.
    """
    if np.size(i) == 0:
        return np.empty(np.shape(i), np.int64)
    if n < 1:
        raise ValueError(f"a permutation of {n} elements does not exist")
    half = max(1, -(-int(n - 1).bit_length() // 2))
    flat = np.ascontiguousarray(i, np.int64).reshape(-1)
    keys = np.broadcast_to(np.asarray(key, np.uint64), np.shape(i)).reshape(-1)
    return _walk(flat, np.uint64(n), keys, np.uint64(half)).reshape(np.shape(i))


def hash_barcodes(names: np.ndarray, key: int) -> np.ndarray:
    """A keyed hash of each name, the same on every machine: sorted by it, names are shuffled.

    names: (n,) bytes, however wide. Returns (n,) uint64.
    """
    width = names.dtype.itemsize
    letters = np.ascontiguousarray(names).view(np.uint8).reshape(len(names), width)
    return _hash(letters, np.uint64(key))


@njit(nogil=True, cache=True)
def _hash(letters, key):  # type: ignore[no-untyped-def]
    """FNV-1a over the letters, then splitmix64's finaliser."""
    out = np.empty(len(letters), np.uint64)
    for i in range(len(letters)):
        end = letters.shape[1]
        while end and letters[i, end - 1] == 0:
            end -= 1
        h = key
        for k in range(end):
            h = (h ^ np.uint64(letters[i, k])) * np.uint64(0x100000001B3)
        h = (h ^ (h >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        h = (h ^ (h >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        out[i] = h ^ (h >> np.uint64(31))
    return out


@njit(nogil=True, cache=True)
def _walk(i: np.ndarray, n: np.uint64, keys: np.ndarray, half: np.uint64) -> np.ndarray:
    mask = (np.uint64(1) << half) - np.uint64(1)
    out = np.empty(len(i), np.int64)
    for at in range(len(i)):
        x, key = np.uint64(i[at]), keys[at]
        while True:
            left, right = x >> half, x & mask
            for r in range(_ROUNDS):
                # splitmix64's finaliser as the round function
                h = right + key + np.uint64(r + 1) * np.uint64(0x9E3779B97F4A7C15)
                h = (h ^ (h >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
                h = (h ^ (h >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
                h = h ^ (h >> np.uint64(31))
                left, right = right, left ^ (h & mask)
            x = (left << half) | right
            if x < n:
                break
        out[at] = np.int64(x)
    return out
