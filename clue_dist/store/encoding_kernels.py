"""Compiled kernels that code rows; `rows` says what the code is.

They call no kernel of another file: numba's cache on disk would not notice that it had changed.
"""
# mypy: allow-untyped-defs

from __future__ import annotations

import numpy as np

from clue_dist.store.kernel_cache import compile_kernel

LARGEST_COUNT = 2**24  # training reads counts as float32, which is exact up to here


@compile_kernel
def encode_rows(indptr, indices, values, bits, lengths, codes, rest, scratch):
    """Fill codes, rest and lengths.

    Args:
        indptr: where each row lies in indices and values, (n + 1,).
        indices: columns, (nnz,).
        values: counts, (nnz,).
        bits: bits of a code for the count.
        lengths: filled, (n, 3).
        codes: filled, (nnz,).
        rest: filled from its beginning, (3 * nnz,).
        scratch: memory to work in, (2, longest row).

    Returns:
        How much of codes is filled; how much of rest is filled; the largest count, or -1 where a
        row is not canonical; the largest number in rest.
    """
    far, high = (256 >> bits) - 1, (1 << bits) - 1
    n_codes, n_rest = 0, 0
    largest, largest_rest = np.int64(0), np.int64(0)
    for row in range(len(lengths)):
        start, stop = indptr[row], indptr[row + 1]
        column, last_high = np.int64(-1), start
        first_rest, n_high = n_rest, 0
        for i in range(start, stop):
            before, column = column, np.int64(indices[i])
            value = values[i]
            count = np.int64(value)
            if column <= before or count < 1 or count > LARGEST_COUNT or count != value:
                return 0, 0, np.int64(-1), np.int64(0)
            largest = max(largest, count)
            gap = column - before if before > 0 else column
            if gap >= far:
                rest[n_rest] = gap
                n_rest += 1
                largest_rest = max(largest_rest, gap)
                gap = np.int64(far)
            low = np.int64(0)
            if bits:
                low = count - 1
                if low >= high:
                    scratch[0, n_high], scratch[1, n_high] = i - last_high, low
                    largest_rest = max(largest_rest, low, i - last_high)
                    n_high += 1
                    last_high = i
                    low = np.int64(high)
            codes[n_codes] = gap << bits | low
            n_codes += 1
        lengths[row, 0], lengths[row, 1], lengths[row, 2] = (
            stop - start,
            n_rest - first_rest,
            n_high,
        )
        for k in range(n_high):
            rest[n_rest + k], rest[n_rest + n_high + k] = scratch[0, k], scratch[1, k]
        n_rest += 2 * n_high
    return n_codes, n_rest, largest, largest_rest


@compile_kernel
def recode_as_binary(codes, rest, starts, bits, lengths, out_rest):
    """Take the bits of the count out of codes, in place; fill lengths (n, 3) and out_rest.

    Returns:
        How much of out_rest is filled; -1 where a count is not 1.
    """
    far, count = (256 >> bits) - 1, (1 << bits) - 1
    n_rest = 0
    for row in range(len(lengths)):
        k, first_rest = starts[row, 1], n_rest
        for j in range(starts[row, 0], starts[row + 1, 0]):
            if codes[j] & count:
                return -1
            gap = np.int64(codes[j] >> bits)
            if gap == far:
                gap = np.int64(rest[k])
                k += 1
            if gap >= 255:  # far, too, where all eight bits hold the gap
                out_rest[n_rest] = gap
                n_rest += 1
                gap = np.int64(255)
            codes[j] = gap
        lengths[row, 0] = starts[row + 1, 0] - starts[row, 0]
        lengths[row, 1] = n_rest - first_rest
    return n_rest
