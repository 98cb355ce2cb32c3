"""Compiled kernels that code and decode rows; `rows` says what the code is.

All kernels are in this file. Numba's cache on disk would not notice that a kernel in another file,
which one of these calls, had changed.

Names that many of them share: codes, rest, lengths and starts are those of `rows.CodedBlocks`;
slot says which block holds a row, row which row of its block it is; bits of a code hold the count.
"""
# mypy: allow-untyped-defs

from __future__ import annotations

from typing import Any

import numpy as np
from llvmlite import ir
from numba import config, types
from numba.core import cgutils
from numba.extending import intrinsic

from clue_dist.store.kernel_cache import compile_kernel

LARGEST_COUNT = 2**24  # training reads counts as float32, which is exact up to here
CACHE_LINE = 64  # bytes that enter a processor's cache together, on x86-64 and most ARM
ROWS_AHEAD = 1  # how early to ask for a row: it takes about as long to come as one takes to decode
# What `find_fault` finds.
COLUMN_FAULT = 1
LENGTHS_FAULT = 2


# --- a row before it is needed: those of a batch are spread over more memory than a cache holds ---


def _generate_prefetch(_typing: Any, _address: Any) -> Any:
    """Generate LLVM's prefetch instruction: a hint, which reads nothing and never fails."""

    def generate(context: Any, builder: Any, _signature: Any, args: Any) -> Any:
        pointer, number = ir.IntType(8).as_pointer(), ir.IntType(32)
        kind = ir.FunctionType(ir.VoidType(), [pointer, number, number, number])
        function = cgutils.get_or_insert_function(builder.module, kind, "llvm.prefetch.p0")
        to_read, to_stay, data = number(0), number(3), number(1)
        builder.call(function, [builder.inttoptr(args[0], pointer), to_read, to_stay, data])
        return context.get_dummy_value()

    return types.void(types.intp), generate


# Run as plain Python (NUMBA_DISABLE_JIT=1), kernels have no such instruction.
_prefetch_line = (lambda _address: None) if config.DISABLE_JIT else intrinsic(_generate_prefetch)


@compile_kernel
def prefetch_array(array):
    """Begin to bring a contiguous array into the cache."""
    first = array.ctypes.data
    for address in range(
        first - first % CACHE_LINE, first + array.size * array.itemsize, CACHE_LINE
    ):
        _prefetch_line(address)


# --- coding ---------------------------------------------------------------------------------------


@compile_kernel
def compute_row_starts(lengths: np.ndarray) -> np.ndarray:
    """Find where each row starts in its block's codes and rest, and where the last one ends.

    Args:
        lengths: (blocks, B, 3).

    Returns:
        (blocks, B + 1, 2) int64.
    """
    blocks, size, _ = lengths.shape
    out = np.zeros((blocks, size + 1, 2), np.int64)
    for b in range(blocks):
        for i in range(size):
            out[b, i + 1, 0] = out[b, i, 0] + lengths[b, i, 0]
            out[b, i + 1, 1] = out[b, i, 1] + lengths[b, i, 1] + 2 * lengths[b, i, 2]
    return out


@compile_kernel
def copy_rows(starts, values, rows, out_rows, out_starts, out):
    """Copy row rows[i] of `values` to row out_rows[i] of `out`, for every i."""
    for i in range(len(rows)):
        source = values[starts[rows[i]] : starts[rows[i] + 1]]
        target = out[out_starts[out_rows[i]] : out_starts[out_rows[i]] + len(source)]
        # Of arrays that begin at 0 the compiler makes a copy of memory.
        for k in range(len(source)):
            target[k] = source[k]


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


# --- decoding -------------------------------------------------------------------------------------


@compile_kernel
def _prefetch_rows(codes, rest, starts, slot, row, i):
    """Prefetch codes and rest of a row that is decoded soon, and the starts of one after it."""
    if i + 2 * ROWS_AHEAD < len(slot):
        s, r = slot[i + 2 * ROWS_AHEAD], row[i + 2 * ROWS_AHEAD]
        prefetch_array(starts[s, r : r + 2])
    if i + ROWS_AHEAD < len(slot):
        s, r = slot[i + ROWS_AHEAD], row[i + ROWS_AHEAD]
        prefetch_array(codes[s, starts[s, r, 0] : starts[s, r + 1, 0]])
        prefetch_array(rest[s, starts[s, r, 1] : starts[s, r + 1, 1]])


@compile_kernel
def decode_rows(codes, rest, lengths, starts, bits, n_features, slot, row, indptr, indices, values):
    """Fill the rows of indices and, unless it is None, of values; write nothing beyond them.

    Returns:
        The first row that is not coded as it should be; -1: all are.
    """
    for i in range(len(slot)):
        _prefetch_rows(codes, rest, starts, slot, row, i)
        s, r = slot[i], row[i]
        columns = indices[indptr[i] : indptr[i + 1]]
        if values is None:
            fits = _decode_columns(
                codes[s], rest[s], lengths[s, r], starts[s, r], bits, n_features, columns
            )
        else:
            counts = values[indptr[i] : indptr[i + 1]]
            fits = _decode_row(
                codes[s], rest[s], lengths[s, r], starts[s, r], bits, n_features, columns, counts
            )
        if not fits:
            return i
    return -1


