"""Keyed permutations: the i-th element of a shuffled range, without holding the range.

A Feistel network permutes the next even power of two; it is walked until it lands inside the range
(Black and Rogaway, 2002). The result is a bijection for any n, takes constant memory, and is the
same on every machine. The plan of cells uses it. Conversion shuffles cells by a hash of their
barcodes instead, so that their order does not depend on that of the inputs.
"""

from __future__ import annotations

import hashlib

import numpy as np

from clue_dist.store.kernel_cache import compile_kernel

_ROUNDS = 6


def derive_key(*parts: object) -> int:
    """Derive a 64-bit key from seeds, names or numbers: anything with a stable `repr`."""
    return int.from_bytes(hashlib.blake2b(repr(parts).encode(), digest_size=8).digest(), "little")


def permute_positions(positions: np.ndarray, n: int, key: int | np.ndarray) -> np.ndarray:
    """Return where a shuffle of range(n) puts some of its elements.

    Args:
        positions: the elements, of any shape, from 0 to n - 1.
        n: length of the range.
        key: the key of the shuffle; or one for each element, uint64 of the same shape, to look into
            many shuffles at once.

    Returns:
        Places from 0 to n - 1, int64 of the same shape.
    """
    if np.size(positions) == 0:
        return np.empty(np.shape(positions), np.int64)
    if n < 1:
        raise ValueError(f"a permutation of {n} elements does not exist")
    half_bits = max(1, -(-int(n - 1).bit_length() // 2))
    flat = np.ascontiguousarray(positions, np.int64).reshape(-1)
    keys = np.broadcast_to(np.asarray(key, np.uint64), np.shape(positions)).reshape(-1)
    return _walk(flat, np.uint64(n), keys, np.uint64(half_bits)).reshape(np.shape(positions))


def hash_barcodes(barcodes: np.ndarray, key: int) -> np.ndarray:
    """Hash barcodes, the same on every machine. In the order of the hashes they are shuffled.

    Args:
        barcodes: (n,) bytes, however wide.
        key: another key gives another order.

    Returns:
        (n,) uint64.
    """
    width = barcodes.dtype.itemsize
    letters = np.ascontiguousarray(barcodes).view(np.uint8).reshape(len(barcodes), width)
    return _hash(letters, np.uint64(key))


@compile_kernel
def _hash(letters, key):  # type: ignore[no-untyped-def]
    """Run FNV-1a over the letters of each row, then the finaliser of splitmix64."""
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


@compile_kernel
def _walk(
    positions: np.ndarray, n: np.uint64, keys: np.ndarray, half_bits: np.uint64
) -> np.ndarray:
    """Send each position through the network until it lands below n."""
    mask = (np.uint64(1) << half_bits) - np.uint64(1)
    out = np.empty(len(positions), np.int64)
    for i in range(len(positions)):
        x, key = np.uint64(positions[i]), keys[i]
        while True:
            left, right = x >> half_bits, x & mask
            for r in range(_ROUNDS):
                # The round function is the finaliser of splitmix64.
                h = right + key + np.uint64(r + 1) * np.uint64(0x9E3779B97F4A7C15)
                h = (h ^ (h >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
                h = (h ^ (h >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
                h = h ^ (h >> np.uint64(31))
                left, right = right, left ^ (h & mask)
            x = (left << half_bits) | right
            if x < n:
                break
        out[i] = np.int64(x)
    return out
