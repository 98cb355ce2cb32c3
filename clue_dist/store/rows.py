"""Rows of a sparse matrix, how they are coded on disk, and the kernels that code and decode them.

A non-zero is one byte: the gap from the column before it in its row (a row's first counts from column 0) and, below
it, `bits` bits of its count minus one. What does not fit is marked by the largest value of its field and follows in
the row's `rest`: first the far gaps, then of every high count how many non-zeros lie between it and the high count
before it, then the high counts minus one. Binary rows have bits = 0 and store no counts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import scipy.sparse as sp
from numba import njit

from clue_dist.store.prefetch import prefetch

LARGEST = 2**24  # count: training reads counts as float32, exact up to here
COUNT_BITS = 2  # three of four counts of a droplet are below 4, and gaps below 63 leave few that are far


@dataclass(frozen=True)
class Csr:
    """Sparse rows. indptr: (n + 1,) int64; indices: (nnz,) int32, sorted in a row; values: (nnz,) float32.

    `coded` takes any integer types.
    """

    indptr: np.ndarray
    indices: np.ndarray
    values: np.ndarray
    n_features: int

    @property
    def n_rows(self) -> int:
        return len(self.indptr) - 1

    def scipy(self) -> sp.csr_matrix:
        return sp.csr_matrix((self.values, self.indices, self.indptr), shape=(self.n_rows, self.n_features))


@dataclass(frozen=True)
class Coded:
    """Rows as they are on disk, one behind the other. codes: (nnz,) uint8; rest: (r,) unsigned;
    lengths: (n, 3) uint32, of each row its non-zeros, far gaps and high counts; bits: of a code that hold the count.
    """

    codes: np.ndarray
    rest: np.ndarray
    lengths: np.ndarray
    bits: int

    @property
    def n_rows(self) -> int:
        return len(self.lengths)

    def csr(self, n_features: int) -> Csr:
        blocks = Blocks(self.codes[None], self.rest[None], self.lengths[None], self.starts()[None])
        return Located(blocks, np.zeros(self.n_rows, np.int64), np.arange(self.n_rows), n_features, self.bits).csr()

    def starts(self) -> np.ndarray:
        """Where each row starts in codes and in rest, and where the last one ends. (n + 1, 2) int64"""
        return row_starts(self.lengths[None])[0]


def joined(parts: Sequence[Coded], order: np.ndarray) -> Coded:
    """Rows of several, as if one behind the other, in the given order; rest of the widest type."""
    lengths = np.concatenate([part.lengths for part in parts])[order]
    starts, place = row_starts(lengths[None])[0], np.argsort(order)
    codes = np.empty(starts[-1, 0], np.uint8)
    rest = np.empty(starts[-1, 1], np.result_type(*(part.rest for part in parts)))
    first = 0
    for part in parts:
        rows = np.arange(part.n_rows)
        for k, (values, out) in enumerate(((part.codes, codes), (part.rest, rest))):
            copy_rows(part.starts()[:, k], values, rows, place[first + rows], starts[:, k], out)
        first += part.n_rows
    return Coded(codes, rest, lengths, parts[0].bits)


def coded(rows: Csr, bits: int) -> Coded:
    """Code rows of counts from 1 on; without bits for the count, all are 1."""
    got = try_coded(rows, bits)
    if got is None:
        raise ValueError(f"rows that are not canonical: columns must ascend, counts be 1, 2, ... {LARGEST}")
    return got[0]


def try_coded(rows: Csr, bits: int) -> tuple[Coded, int] | None:
    """Code rows of any numbers, and the largest; None where a column does not ascend, or a number is no count."""
    lengths = np.empty((rows.n_rows, 3), np.uint32)
    most = int(np.diff(rows.indptr).max(initial=0))
    codes = np.empty(len(rows.values), np.uint8)
    rest = np.empty(3 * len(rows.values), np.uint32)  # only what is written to takes memory
    scratch = np.empty((2, most), np.uint32)
    ends = _encode(rows.indptr, rows.indices, rows.values, bits, lengths, codes, rest, scratch)
    n_codes, n_rest, largest, largest_rest = (int(n) for n in ends)
    if largest < 0:
        return None
    narrow = rest[:n_rest].astype(np.min_scalar_type(largest_rest))
    return Coded(codes[:n_codes], narrow, lengths, bits), largest


def as_binary(rows: Coded) -> Coded:
    """Rows whose counts are all 1, without bits for them. Takes the memory of `rows`, which are of no use any more."""
    lengths, rest = np.zeros_like(rows.lengths), np.empty_like(rows.rest)
    n_rest = int(_to_binary(rows.codes, rows.rest, rows.starts(), rows.bits, lengths, rest))
    if n_rest < 0:
        raise ValueError("a count above 1 in rows that should be binary")
    return Coded(rows.codes, rest[:n_rest], lengths, 0)


@dataclass(frozen=True)
class Blocks:
    """Decompressed blocks, their rows still coded. codes: (n, C) uint8; rest: (n, R) unsigned; lengths: (n, B, 3) as in
    `Coded`; starts: (n, B + 1, 2), where each row starts in its block's codes and rest."""

    codes: np.ndarray
    rest: np.ndarray
    lengths: np.ndarray
    starts: np.ndarray


