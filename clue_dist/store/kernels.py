"""Compiled kernels that code and decode rows; `rows` tells what they are.

All of them are in this file: of what a kernel calls elsewhere, numba's cache on disk would not see a change.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from llvmlite import ir
from numba import config, njit, types
from numba.core import cgutils
from numba.extending import intrinsic

LARGEST_COUNT = 2**24  # count: training reads counts as float32, exact up to here
LINE = 64  # bytes that come into a processor's cache together, on x86-64 and most ARM
AHEAD = 1  # rows: one takes about as long to decode as the next one to come


# --- a row before it is needed: those of a batch lie all over more memory than a cache holds -----------------------


def _ask_for_line(_typing: Any, _address: Any) -> Any:
    """LLVM's prefetch instruction: a hint, which reads nothing and fails for no address."""

    def generate(context: Any, builder: Any, _signature: Any, args: Any) -> Any:
        pointer, number = ir.IntType(8).as_pointer(), ir.IntType(32)
        kind = ir.FunctionType(ir.VoidType(), [pointer, number, number, number])
        function = cgutils.get_or_insert_function(builder.module, kind, "llvm.prefetch.p0")
        to_read, to_stay, data = number(0), number(3), number(1)
        builder.call(function, [builder.inttoptr(args[0], pointer), to_read, to_stay, data])
        return context.get_dummy_value()

    return types.void(types.intp), generate


# Kernels can be run as plain Python (NUMBA_DISABLE_JIT=1), which has no such instruction.
_line = (lambda _address: None) if config.DISABLE_JIT else intrinsic(_ask_for_line)


@njit(nogil=True, cache=True)
def prefetch_array(array):  # type: ignore[no-untyped-def]
    """Begin to bring a contiguous array into the cache."""
    first = array.ctypes.data
    for address in range(first - first % LINE, first + array.size * array.itemsize, LINE):
        _line(address)


# --- coding and decoding --------------------------------------------------------------------------------------------


@njit(nogil=True, cache=True)
def compute_row_starts(lengths: np.ndarray) -> np.ndarray:
    """lengths (blocks, B, 3) -> where each row starts in its block's codes and rest, (blocks, B + 1, 2) int64."""
    blocks, size, _ = lengths.shape
    out = np.zeros((blocks, size + 1, 2), np.int64)
    for b in range(blocks):
        for i in range(size):
            out[b, i + 1, 0] = out[b, i, 0] + lengths[b, i, 0]
            out[b, i + 1, 1] = out[b, i, 1] + lengths[b, i, 1] + 2 * lengths[b, i, 2]
    return out


@njit(nogil=True, cache=True)
def copy_rows(starts, values, rows, at, out_starts, out):  # type: ignore[no-untyped-def]
    """Copy what row rows[i] has of `values` to row at[i] of `out`."""
    for i in range(len(rows)):
        source = values[starts[rows[i]] : starts[rows[i] + 1]]
        target = out[out_starts[at[i]] : out_starts[at[i]] + len(source)]
        for k in range(len(source)):  # of arrays that begin at 0: the compiler makes a copy of it
            target[k] = source[k]


@njit(nogil=True, cache=True)
def encode_rows(indptr, indices, values, bits, lengths, codes, rest, scratch):  # type: ignore[no-untyped-def]
    """Fill codes, rest and lengths (n, 3). Returns how much of codes and of rest is filled, the largest count, or -1
    where a row is not canonical, and the largest number in rest. scratch: (2, longest row)."""
    far, high = (256 >> bits) - 1, (1 << bits) - 1
    to, at = 0, 0
    largest, largest_rest = np.int64(0), np.int64(0)
    for row in range(len(lengths)):
        lo, hi = indptr[row], indptr[row + 1]
        column, last = np.int64(-1), lo
        first, n_high = at, 0
        for i in range(lo, hi):
            before, column = column, np.int64(indices[i])
            value = values[i]
            count = np.int64(value)
            if column <= before or count < 1 or count > LARGEST_COUNT or count != value:
                return 0, 0, np.int64(-1), np.int64(0)
            largest = max(largest, count)
            gap = column - before if before > 0 else column
            if gap >= far:
                rest[at] = gap
                at += 1
                largest_rest = max(largest_rest, gap)
                gap = np.int64(far)
            low = np.int64(0)
            if bits:
                low = count - 1
                if low >= high:
                    scratch[0, n_high], scratch[1, n_high] = i - last, low
                    largest_rest = max(largest_rest, low, i - last)
                    n_high += 1
                    last = i
                    low = np.int64(high)
            codes[to] = gap << bits | low
            to += 1
        lengths[row, 0], lengths[row, 1], lengths[row, 2] = hi - lo, at - first, n_high
        for k in range(n_high):
            rest[at + k], rest[at + n_high + k] = scratch[0, k], scratch[1, k]
        at += 2 * n_high
    return to, at, largest, largest_rest


@njit(nogil=True, cache=True)
def recode_as_binary(codes, rest, starts, bits, lengths, out_rest):  # type: ignore[no-untyped-def]
    """Fill lengths (n, 3) and out_rest, change codes. Returns how much of out_rest is filled, -1 at another count."""
    far, count = (256 >> bits) - 1, (1 << bits) - 1
    at = 0
    for row in range(len(lengths)):
        k, first = starts[row, 1], at
        for j in range(starts[row, 0], starts[row + 1, 0]):
            if codes[j] & count:
                return -1
            gap = np.int64(codes[j] >> bits)
            if gap == far:
                gap = np.int64(rest[k])
                k += 1
            if gap >= 255:
                out_rest[at] = gap
                at += 1
                gap = np.int64(255)
            codes[j] = gap
        lengths[row, 0], lengths[row, 1] = starts[row + 1, 0] - starts[row, 0], at - first
    return at


