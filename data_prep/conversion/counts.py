"""Rows as a file has them -> rows as the store wants them: validated, aligned, in canonical form."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import scipy.sparse as sp
from numba import njit

from clue_dist.errors import DataError, list_names
from clue_dist.kinds import KINDS
from clue_dist.store.kernels import LARGEST_COUNT
from clue_dist.store.layout import choose_unsigned
from clue_dist.store.rows import COUNT_BITS, CodedRows, CsrRows, join_rows, try_code_rows
from data_prep.readers.source import Source, SourceRows, decode_barcodes

PIECE_ENTRIES = (
    2**20
)  # stored values that are read at once: a count takes eight times what its code does
_COUNTS = "counts must be raw: non-negative, finite integers"


@dataclass(frozen=True)
class AlignmentTarget:
    """What the rows of one source become. columns: a .npy file of where its columns go, -1 = dropped; or None."""

    kind: str
    n_features: int
    columns: Path | None


@dataclass(frozen=True)
class SourceReading:
    """All that a task must know to read any rows of a source. folder: keys.npy and batch.npy, one number per row."""

    source: Source
    target: AlignmentTarget
    n_rows: int
    nnz: int
    scratch: Path
    folder: Path

    def ranges(self, entries: int) -> list[tuple[int, int]]:
        """The rows, cut into ranges of about so many stored entries."""
        step = max(1, entries * self.n_rows // max(self.nnz, 1))
        return [(lo, min(lo + step, self.n_rows)) for lo in range(0, self.n_rows, step)]

    def rows(self, lo: int, hi: int) -> SourceRows:
        """Rows lo to hi, in canonical form."""
        return canonicalise_rows(
            self.source, self.target, self.source.read_rows(lo, hi, self.scratch), lo
        )

    def coded(self, lo: int, hi: int, order: np.ndarray) -> tuple[CodedRows | np.ndarray, int]:
        """Rows lo to hi in the given order, coded or dense, and the largest count among them (0: measured floats)."""
        step = max(1, PIECE_ENTRIES * self.n_rows // max(self.nnz, 1))
        parts = [(at, min(at + step, hi)) for at in range(lo, hi, step)]
        if KINDS[self.target.kind].storage == "sparse":
            pieces = [self._coded(*part) for part in parts]
            return join_rows([piece for piece, _ in pieces], order), max(
                largest for _, largest in pieces
            )
        values = np.concatenate([self.rows(*part) for part in parts])[order]
        return values, 0 if values.dtype.kind == "f" else int(values.max(initial=0))

    def _coded(self, lo: int, hi: int) -> tuple[CodedRows, int]:
        rows = self.source.read_rows(lo, hi, self.scratch)
        if self.target.columns is None and not isinstance(rows, np.ndarray):
            got = try_code_rows(
                _csr(rows), COUNT_BITS
            )  # most are as they should be: looked at and coded in one go
            if got is not None:
                return got
        got = try_code_rows(_csr(canonicalise_rows(self.source, self.target, rows, lo)), COUNT_BITS)
        assert got is not None
        return got


def _csr(rows: sp.csr_matrix) -> CsrRows:
    return CsrRows(rows.indptr, rows.indices, rows.data, rows.shape[1])


def canonicalise_rows(
    source: Source, target: AlignmentTarget, rows: SourceRows, first: int
) -> SourceRows:
    """Validate rows `first`, `first` + 1, ... of a source and align them to the target's features.

    Returns CSR with sorted indices and no zeros, integers of any type (rna, atac), or a dense array (n, features) of
    the narrowest unsigned type (adt) or float32 (dense).

    Raises:
        DataError: a value that is not a count (rna, adt, atac), or not finite (dense).
    """
    kind, columns = KINDS[target.kind], None if target.columns is None else np.load(target.columns)
    if kind.real_values:
        with np.errstate(
            over="ignore"
        ):  # what float32 cannot hold becomes infinite, and is refused
            dense = np.asarray(
                rows if isinstance(rows, np.ndarray) else _added_up(rows), np.float32
            )
        _refuse(
            source,
            rows,
            first,
            np.argwhere(~np.isfinite(dense)),
            dense,
            "dense values must be finite",
        )
        return dense if columns is None else _align_dense(dense, columns, target.n_features)
    matrix = sp.csr_matrix(rows) if isinstance(rows, np.ndarray) else rows
    tidy = _validate(source, matrix, first)
    if columns is not None:
        matrix = _align_sparse(matrix, columns, target.n_features)
        tidy = (
            tidy and np.bincount(columns[columns >= 0]).max(initial=0) <= 1
        )  # else columns are added up
    if not tidy:
        matrix = matrix.astype(np.int64)  # two narrow counts may not add up in their own type
        matrix.sum_duplicates()
        matrix.eliminate_zeros()
        if matrix.data.max(initial=0) > LARGEST_COUNT:
            got, where = matrix.data.max(), f"{source.display_name}, cells from {first} on"
            raise DataError(
                "counts of one cell and feature add up to too much",
                where=where,
                got=got,
                expected=LARGEST_COUNT,
            )
    return narrow_counts(matrix.toarray()) if kind.storage == "dense" else matrix


def _added_up(rows: sp.csr_matrix) -> np.ndarray:
    """Dense; what is given twice is added up, integers as floats, which do not wrap around."""
    return (rows if rows.dtype.kind == "f" else rows.astype(np.float64)).toarray()


def _validate(source: Source, matrix: sp.csr_matrix, first: int) -> bool:
    """Raise a DataError that names the first entry that is no count; True if the rows are in canonical form."""
    bad, tidy = _scan(matrix.indptr, matrix.indices, matrix.data)
    if bad >= 0:
        row = int(np.searchsorted(matrix.indptr, bad, side="right")) - 1
        raise _bad_value(source, first + row, int(matrix.indices[bad]), matrix.data[bad], _COUNTS)
    return bool(tidy)


@njit(nogil=True, cache=True)
def _scan(indptr, indices, values):  # type: ignore[no-untyped-def]
    """The first entry that is not 0, 1, ... LARGEST_COUNT (or -1), and whether columns ascend and no zero is stored."""
    tidy = True
    for row in range(len(indptr) - 1):
        before = -1
        for i in range(indptr[row], indptr[row + 1]):
            value = values[i]
            if not (value >= 0 and value <= LARGEST_COUNT and value == np.floor(value)):
                return i, False
            tidy &= value > 0 and indices[i] > before
            before = indices[i]
    return -1, tidy


def narrow_counts(values: np.ndarray) -> np.ndarray:
    """Validated counts in the narrowest unsigned type."""
    if not values.size:
        return values.astype(np.uint8)
    return values.astype(choose_unsigned(int(values.max())), copy=False)


def _refuse(
    source: Source, rows: SourceRows, first: int, bad: np.ndarray, values: np.ndarray, rule: str
) -> None:
    if len(bad):
        row, column = (int(i) for i in bad[0])
        raise _bad_value(source, first + row, column, values[row, column], rule)


def _bad_value(source: Source, row: int, column: int, value: np.number, rule: str) -> DataError:
    head, others = source.read_head(), source.list_other_counts()
    cell, counting = str(decode_barcodes(head.barcodes[row : row + 1])[0]), rule == _COUNTS
    if counting and value > LARGEST_COUNT:
        rule = f"counts above {LARGEST_COUNT} cannot be held exactly in float32"
    named = (
        f"these look like raw counts: {list_names(others)}; name one with `--layer`"
        if others
        else None
    )
    return DataError(
        rule,
        where=f"{source.display_name}, cell {cell!r}, feature {head.features[column]!r}",
        got=value,
        expected="0, 1, 2, ..." if counting else "a finite number",
        fix=named or ("convert the raw counts, not normalised values" if counting else None),
    )


def _align_sparse(matrix: sp.csr_matrix, columns: np.ndarray, n_features: int) -> sp.csr_matrix:
    """Move every entry to its target column; dropped features go. columns: (own features,) int32."""
    moved = columns[matrix.indices]
    keep = moved >= 0
    kept_before = np.concatenate([[0], np.cumsum(keep, dtype=np.int64)])
    aligned = sp.csr_matrix(
        (matrix.data[keep], moved[keep], kept_before[matrix.indptr]),
        shape=(matrix.shape[0], n_features),
    )
    aligned.sort_indices()
    return aligned


def _align_dense(values: np.ndarray, columns: np.ndarray, n_features: int) -> np.ndarray:
    out = np.zeros((len(values), n_features), values.dtype)
    out[:, columns[columns >= 0]] = values[:, columns >= 0]
    return out
