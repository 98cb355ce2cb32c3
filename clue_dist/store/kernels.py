"""Compiled kernels that decode rows; `rows` says what the code is.

All that they call is in this file. Numba's cache on disk would not notice that a kernel in another
file, which one of these calls, had changed.

Names that many of them share: codes, rest, lengths and starts are those of `rows.CodedBlocks`;
slot says which block holds a row, row which row of its block it is; bits of a code hold the count.
"""
# mypy: allow-untyped-defs

from __future__ import annotations

import ctypes
from typing import Any

import numpy as np
from llvmlite import ir
from numba import config, types
from numba.core import cgutils
from numba.extending import intrinsic

from clue_dist.store.kernel_cache import compile_kernel

CACHE_LINE = 64  # bytes that enter a processor's cache together, on x86-64 and most ARM
LINE_VALUES = CACHE_LINE // 4  # float32 values of a cache line
# Values of a dense row that are put together at a time: 16 KB, half of a processor's first cache.
SPAN_VALUES = 4096
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


# --- a dense row as it is written: to fetch its memory into the cache first takes twice as long ---


def _generate_line_copy(_typing: Any, _target: Any, _source: Any) -> Any:
    """Generate the copy of a cache line that goes to memory past the cache."""

    def generate(context: Any, builder: Any, _signature: Any, args: Any) -> Any:
        line = ir.VectorType(ir.FloatType(), LINE_VALUES)
        target, source = (builder.inttoptr(address, line.as_pointer()) for address in args)
        copy = builder.store(builder.load(source, align=4), target, align=CACHE_LINE)
        one = ir.Constant(ir.IntType(32), 1)
        copy.set_metadata("nontemporal", builder.module.add_metadata([one]))
        return context.get_dummy_value()

    return types.void(types.intp, types.intp), generate


def _generate_fence(_typing: Any) -> Any:
    """Generate a fence: other threads see what was written past the cache before it."""

    def generate(context: Any, builder: Any, _signature: Any, _args: Any) -> Any:
        builder.fence("seq_cst")
        return context.get_dummy_value()

    return types.void(), generate


if config.DISABLE_JIT:
    _copy_line = lambda target, source: ctypes.memmove(target, source, CACHE_LINE)  # noqa: E731
    _finish_copies = lambda: None  # noqa: E731
else:
    _copy_line, _finish_copies = intrinsic(_generate_line_copy), intrinsic(_generate_fence)


# --- coded rows -----------------------------------------------------------------------------------


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


# --- rows of a batch ------------------------------------------------------------------------------


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
def gather_rows(codes, rest, starts, slot, row, out_starts, out_codes, out_rest):
    """Copy codes and rest of rows, still coded; out_starts: where each goes in both, (n + 1, 2)."""
    for i in range(len(slot)):
        _prefetch_rows(codes, rest, starts, slot, row, i)
        s, r = slot[i], row[i]
        source = codes[s, starts[s, r, 0] : starts[s, r + 1, 0]]
        target = out_codes[out_starts[i, 0] : out_starts[i, 0] + len(source)]
        for k in range(len(source)):
            target[k] = source[k]
        wide_source = rest[s, starts[s, r, 1] : starts[s, r + 1, 1]]
        wide_target = out_rest[out_starts[i, 1] : out_starts[i, 1] + len(wide_source)]
        for k in range(len(wide_source)):
            wide_target[k] = wide_source[k]


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
    span = np.zeros(SPAN_VALUES + LINE_VALUES, np.float32)
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
        _write_dense_row(columns[:n], counts[:n], span, out[i])
    _finish_copies()
    return -1


@compile_kernel
def _find_column(columns, begin, least):
    """Find the first of ascending columns, from `begin` on, that is `least` or more."""
    end = len(columns)
    while begin < end:
        middle = (begin + end) >> 1
        if columns[middle] < least:
            begin = middle + 1
        else:
            end = middle
    return begin


@compile_kernel
def _write_dense_row(columns, counts, span, target):
    """Write a row piece by piece; each is put together in `span`, zero before and after.

    Whole cache lines go past the cache. A function of its own for that would cost a fifth more.
    """
    size, to, read = len(target), target.ctypes.data, span.ctypes.data
    skip = (-to % CACHE_LINE) // 4  # values that lie in a cache line with those before the row
    # The first piece is longer, so that all others begin with a cache line.
    first, last, begin = 0, skip + SPAN_VALUES, 0
    while first < size:
        last = min(last, size)
        end = _find_column(columns, begin, last)
        for k in range(begin, end):
            span[np.uint32(columns[k] - first)] = counts[k]
        skip = min(skip, last - first)
        lines = (last - first - skip) // LINE_VALUES
        for j in range(skip):
            target[first + j] = span[j]
        for line in range(lines):
            place = 4 * skip + CACHE_LINE * line
            _copy_line(to + 4 * first + place, read + place)
        for j in range(skip + LINE_VALUES * lines, last - first):
            target[first + j] = span[j]
        span[:] = np.float32(0)
        first, last, begin, skip = last, last + SPAN_VALUES, end, 0


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
