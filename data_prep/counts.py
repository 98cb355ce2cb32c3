"""Rows as a file has them -> rows as the store wants them: validated, aligned, in canonical form."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import scipy.sparse as sp

from clue_dist.errors import DataError, listed
from clue_dist.store.layout import Kind, unsigned
from data_prep.sources import Rows, Source, decode

LARGEST = 2**24  # training reads counts as float32, exact up to here


@dataclass(frozen=True)
class Target:
    """What the rows of one source become. columns: a .npy file of where its columns go, -1 = dropped; or None."""

    kind: Kind
    n_features: int
    columns: Path | None


def canonical(source: Source, target: Target, rows: Rows, first: int) -> Rows:
    """Validate rows `first`, `first` + 1, ... of a source and align them to the target's features.

    Returns CSR with sorted indices, no zeros, the narrowest unsigned values (rna, atac), or a dense array:
    (n, features) of the narrowest unsigned type (adt) or float32 (dense).

    Raises:
        DataError: a value that is not a count (rna, adt, atac), or not finite (dense).
    """
    columns = None if target.columns is None else np.load(target.columns)
    if target.kind == "dense":
        dense = np.asarray(rows.todense() if sp.issparse(rows) else rows, np.float32)
        _refuse(source, rows, first, np.argwhere(~np.isfinite(dense)), dense, "dense values must be finite")
        return dense if columns is None else _align_dense(dense, columns, target.n_features)
    matrix = rows if sp.issparse(rows) else sp.csr_matrix(rows)
    validate_counts(source, matrix, first)
    matrix = sp.csr_matrix((narrow(matrix.data), matrix.indices, matrix.indptr), shape=matrix.shape, copy=False)
    if columns is not None:
        matrix = _align_sparse(matrix, columns, target.n_features)
    matrix = _tidy(matrix)
    return narrow(np.asarray(matrix.todense())) if target.kind == "adt" else matrix


def validate_counts(source: Source, matrix: sp.csr_matrix, first: int) -> None:
    """Raise a DataError that names the first entry that is no count."""
    values = matrix.data
    with np.errstate(invalid="ignore"):
        good = values <= LARGEST
        if values.dtype.kind != "u":
            good &= values >= 0
        if values.dtype.kind == "f":
            good &= values == np.floor(values)
    if good.all():
        return
    at = int(np.argmin(good))
    row = int(np.searchsorted(matrix.indptr, at, side="right")) - 1
    raise _bad_value(
        source, first + row, int(matrix.indices[at]), values[at], "counts must be raw: non-negative, finite integers"
    )


def narrow(values: np.ndarray) -> np.ndarray:
    """Validated counts in the narrowest unsigned type."""
    if not values.size:
        return values.astype(np.uint8)
    return values.astype(unsigned(int(values.max())), copy=False)


def _refuse(source: Source, rows: Rows, first: int, bad: np.ndarray, values: np.ndarray, rule: str) -> None:
    if len(bad):
        row, column = (int(i) for i in bad[0])
        raise _bad_value(source, first + row, column, values[row, column], rule)


def _bad_value(source: Source, row: int, column: int, value: object, rule: str) -> DataError:
    head, others = source.head(), source.other_counts()
    fix = f"these look like raw counts: {listed(others)}; name one with `--layer`" if others else None
    if isinstance(value, np.number) and value > LARGEST:
        rule, fix = f"counts above {LARGEST} cannot be held exactly", None
    return DataError(
        rule,
        where=f"{source.where}, cell {decode(head.barcodes[row : row + 1])[0]!r}, feature {head.features[column]!r}",
        got=value,
        expected="a finite number" if "finite" in rule and "raw" not in rule else "0, 1, 2, ...",
        fix=fix or "convert the raw counts, not normalised values",
    )


def _tidy(matrix: sp.csr_matrix) -> sp.csr_matrix:
    """Sorted indices, no entry twice, no explicit zero."""
    if not matrix.has_canonical_format:
        # Two narrow counts may not add up in their own type.
        matrix = matrix.astype(np.uint32)
        matrix.sum_duplicates()
        matrix.data = narrow(matrix.data)
    if len(matrix.data) and not matrix.data.all():
        matrix.eliminate_zeros()
    return matrix


def _align_sparse(matrix: sp.csr_matrix, columns: np.ndarray, n_features: int) -> sp.csr_matrix:
    """Move every entry to its target column; dropped features go. columns: (own features,) int32."""
    moved = columns[matrix.indices]
    keep = moved >= 0
    kept_before = np.concatenate([[0], np.cumsum(keep, dtype=np.int64)])
    aligned = sp.csr_matrix(
        (matrix.data[keep], moved[keep], kept_before[matrix.indptr]), shape=(matrix.shape[0], n_features)
    )
    aligned.sort_indices()
    return aligned


def _align_dense(values: np.ndarray, columns: np.ndarray, n_features: int) -> np.ndarray:
    out = np.zeros((len(values), n_features), values.dtype)
    out[:, columns[columns >= 0]] = values[:, columns >= 0]
    return out