@compile_kernel
def decode_dense_rows(codes, rest, lengths, starts, bits, slot, row, out):
    """Fill `out`, (n, features).

    Returns:
        The first row that is not coded as it should be; -1: all are.
    """
    columns, counts = np.empty(out.shape[1], np.int32), np.empty(out.shape[1], np.float32)
    for i in range(len(slot)):
        _prefetch_rows(codes, rest, starts, slot, row, i)
        s, r = slot[i], row[i]
        n = np.int64(lengths[s, r, 0])
        if n > out.shape[1] or not _decode_row(
            codes[s],
            rest[s],
            lengths[s, r],
            starts[s, r],
            bits,
            out.shape[1],
            columns[:n],
            counts[:n],
        ):
            return i
        target = out[i]
        target[:] = np.float32(0)  # just before it is filled, while it is in the cache
        for j in range(n):
            target[columns[j]] = counts[j]
    return -1


@compile_kernel
def _decode_row(codes, rest, lengths, start, bits, n_features, columns, counts):
    """Fill the columns of one row, then its counts; return whether it is coded as it should be.

    The loop over counts runs on vector units, and only high counts are touched twice.
    """
    if not _decode_columns(codes, rest, lengths, start, bits, n_features, columns):
        return False
    mask = np.uint8((1 << bits) - 1)
    n_far, n_high = np.int64(lengths[1]), np.int64(lengths[2])
    row_codes, row_rest = (
        codes[start[0] : start[0] + len(columns)],
        rest[start[1] : start[1] + n_far + 2 * n_high],
    )
    for j in range(len(columns)):
        counts[j] = np.float32(np.int32(row_codes[j] & mask) + np.int32(1))
    place = np.int64(0)
    for k in range(n_far, n_far + n_high):
        place += np.int64(row_rest[k])
        if place >= len(columns):
            return False
        counts[place] = np.float32(row_rest[k + n_high]) + np.float32(1)
    return True


@compile_kernel
def _decode_columns(codes, rest, lengths, start, bits, n_features, columns):
    """Fill the columns of one row; return whether they can be right.

    They can where the row has as many far gaps as its lengths say, and its last column, which is
    the largest, is one of the features. There are too few features (`layout.MAX_FEATURES`) for the
    sum of near gaps to wrap around unseen.
    """
    far, shift = np.int32((256 >> bits) - 1), np.uint8(bits)
    row_codes, last = codes[start[0] : start[0] + len(columns)], len(rest) - 1
    column, k, far_sum = np.int32(0), start[1], np.int64(0)
    for j in range(len(columns)):
        gap = np.int32(row_codes[j] >> shift)
        if gap == far:
            # A row with more far gaps than it says must not lead beyond the block.
            wide = rest[min(k, last)]
            far_sum += np.int64(wide)
            gap = np.int32(wide)
            k += 1
        column += gap
        columns[j] = column
    fits = k - start[1] == lengths[1] and len(columns) <= n_features
    return fits and far_sum < n_features and column < n_features


@compile_kernel
def find_fault(codes, rest, lengths, starts, bits, n_features):
    """Check the coding of every row of some blocks, the padding aside.

    Returns:
        COLUMN_FAULT, LENGTHS_FAULT, or 0 where all rows are coded as they should be.
    """
    far, high = (256 >> bits) - 1, (1 << bits) - 1
    for s in range(lengths.shape[0]):
        for r in range(lengths.shape[1]):
            column, passed, n_far, n_high = np.int64(0), np.int64(0), 0, 0
            first_rest = starts[s, r, 1]
            for j in range(starts[s, r, 0], starts[s, r + 1, 0]):
                gap = np.int64(codes[s, j] >> bits)
                if gap == far:
                    if n_far == lengths[s, r, 1]:
                        return LENGTHS_FAULT
                    gap = np.int64(rest[s, first_rest + n_far])
                    n_far += 1
                column += gap
                if bits and (codes[s, j] & high) == high:
                    if n_high == lengths[s, r, 2]:
                        return LENGTHS_FAULT
                    passed += np.int64(rest[s, first_rest + lengths[s, r, 1] + n_high])
                    if passed != j - starts[s, r, 0]:
                        return LENGTHS_FAULT
                    n_high += 1
            if column >= n_features:
                return COLUMN_FAULT
            if n_far != lengths[s, r, 1] or n_high != lengths[s, r, 2]:
                return LENGTHS_FAULT
    return 0