@dataclass(frozen=True)
class Located:
    """Some rows inside blocks. slot, row: (n,), which block and which row of it; bits: as in `Coded`."""

    blocks: Blocks
    slot: np.ndarray
    row: np.ndarray
    n_features: int
    bits: int

    def nonzeros(self) -> np.ndarray:
        """Of each row, (n,) uint32."""
        return self.blocks.lengths[self.slot, self.row, 0]

    def decode(self, indptr: np.ndarray, indices: np.ndarray, values: np.ndarray | None) -> None:
        """Fill indices (nnz,) int32 and values (nnz,) float32. indptr: (n + 1,), where each row goes in them. Without
        `values`, binary rows alone can be decoded."""
        b = self.blocks
        _decode(b.codes, b.rest, b.lengths, b.starts, self.bits, self.slot, self.row, indptr, indices, values)

    def decode_dense(self, out: np.ndarray) -> None:
        """Fill out, (n, features) float32."""
        b = self.blocks
        _decode_dense(b.codes, b.rest, b.lengths, b.starts, self.bits, self.slot, self.row, out)

    def csr(self) -> Csr:
        indptr = np.concatenate([[0], np.cumsum(self.nonzeros(), dtype=np.int64)])
        indices, values = np.empty(indptr[-1], np.int32), np.empty(indptr[-1], np.float32)
        self.decode(indptr, indices, values)
        return Csr(indptr, indices, values, self.n_features)


@njit(nogil=True, cache=True)
def row_starts(lengths: np.ndarray) -> np.ndarray:
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
def _encode(indptr, indices, values, bits, lengths, codes, rest, scratch):  # type: ignore[no-untyped-def]
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
            if column <= before or count < 1 or count > LARGEST or count != value:
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
def _to_binary(codes, rest, starts, bits, lengths, out_rest):  # type: ignore[no-untyped-def]
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
def _fetch(codes, rest, lengths, starts, slot, row, i):  # type: ignore[no-untyped-def]
    """While row i is decoded, the next one's codes and rest come into the cache, and where a later one's are."""
    if i + 3 < len(slot):
        s, r = slot[i + 3], row[i + 3]
        prefetch(lengths[s, r])
        prefetch(starts[s, r])
    if i + 1 < len(slot):
        s, r = slot[i + 1], row[i + 1]
        prefetch(codes[s, starts[s, r, 0] : starts[s, r + 1, 0]])
        prefetch(rest[s, starts[s, r, 1] : starts[s, r + 1, 1]])


@njit(nogil=True, cache=True)
def _decode(codes, rest, lengths, starts, bits, slot, row, indptr, indices, values):  # type: ignore[no-untyped-def]
    for i in range(len(slot)):
        _fetch(codes, rest, lengths, starts, slot, row, i)
        s, r = slot[i], row[i]
        columns = indices[indptr[i] : indptr[i + 1]]
        if values is None:
            _columns(codes[s], rest[s], starts[s, r], bits, columns)
        else:
            _row(codes[s], rest[s], lengths[s, r], starts[s, r], bits, columns, values[indptr[i] : indptr[i + 1]])


@njit(nogil=True, cache=True)
def _decode_dense(codes, rest, lengths, starts, bits, slot, row, out):  # type: ignore[no-untyped-def]
    columns, counts = np.empty(out.shape[1], np.int32), np.empty(out.shape[1], np.float32)
    for i in range(len(slot)):
        _fetch(codes, rest, lengths, starts, slot, row, i)
        s, r = slot[i], row[i]
        n = lengths[s, r, 0]
        _row(codes[s], rest[s], lengths[s, r], starts[s, r], bits, columns[:n], counts[:n])
        target = out[i]
        target[:] = np.float32(0)  # and filled while it is in the cache
        for j in range(n):
            target[columns[j]] = counts[j]


@njit(nogil=True, cache=True)
def _row(codes, rest, lengths, start, bits, columns, counts):  # type: ignore[no-untyped-def]
    """Columns first, then counts: the second loop runs on vector units, and only high counts are touched twice."""
    _columns(codes, rest, start, bits, columns)
    mask = np.uint8((1 << bits) - 1)
    n_far, n_high = lengths[1], lengths[2]
    of, more = codes[start[0] : start[0] + len(columns)], rest[start[1] : start[1] + n_far + 2 * n_high]
    for j in range(len(columns)):
        counts[j] = np.float32(np.int32(of[j] & mask) + np.int32(1))
    place = np.int64(0)
    for k in range(n_far, n_far + n_high):
        place += np.int64(more[k])
        counts[place] = np.float32(more[k + n_high]) + np.float32(1)


@njit(nogil=True, cache=True)
def _columns(codes, rest, start, bits, columns):  # type: ignore[no-untyped-def]
    far, shift = np.int32((256 >> bits) - 1), np.uint8(bits)
    of, more = codes[start[0] : start[0] + len(columns)], rest[start[1] :]
    column, k = np.int32(0), 0
    for j in range(len(columns)):
        gap = np.int32(of[j] >> shift)
        if gap == far:
            gap = np.int32(more[k])
            k += 1
        column += gap
        columns[j] = column


def misfit(blocks: Blocks, bits: int, n_features: int) -> str | None:
    """What is wrong with the coding of some row, if anything."""
    found = _misfit(blocks.codes, blocks.rest, blocks.lengths, blocks.starts, bits, n_features)
    return ("", f"a column beyond the last, there are {n_features} features", "lengths that do not fit the codes")[
        found
    ] or None


@njit(nogil=True, cache=True)
def _misfit(codes, rest, lengths, starts, bits, n_features):  # type: ignore[no-untyped-def]
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