@njit(nogil=True, cache=True)
def _ask_ahead(codes, rest, starts, slot, row, i):  # type: ignore[no-untyped-def]
    """Ask for the codes and rest of a row that is decoded soon, and before that, for where they are."""
    if i + 2 * AHEAD < len(slot):
        s, r = slot[i + 2 * AHEAD], row[i + 2 * AHEAD]
        prefetch_array(starts[s, r : r + 2])
    if i + AHEAD < len(slot):
        s, r = slot[i + AHEAD], row[i + AHEAD]
        prefetch_array(codes[s, starts[s, r, 0] : starts[s, r + 1, 0]])
        prefetch_array(rest[s, starts[s, r, 1] : starts[s, r + 1, 1]])


@njit(nogil=True, cache=True)
def decode_rows(codes, rest, lengths, starts, bits, n_features, slot, row, indptr, indices, values):  # type: ignore[no-untyped-def]
    """Returns the first row that is not coded as it should be, or -1; nothing is written beside what rows have."""
    for i in range(len(slot)):
        _ask_ahead(codes, rest, starts, slot, row, i)
        s, r = slot[i], row[i]
        columns = indices[indptr[i] : indptr[i + 1]]
        if values is None:
            fits = _columns(
                codes[s], rest[s], lengths[s, r], starts[s, r], bits, n_features, columns
            )
        else:
            counts = values[indptr[i] : indptr[i + 1]]
            fits = _row(
                codes[s], rest[s], lengths[s, r], starts[s, r], bits, n_features, columns, counts
            )
        if not fits:
            return i
    return -1


@njit(nogil=True, cache=True)
def decode_dense_rows(codes, rest, lengths, starts, bits, slot, row, out):  # type: ignore[no-untyped-def]
    """Returns as `decode` does."""
    columns, counts = np.empty(out.shape[1], np.int32), np.empty(out.shape[1], np.float32)
    for i in range(len(slot)):
        _ask_ahead(codes, rest, starts, slot, row, i)
        s, r = slot[i], row[i]
        n = np.int64(lengths[s, r, 0])
        if n > out.shape[1] or not _row(
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
        target[:] = np.float32(0)  # and filled while it is in the cache
        for j in range(n):
            target[columns[j]] = counts[j]
    return -1


@njit(nogil=True, cache=True)
def _row(codes, rest, lengths, start, bits, n_features, columns, counts):  # type: ignore[no-untyped-def]
    """Columns first, then counts: the second loop runs on vector units, and only high counts are touched twice.

    Returns whether the row is coded as it should be.
    """
    if not _columns(codes, rest, lengths, start, bits, n_features, columns):
        return False
    mask = np.uint8((1 << bits) - 1)
    n_far, n_high = np.int64(lengths[1]), np.int64(lengths[2])
    of, more = (
        codes[start[0] : start[0] + len(columns)],
        rest[start[1] : start[1] + n_far + 2 * n_high],
    )
    for j in range(len(columns)):
        counts[j] = np.float32(np.int32(of[j] & mask) + np.int32(1))
    place = np.int64(0)
    for k in range(n_far, n_far + n_high):
        place += np.int64(more[k])
        if place >= len(columns):
            return False
        counts[place] = np.float32(more[k + n_high]) + np.float32(1)
    return True


@njit(nogil=True, cache=True)
def _columns(codes, rest, lengths, start, bits, n_features, columns):  # type: ignore[no-untyped-def]
    """Returns whether the row has as many far gaps as its lengths say, and its last column, which is the largest, is
    one of the features. These are too few (`layout.MAX_FEATURES`) for the sum of gaps to wrap around unseen."""
    far, shift = np.int32((256 >> bits) - 1), np.uint8(bits)
    of, last = codes[start[0] : start[0] + len(columns)], len(rest) - 1
    column, k, gone = np.int32(0), start[1], np.int64(0)
    for j in range(len(columns)):
        gap = np.int32(of[j] >> shift)
        if gap == far:
            wide = rest[
                min(k, last)
            ]  # a row with more far gaps than it says must not lead beyond the block
            gone += np.int64(wide)
            gap = np.int32(wide)
            k += 1
        column += gap
        columns[j] = column
    fits = k - start[1] == lengths[1] and len(columns) <= n_features
    return fits and gone < n_features and column < n_features


@njit(nogil=True, cache=True)
def find_fault(codes, rest, lengths, starts, bits, n_features):  # type: ignore[no-untyped-def]
    far, high = (256 >> bits) - 1, (1 << bits) - 1
    for s in range(lengths.shape[0]):
        for r in range(lengths.shape[1]):
            column, passed, n_far, n_high = np.int64(0), np.int64(0), 0, 0
            at = starts[s, r, 1]
            for j in range(starts[s, r, 0], starts[s, r + 1, 0]):
                gap = np.int64(codes[s, j] >> bits)
                if gap == far:
                    if n_far == lengths[s, r, 1]:
                        return 2
                    gap = np.int64(rest[s, at + n_far])
                    n_far += 1
                column += gap
                if bits and (codes[s, j] & high) == high:
                    if n_high == lengths[s, r, 2]:
                        return 2
                    passed += np.int64(rest[s, at + lengths[s, r, 1] + n_high])
                    if passed != j - starts[s, r, 0]:
                        return 2
                    n_high += 1
            if column >= n_features:
                return 1
            if n_far != lengths[s, r, 1] or n_high != lengths[s, r, 2]:
                return 2
    return 0
