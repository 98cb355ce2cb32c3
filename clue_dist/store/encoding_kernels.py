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
        row is not canonical, or has a count above 1 and no bits for it; the largest number in rest.
    """
    n_codes, n_rest = 0, 0
    largest, largest_rest = np.int64(0), np.int64(0)
    for row in range(len(lengths)):
        start, stop = np.int64(indptr[row]), np.int64(indptr[row + 1])
        columns, counts = indices[start:stop], values[start:stop]
        row_codes, row_rest = codes[n_codes : n_codes + len(columns)], rest[n_rest:]
        largest_of_row = _fill_codes(columns, counts, bits, row_codes)
        if largest_of_row < 0 or (bits == 0 and largest_of_row > 1):
            return 0, 0, np.int64(-1), np.int64(0)
        n_far, n_high, most = _fill_rest(columns, counts, bits, row_codes, row_rest, scratch)
        lengths[row, 0], lengths[row, 1], lengths[row, 2] = len(columns), n_far, n_high
        n_codes += len(columns)
        n_rest += n_far + 2 * n_high
        largest, largest_rest = max(largest, largest_of_row), max(largest_rest, most)
    return n_codes, n_rest, largest, largest_rest


@compile_kernel
def _fill_codes(columns, counts, bits, codes):
    """Code the non-zeros of a row, (nnz,) each.

    Nothing in here branches, so that the compiler handles several non-zeros at a time. Most of the
    rest is skipped so, too: it is looked for where a code says that there is some.

    Returns:
        The largest count, or -1 where columns do not ascend or a number is no count.
    """
    far, high = np.int32((256 >> bits) - 1), np.int32((1 << bits) - 1)
    largest, is_wrong = np.int32(0), len(columns) > 0 and columns[0] < 0
    for i in range(len(columns)):
        gap = np.int32(columns[i] - columns[i - 1] if i else columns[i])
        count = np.int32(counts[i])  # of what is no such number it makes another one
        is_wrong |= (gap <= 0 and i > 0) | (count < 1) | (count != counts[i])
        largest = max(largest, count)
        codes[i] = np.uint8(min(gap, far) << bits | min(count - 1, high))
    return np.int64(-1 if is_wrong or largest > LARGEST_COUNT else largest)


@compile_kernel
def _fill_rest(columns, counts, bits, codes, rest, scratch):
    """Fill the rest of a row, of the gaps and counts that its codes say do not fit.

    Returns:
        The number of far gaps; of high counts; the largest number in the rest.
    """
    far, high = (256 >> bits) - 1, (1 << bits) - 1
    n_far, n_high, last_high, largest = 0, 0, 0, np.int64(0)
    for i in range(len(codes)):
        if codes[i] >> bits == far:
            gap = np.int64(columns[i]) - (np.int64(columns[i - 1]) if i else 0)
            rest[n_far] = gap
            n_far += 1
            largest = max(largest, gap)
        if bits and codes[i] & high == high:
            low = np.int64(counts[i]) - 1
            scratch[0, n_high], scratch[1, n_high] = i - last_high, low
            largest = max(largest, low, np.int64(i - last_high))
            n_high += 1
            last_high = i
    for k in range(n_high):
        rest[n_far + k], rest[n_far + n_high + k] = scratch[0, k], scratch[1, k]
    return n_far, n_high, largest


@compile_kernel
def recode_with_counts(codes, rest, starts, bits, lengths, out_rest):
    """Make room for counts in the codes of binary rows, in place; fill lengths (n, 3) and out_rest.

    Returns:
        How much of out_rest is filled.
    """
    far, n_rest = (256 >> bits) - 1, 0
    for row in range(len(lengths)):
        k, first_rest = starts[row, 1], n_rest
        for j in range(starts[row, 0], starts[row + 1, 0]):
            gap = np.int64(codes[j])
            if gap == 255:
                gap = np.int64(rest[k])
                k += 1
            if gap >= far:
                out_rest[n_rest] = gap
                n_rest += 1
            codes[j] = min(gap, far) << bits
        lengths[row, 0], lengths[row, 1] = starts[row + 1, 0] - starts[row, 0], n_rest - first_rest
    return n_rest
