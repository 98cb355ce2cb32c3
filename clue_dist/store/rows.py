"""Rows of a sparse matrix, and the code in which a store holds them.

A non-zero takes one byte. Its upper bits are the gap from the column before it in its row (the
first gap of a row counts from column 0), its lower `bits` bits are its count minus one. A gap or
count that does not fit is marked by the largest value of its field, and follows in the row's
`rest`, in this order:

1. the far gaps;
2. for each high count, how many non-zeros lie between it and the high count before it;
3. the high counts, minus one.

Binary rows have bits = 0 and no counts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import scipy.sparse as sp

from clue_dist.errors import StoreError
from clue_dist.store import encoding_kernels, kernels
from clue_dist.store.encoding_kernels import LARGEST_COUNT
from clue_dist.store.kernels import compute_row_starts, copy_rows

# The fix that errors of damaged data name.
CHECK_FIX = (
    "`python -m data_prep check STORE` lists every damaged shard; restore them or convert again"
)
# With two bits, three of four counts of droplets fit, and so do the gaps below 63: few are far.
COUNT_BITS = 2


@dataclass(frozen=True)
class CsrRows:
    """Sparse rows, as they are decoded. `code_rows` takes any integer types."""

    indptr: np.ndarray  # (n + 1,) int64
    indices: np.ndarray  # (nnz,) int32, ascending within a row
    values: np.ndarray  # (nnz,) float32
    n_features: int

    @property
    def n_rows(self) -> int:
        """Number of rows."""
        return len(self.indptr) - 1

    def to_scipy(self) -> sp.csr_matrix:
        """Return the rows as a SciPy matrix, (n, features)."""
        return sp.csr_matrix(
            (self.values, self.indices, self.indptr), shape=(self.n_rows, self.n_features)
        )


@dataclass(frozen=True)
class CodedRows:
    """Coded rows, one behind the other."""

    codes: np.ndarray  # (nnz,) uint8
    rest: np.ndarray  # (r,), of an unsigned type
    lengths: np.ndarray  # (n, 3) uint32: non-zeros, far gaps and high counts of each row
    bits: int  # bits of a code that hold the count

    @property
    def n_rows(self) -> int:
        """Number of rows."""
        return len(self.lengths)

    def to_csr(self, n_features: int) -> CsrRows:
        """Decode the rows."""
        block = CodedBlocks(
            self.codes[None], self.rest[None], self.lengths[None], self.compute_starts()[None]
        )
        slot, row = np.zeros(self.n_rows, np.int64), np.arange(self.n_rows)
        return LocatedRows(block, slot, row, n_features, self.bits).to_csr()

    def compute_starts(self) -> np.ndarray:
        """Find where each row starts in codes and in rest, and where the last one ends.

        Returns:
            (n + 1, 2) int64.
        """
        return compute_row_starts(self.lengths[None])[0]

    def slice_rows(self, part: slice) -> CodedRows:
        """Take a range of the rows."""
        starts, (start, stop, _) = self.compute_starts(), part.indices(self.n_rows)
        (first, first_rest), (last, last_rest) = starts[start], starts[stop]
        return CodedRows(
            self.codes[first:last], self.rest[first_rest:last_rest], self.lengths[part], self.bits
        )


@dataclass(frozen=True)
class CodedBlocks:
    """Decompressed blocks, whose rows are still coded."""

    codes: np.ndarray  # (n, C) uint8
    rest: np.ndarray  # (n, R), of an unsigned type
    lengths: np.ndarray  # (n, B, 3) uint32, as in `CodedRows`
    starts: np.ndarray  # (n, B + 1, 2) int64: where each row starts in its block's codes and rest

    def take_rows(self, chosen: np.ndarray, bits: int) -> CodedRows:
        """Take some of the rows, without decoding them.

        Args:
            chosen: which rows, (m,), numbered through all blocks.
            bits: bits of a code that hold the count.
        """
        size = self.lengths.shape[1]
        lengths = self.lengths.reshape(-1, 3)[chosen]
        starts, places = compute_row_starts(lengths[None])[0], np.arange(len(chosen))
        codes = np.empty(starts[-1, 0], np.uint8)
        rest = np.empty(starts[-1, 1], self.rest.dtype)
        for block in range(len(self.codes)):
            taken = places[chosen // size == block]
            rows = chosen[taken] % size
            first = self.starts[block]
            copy_rows(first[:, 0], self.codes[block], rows, taken, starts[:, 0], codes)
            copy_rows(first[:, 1], self.rest[block], rows, taken, starts[:, 1], rest)
        return CodedRows(codes, rest, lengths, bits)


@dataclass(frozen=True)
class LocatedRows:
    """Rows inside blocks, still coded; none is longer than its block.

    Decoding raises a StoreError where a row is not coded as it should be. Whatever the bytes are,
    the kernels read and write within the bounds of their arrays.
    """

    blocks: CodedBlocks
    slot: np.ndarray  # (n,): which of the blocks holds each row
    row: np.ndarray  # (n,): which row of its block each is
    n_features: int
    bits: int  # bits of a code that hold the count
    where: str = "rows"  # where they come from, for error messages

    def count_nonzeros(self) -> np.ndarray:
        """Return the number of non-zeros of each row, (n,) uint32."""
        return self.blocks.lengths[self.slot, self.row, 0]

    def measure_codes(self) -> np.ndarray:
        """Return how much of codes and of rest each row takes, (n, 2) int64."""
        starts = self.blocks.starts
        return starts[self.slot, self.row + 1] - starts[self.slot, self.row]

    def copy_codes(self, starts: np.ndarray, codes: np.ndarray, rest: np.ndarray) -> None:
        """Copy the rows, still coded, into arrays of the caller.

        Args:
            starts: where each row goes in the other two, (n + 1, 2).
            codes: filled, uint8.
            rest: filled, of an unsigned type that holds that of the blocks.
        """
        blocks = self.blocks
        kernels.gather_rows(
            blocks.codes, blocks.rest, blocks.starts, self.slot, self.row, starts, codes, rest
        )

    def decode(self, indptr: np.ndarray, indices: np.ndarray, values: np.ndarray | None) -> None:
        """Decode the rows into arrays of the caller.

        Args:
            indptr: where each row goes in the other two, (n + 1,).
            indices: filled with columns, (nnz,) int32.
            values: filled with counts, (nnz,) float32. Without it only binary rows can be decoded.

        Raises:
            StoreError: a row is not coded as it should be.
        """
        blocks = self.blocks
        bad_row = kernels.decode_rows(
            blocks.codes,
            blocks.rest,
            blocks.lengths,
            blocks.starts,
            self.bits,
            self.n_features,
            self.slot,
            self.row,
            indptr,
            indices,
            values,
        )
        self._require_decoded(bad_row)

    def decode_dense(self, out: np.ndarray) -> None:
        """Decode the rows into `out`, (n, features) float32.

        Raises:
            StoreError: a row is not coded as it should be.
        """
        blocks = self.blocks
        bad_row = kernels.decode_dense_rows(
            blocks.codes,
            blocks.rest,
            blocks.lengths,
            blocks.starts,
            self.bits,
            self.slot,
            self.row,
            out,
        )
        self._require_decoded(bad_row)

    def to_csr(self) -> CsrRows:
        """Decode the rows.

        Raises:
            StoreError: a row is not coded as it should be.
        """
        indptr = np.concatenate([[0], np.cumsum(self.count_nonzeros(), dtype=np.int64)])
        indices, values = np.empty(indptr[-1], np.int32), np.empty(indptr[-1], np.float32)
        self.decode(indptr, indices, values)
        return CsrRows(indptr, indices, values, self.n_features)

    def _require_decoded(self, bad_row: int) -> None:
        """Raise the error for the row that a kernel refused; -1: it refused none."""
        if bad_row >= 0:
            raise make_coding_error(
                self.where,
                f"row {self.row[bad_row]} of a block",
                self.count_nonzeros()[bad_row],
                self.n_features,
            )


def make_coding_error(where: str, row: str, nonzeros: int, n_features: int) -> StoreError:
    """Make the error for a row that is not coded as it should be."""
    return StoreError(
        "values that no conversion writes",
        where=where,
        got=f"{row}, {nonzeros} non-zeros",
        expected=f"columns below {n_features}, each gap and count once",
        fix=CHECK_FIX,
    )


def join_rows(parts: Sequence[CodedRows], order: np.ndarray) -> CodedRows:
    """Put the rows of several parts in an order, without decoding them.

    Args:
        parts: rows coded with the same bits.
        order: which row comes where, (n,); rows are numbered through all parts.

    Returns:
        All rows; their rest has the widest type of the parts.
    """
    lengths = np.concatenate([part.lengths for part in parts])[order]
    starts, place = compute_row_starts(lengths[None])[0], np.argsort(order)
    codes = np.empty(starts[-1, 0], np.uint8)
    rest = np.empty(starts[-1, 1], np.result_type(*(part.rest for part in parts)))
    first = 0  # number of the part's first row
    for part in parts:
        rows = np.arange(part.n_rows)
        to_row, part_starts = place[first + rows], part.compute_starts()
        copy_rows(part_starts[:, 0], part.codes, rows, to_row, starts[:, 0], codes)
        copy_rows(part_starts[:, 1], part.rest, rows, to_row, starts[:, 1], rest)
        first += part.n_rows
    return CodedRows(codes, rest, lengths, parts[0].bits)


def code_rows(rows: CsrRows, bits: int) -> CodedRows:
    """Code rows of counts from 1 on.

    Args:
        rows: rows whose columns ascend.
        bits: bits of a code for the count; 0 where all counts are 1.

    Raises:
        ValueError: a column does not ascend, or a value is no count.
    """
    coded = try_code_rows(rows, bits)
    if coded is None:
        raise ValueError(
            "rows that are not canonical: columns must ascend, counts be "
            f"{f'1, 2, ... {LARGEST_COUNT}' if bits else '1'}"
        )
    return coded[0]


def try_code_rows(rows: CsrRows, bits: int) -> tuple[CodedRows, int] | None:
    """Code rows of any numbers, if they can be coded as they are.

    Columns must lie inside the matrix: one beyond 2^31 is not noticed here.

    Returns:
        The coded rows and the largest count; None where a column does not ascend, a number is no
        count, or a count is above 1 and there are no bits for it.
    """
    lengths = np.empty((rows.n_rows, 3), np.uint32)
    longest = int(np.diff(rows.indptr).max(initial=0))
    codes = np.empty(len(rows.values), np.uint8)
    # The most that the rest can be. What is never written to takes no memory.
    rest = np.empty(3 * len(rows.values), np.uint32)
    scratch = np.empty((2, longest), np.uint32)
    filled = encoding_kernels.encode_rows(
        rows.indptr, rows.indices, rows.values, bits, lengths, codes, rest, scratch
    )
    n_codes, n_rest, largest, largest_rest = (int(n) for n in filled)
    if largest < 0:
        return None
    narrow = rest[:n_rest].astype(np.min_scalar_type(largest_rest))
    return CodedRows(codes[:n_codes], narrow, lengths, bits), largest


def recode_rows_with_counts(rows: CodedRows) -> CodedRows:
    """Code binary rows as rows with counts are coded; those that have bits for counts stay.

    Args:
        rows: the rows. Their memory goes to the result: they must not be used any more.
    """
    if rows.bits:
        return rows
    lengths, rest = np.zeros_like(rows.lengths), np.empty(len(rows.codes), rows.rest.dtype)
    n_rest = int(
        encoding_kernels.recode_with_counts(
            rows.codes, rows.rest, rows.compute_starts(), COUNT_BITS, lengths, rest
        )
    )
    return CodedRows(rows.codes, rest[:n_rest], lengths, COUNT_BITS)


def describe_coding_fault(blocks: CodedBlocks, bits: int, n_features: int) -> str | None:
    """Say what is wrong with the coding of some row of these blocks; None: nothing is."""
    faults = {
        kernels.COLUMN_FAULT: f"a column beyond the last, there are {n_features} features",
        kernels.LENGTHS_FAULT: "lengths that do not fit the codes",
    }
    return faults.get(
        int(
            kernels.find_fault(
                blocks.codes, blocks.rest, blocks.lengths, blocks.starts, bits, n_features
            )
        )
    )
