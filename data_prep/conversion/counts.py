"""Rows as a file has them -> rows as the store wants them: validated, aligned, canonical."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import scipy.sparse as sp

from clue_dist.errors import DataError, list_names
from clue_dist.files import write_file
from clue_dist.kinds import KINDS
from clue_dist.store.count_rules import limit_rounding, make_count_error, make_real_value_error
from clue_dist.store.encoding_kernels import LARGEST_COUNT
from clue_dist.store.kernel_cache import compile_kernel
from clue_dist.store.layout import choose_unsigned
from clue_dist.store.rows import (
    COUNT_BITS,
    CodedRows,
    CsrRows,
    join_rows,
    recode_rows_with_counts,
    try_code_rows,
)
from data_prep.jobs.array_files import load_array
from data_prep.readers.source import Source, SourceRows, decode_barcodes

STEP_ENTRIES = 2**21  # read and coded at once: a count takes eight times the memory of its code
ROUNDED = "rounded-"  # begins the names of notes about rounded counts


@dataclass(frozen=True)
class AlignmentTarget:
    """What the rows of one source become."""

    kind: str
    n_features: int
    columns: Path | None  # a .npy file of where each column goes, -1 = dropped; None: all stay
    # Whether counts may be any fractions, which are rounded; else those that are nearly whole are.
    round_counts: bool = False
    notes: Path | None = None  # a folder for what is to be told of the rows; None: nothing is


@dataclass(frozen=True)
class SourceReading:
    """All that a task must know to read any rows of a source."""

    source: Source
    target: AlignmentTarget
    n_rows: int
    nnz: int  # stored entries of all rows
    scratch: Path  # what `Source.prepare_part` has written
    row_folder: Path  # keys.npy and batch.npy: spool key and batch of each row

    def split_rows(
        self, n_entries: int, start: int = 0, stop: int | None = None
    ) -> list[tuple[int, int]]:
        """Cut rows into ranges of about `n_entries` stored entries each.

        Args:
            n_entries: at least one row is in a range, however many entries it has.
            start: the first row.
            stop: the row after the last one; None: all rows from `start` on.

        Returns:
            First row and last row + 1 of each range.
        """
        stop = self.n_rows if stop is None else stop
        step = max(1, n_entries * self.n_rows // max(self.nnz, 1))
        return [(first, min(first + step, stop)) for first in range(start, stop, step)]

    def read_rows(self, start: int, stop: int) -> SourceRows:
        """Read rows `start` to `stop` in canonical form."""
        rows = self.source.read_rows(start, stop, self.scratch)
        return canonicalise_rows(self.source, self.target, rows, start)

    def read_coded_rows(
        self, start: int, stop: int, order: np.ndarray
    ) -> tuple[CodedRows | np.ndarray, int]:
        """Read rows as a spool keeps them.

        Args:
            start: the first row.
            stop: the row after the last one.
            order: places of these rows, counted from `start`, in the order that is wanted.

        Returns:
            The rows, coded or dense, and the largest count among them; 0 for measured floats.
        """
        ranges = self.split_rows(STEP_ENTRIES, start, stop)
        if KINDS[self.target.kind].storage == "sparse":
            coded = [self._read_coded_range(first, last) for first, last in ranges]
            largest = max(most for _, most in coded)
            parts = [rows for rows, _ in coded]
            if largest > 1:
                parts = [recode_rows_with_counts(rows) for rows in parts]
            return join_rows(parts, order), largest
        values = np.concatenate([self.read_rows(first, last) for first, last in ranges])[order]
        return values, 0 if values.dtype.kind == "f" else int(values.max(initial=0))

    def _read_coded_range(self, start: int, stop: int) -> tuple[CodedRows, int]:
        """Read and code rows of a sparse kind; also return their largest count."""
        rows = self.source.read_rows(start, stop, self.scratch)
        coded = None
        if self.target.columns is None and not isinstance(rows, np.ndarray):
            # Most rows are canonical in their file: one walk finds that out and codes them.
            coded = _try_code_matrix(rows)
        if coded is None:
            coded = _try_code_matrix(canonicalise_rows(self.source, self.target, rows, start))
        assert coded is not None  # canonical rows can always be coded
        return coded


def _try_code_matrix(matrix: sp.csr_matrix) -> tuple[CodedRows, int] | None:
    """Code rows as `try_code_rows` does, with bits for the counts only where one is above 1."""
    rows = CsrRows(matrix.indptr, matrix.indices, matrix.data, matrix.shape[1])
    # Most rows that are not binary show that at once.
    return try_code_rows(rows, 0) or try_code_rows(rows, COUNT_BITS)


def canonicalise_rows(
    source: Source, target: AlignmentTarget, rows: SourceRows, first_row: int
) -> SourceRows:
    """Validate rows of a source and align them to the features of the store.

    Args:
        source: the file, for messages.
        target: what the rows become.
        rows: as the file has them.
        first_row: the number of the first of them in the source.

    Returns:
        Of a sparse kind, CSR with sorted indices and without zeros, integers of any type. Of a
        dense kind, an array (n, features): counts of the narrowest unsigned type, else float32.

    Raises:
        DataError: a value is not a count, or not finite where real values are stored.
    """
    kind = KINDS[target.kind]
    columns = None if target.columns is None else load_array(target.columns)
    if kind.real_values:
        return _canonicalise_values(source, rows, columns, target.n_features, first_row)
    matrix = sp.csr_matrix(rows) if isinstance(rows, np.ndarray) else rows
    matrix = _round_counts(matrix, target, first_row)
    counts = _canonicalise_counts(source, matrix, columns, target.n_features, first_row)
    return narrow_counts(counts.toarray()) if kind.storage == "dense" else counts


def _canonicalise_values(
    source: Source, rows: SourceRows, columns: np.ndarray | None, n_features: int, first_row: int
) -> np.ndarray:
    """Bring real values into a float32 array, (n, features)."""
    with np.errstate(over="ignore"):  # what float32 cannot hold becomes infinite, and is refused
        array = rows if isinstance(rows, np.ndarray) else _densify(rows)
        values = np.asarray(array, np.float32)
    wrong = np.argwhere(~np.isfinite(values))
    if len(wrong):
        row, column = wrong[0].tolist()
        raise _make_value_error(source, first_row + row, column, values[row, column], False)
    return values if columns is None else _align_dense(values, columns, n_features)


def _densify(rows: sp.csr_matrix) -> np.ndarray:
    """Make an array; entries given twice add up, integers as floats, which do not wrap around."""
    return (rows if rows.dtype.kind == "f" else rows.astype(np.float64)).toarray()


def _round_counts(matrix: sp.csr_matrix, target: AlignmentTarget, first_row: int) -> sp.csr_matrix:
    """Round counts that are nearly whole, as they are when they were computed from others.

    What is farther from a whole number stays, and is refused later, unless every count is to be
    rounded. The largest change is noted in a file.
    """
    if matrix.dtype.kind != "f":
        return matrix
    rounded = np.rint(matrix.data)
    with np.errstate(invalid="ignore"):  # missing and infinite values stay, and are refused later
        changes = np.abs(rounded - matrix.data)
    allowed = 0.5 if target.round_counts else limit_rounding(rounded)
    changed = (changes > 0) & (changes <= allowed) & (rounded >= 0)
    if not changed.any():
        return matrix
    if target.notes is not None:
        note = target.notes / f"{ROUNDED}{first_row:012d}"
        write_file(note, repr(float(changes[changed].max())), unique=True)
    values = np.where(changed, np.abs(rounded), matrix.data)  # without -0.0
    return sp.csr_matrix((values, matrix.indices, matrix.indptr), shape=matrix.shape, copy=False)


def find_largest_rounding(notes: Path) -> float:
    """The largest change by which a count of a source was rounded; 0 where none was."""
    return max((float(note.read_text()) for note in notes.glob(f"{ROUNDED}*")), default=0.0)


def _canonicalise_counts(
    source: Source,
    matrix: sp.csr_matrix,
    columns: np.ndarray | None,
    n_features: int,
    first_row: int,
) -> sp.csr_matrix:
    """Bring counts into CSR with sorted indices and without zeros."""
    is_canonical = _validate_counts(source, matrix, first_row)
    if columns is not None:
        matrix = _align_sparse(matrix, columns, n_features)
        # Columns that go to one place are added up.
        is_canonical &= bool(np.bincount(columns[columns >= 0]).max(initial=0) <= 1)
    if not is_canonical:
        matrix = matrix.astype(np.int64)  # two narrow counts may not add up in their own type
        matrix.sum_duplicates()
        matrix.eliminate_zeros()
        largest = matrix.data.max(initial=0)
        if largest > LARGEST_COUNT:
            raise DataError(
                "counts of one cell and feature add up to too much",
                where=f"{source.display_name}, cells from {first_row} on",
                got=largest,
                expected=LARGEST_COUNT,
            )
    return matrix


def _validate_counts(source: Source, matrix: sp.csr_matrix, first_row: int) -> bool:
    """Refuse entries that are not counts; return whether the rows are in canonical form."""
    wrong, is_canonical = _scan_counts(matrix.indptr, matrix.indices, matrix.data)
    if wrong >= 0:
        row = int(np.searchsorted(matrix.indptr, wrong, side="right")) - 1
        column, value = int(matrix.indices[wrong]), matrix.data[wrong]
        raise _make_value_error(source, first_row + row, column, value, True)
    return bool(is_canonical)


@compile_kernel
def _scan_counts(indptr, indices, values):  # type: ignore[no-untyped-def]
    """Find the first entry that is not 0, 1, ... LARGEST_COUNT (or -1).

    Also say whether the columns of every row ascend and no zero is stored.
    """
    is_canonical = True
    for row in range(len(indptr) - 1):
        column_before = -1
        for i in range(indptr[row], indptr[row + 1]):
            value = values[i]
            if not (value >= 0 and value <= LARGEST_COUNT and value == np.floor(value)):
                return i, False
            is_canonical &= value > 0 and indices[i] > column_before
            column_before = indices[i]
    return -1, is_canonical


def narrow_counts(values: np.ndarray) -> np.ndarray:
    """Bring validated counts into the narrowest unsigned type that holds them all."""
    if not values.size:
        return values.astype(np.uint8)
    return values.astype(choose_unsigned(int(values.max())), copy=False)


def _make_value_error(
    source: Source, row: int, column: int, value: np.number, is_count: bool
) -> DataError:
    """Make the error for a value that should be a count, or else a finite number."""
    head, other_counts = source.read_head(), source.list_other_counts()
    cell = str(decode_barcodes(head.barcodes[row : row + 1])[0])
    is_missing = bool(np.isnan(value))
    fix = _advise_on_value(source.modality, float(value)) if is_count or is_missing else None
    if other_counts:
        name, *others = other_counts
        fix = f"`--layer {name}` (`layer=` in Python), which looks like raw counts"
        if others:
            fix = (
                f"`--layer NAME` (`layer=` in Python), one of {list_names(other_counts)}, which "
                "look like raw counts"
            )
    make_error = make_count_error if is_count else make_real_value_error
    where = f"{source.display_name}, cell {cell!r}, feature {head.features[column]!r}"
    return make_error(where, value, fix)


def _advise_on_value(modality: str, value: float) -> str:
    """What a person can do about a value that is no count."""
    if np.isnan(value):
        return (
            "a value is missing, as after a concatenation that keeps features which some files "
            "lack: convert the files one by one with `--features union`, which sets absent ones "
            "to zero, or fill in zeros where that is true"
        )
    rounding = "" if value < 0 else "corrected counts are rounded with `--round`; "
    return (
        f"convert the raw counts, not normalised values; {rounding}"
        "values that are meant to be normalised, as CLR or DSB make them of proteins, are stored "
        f"with `--kind {modality}=dense`"
    )


def _align_sparse(matrix: sp.csr_matrix, columns: np.ndarray, n_features: int) -> sp.csr_matrix:
    """Move every entry to the place of its column, (source features,) int32; -1 drops it."""
    places = columns[matrix.indices]
    is_kept = places >= 0
    kept_before = np.concatenate([[0], np.cumsum(is_kept, dtype=np.int64)])
    aligned = sp.csr_matrix(
        (matrix.data[is_kept], places[is_kept], kept_before[matrix.indptr]),
        shape=(matrix.shape[0], n_features),
    )
    aligned.sort_indices()
    return aligned


def _align_dense(values: np.ndarray, columns: np.ndarray, n_features: int) -> np.ndarray:
    """Move every column to its place; features that the source lacks are zero."""
    aligned = np.zeros((len(values), n_features), values.dtype)
    aligned[:, columns[columns >= 0]] = values[:, columns >= 0]
    return aligned
