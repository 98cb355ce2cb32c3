"""Rows of a sparse matrix, and how they are coded on disk.

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

from clue_dist.errors import StoreError
from clue_dist.store import kernels
from clue_dist.store.kernels import LARGEST_COUNT, compute_row_starts, copy_rows

CHECK = "`python -m data_prep check STORE` lists every damaged shard; restore them or convert again"
COUNT_BITS = (
    2  # three of four counts of a droplet are below 4, and gaps below 63 leave few that are far
)


@dataclass(frozen=True)
class CsrRows:
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

    def to_scipy(self) -> sp.csr_matrix:
        return sp.csr_matrix(
            (self.values, self.indices, self.indptr), shape=(self.n_rows, self.n_features)
        )


@dataclass(frozen=True)
class CodedRows:
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

    def to_csr(self, n_features: int) -> CsrRows:
        blocks = CodedBlocks(
            self.codes[None], self.rest[None], self.lengths[None], self.compute_starts()[None]
        )
        return LocatedRows(
            blocks, np.zeros(self.n_rows, np.int64), np.arange(self.n_rows), n_features, self.bits
        ).to_csr()

    def compute_starts(self) -> np.ndarray:
        """Where each row starts in codes and in rest, and where the last one ends. (n + 1, 2) int64"""
        return compute_row_starts(self.lengths[None])[0]


def join_rows(parts: Sequence[CodedRows], order: np.ndarray) -> CodedRows:
    """Rows of several, as if one behind the other, in the given order; rest of the widest type."""
    lengths = np.concatenate([part.lengths for part in parts])[order]
    starts, place = compute_row_starts(lengths[None])[0], np.argsort(order)
    codes = np.empty(starts[-1, 0], np.uint8)
    rest = np.empty(starts[-1, 1], np.result_type(*(part.rest for part in parts)))
    first = 0
    for part in parts:
        rows = np.arange(part.n_rows)
        for k, (values, out) in enumerate(((part.codes, codes), (part.rest, rest))):
            copy_rows(
                part.compute_starts()[:, k], values, rows, place[first + rows], starts[:, k], out
            )
        first += part.n_rows
    return CodedRows(codes, rest, lengths, parts[0].bits)


def code_rows(rows: CsrRows, bits: int) -> CodedRows:
    """Code rows of counts from 1 on; without bits for the count, all are 1."""
    got = try_code_rows(rows, bits)
    if got is None:
        raise ValueError(
            f"rows that are not canonical: columns must ascend, counts be 1, 2, ... {LARGEST_COUNT}"
        )
    return got[0]


def try_code_rows(rows: CsrRows, bits: int) -> tuple[CodedRows, int] | None:
    """Code rows of any numbers, and the largest; None where a column does not ascend, or a number is no count."""
    lengths = np.empty((rows.n_rows, 3), np.uint32)
    most = int(np.diff(rows.indptr).max(initial=0))
    codes = np.empty(len(rows.values), np.uint8)
    rest = np.empty(3 * len(rows.values), np.uint32)  # only what is written to takes memory
    scratch = np.empty((2, most), np.uint32)
    ends = kernels.encode_rows(
        rows.indptr, rows.indices, rows.values, bits, lengths, codes, rest, scratch
    )
    n_codes, n_rest, largest, largest_rest = (int(n) for n in ends)
    if largest < 0:
        return None
    narrow = rest[:n_rest].astype(np.min_scalar_type(largest_rest))
    return CodedRows(codes[:n_codes], narrow, lengths, bits), largest


def recode_rows_as_binary(rows: CodedRows) -> CodedRows:
    """Rows whose counts are all 1, without bits for them. Takes the memory of `rows`, which are of no use any more."""
    lengths, rest = np.zeros_like(rows.lengths), np.empty_like(rows.rest)
    n_rest = int(
        kernels.recode_as_binary(
            rows.codes, rows.rest, rows.compute_starts(), rows.bits, lengths, rest
        )
    )
    if n_rest < 0:
        raise ValueError("a count above 1 in rows that should be binary")
    return CodedRows(rows.codes, rest[:n_rest], lengths, 0)


@dataclass(frozen=True)
class CodedBlocks:
    """Decompressed blocks, their rows still coded. codes: (n, C) uint8; rest: (n, R) unsigned; lengths: (n, B, 3) as in
    `Coded`; starts: (n, B + 1, 2), where each row starts in its block's codes and rest."""

    codes: np.ndarray
    rest: np.ndarray
    lengths: np.ndarray
    starts: np.ndarray


@dataclass(frozen=True)
class LocatedRows:
    """Some rows inside blocks, none of which is longer than its block. slot, row: (n,), which block and which row of
    it; bits: as in `Coded`; where: they come from, for messages.

    Decoding raises a StoreError where a row is not coded as it should be: what is decoded lies within its bounds,
    whatever the bytes are.
    """

    blocks: CodedBlocks
    slot: np.ndarray
    row: np.ndarray
    n_features: int
    bits: int
    where: str = "rows"

    def count_nonzeros(self) -> np.ndarray:
        """Of each row, (n,) uint32."""
        return self.blocks.lengths[self.slot, self.row, 0]

    def decode(self, indptr: np.ndarray, indices: np.ndarray, values: np.ndarray | None) -> None:
        """Fill indices (nnz,) int32 and values (nnz,) float32. indptr: (n + 1,), where each row goes in them. Without
        `values`, binary rows alone can be decoded."""
        b, of = self.blocks, (self.bits, self.n_features, self.slot, self.row)
        self._require_all(
            kernels.decode_rows(b.codes, b.rest, b.lengths, b.starts, *of, indptr, indices, values)
        )

    def decode_dense(self, out: np.ndarray) -> None:
        """Fill out, (n, features) float32."""
        b = self.blocks
        self._require_all(
            kernels.decode_dense_rows(
                b.codes, b.rest, b.lengths, b.starts, self.bits, self.slot, self.row, out
            )
        )

    def _require_all(self, bad: int) -> None:
        if bad >= 0:
            got = f"row {self.row[bad]} of a block, {self.count_nonzeros()[bad]} non-zeros"
            expected = f"columns below {self.n_features}, each gap and count once"
            raise StoreError(
                "values that no conversion writes",
                where=self.where,
                got=got,
                expected=expected,
                fix=CHECK,
            )

    def to_csr(self) -> CsrRows:
        indptr = np.concatenate([[0], np.cumsum(self.count_nonzeros(), dtype=np.int64)])
        indices, values = np.empty(indptr[-1], np.int32), np.empty(indptr[-1], np.float32)
        self.decode(indptr, indices, values)
        return CsrRows(indptr, indices, values, self.n_features)


def find_misfit(blocks: CodedBlocks, bits: int, n_features: int) -> str | None:
    """What is wrong with the coding of some row, if anything."""
    found = kernels.find_fault(
        blocks.codes, blocks.rest, blocks.lengths, blocks.starts, bits, n_features
    )
    return (
        "",
        f"a column beyond the last, there are {n_features} features",
        "lengths that do not fit the codes",
    )[found] or None
