"""One modality of cells in memory, checked and aligned to a model as its rows are read."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
import scipy.sparse as sp
import torch

from clue_dist.data.batch import Counts, SparseCounts
from clue_dist.errors import DataError, format_count, list_names
from clue_dist.inference.cells.argument_names import OPEN_CELLS, ArgumentNames
from clue_dist.kinds import KINDS
from clue_dist.store.count_rules import limit_rounding, make_count_error, make_real_value_error
from clue_dist.store.encoding_kernels import LARGEST_COUNT
from clue_dist.store.manifest_parts import Modality

_ROWS_AT_ONCE = 4096  # that are read to find those without counts


@dataclass(frozen=True, eq=False)
class AlignedCounts:
    """Values of one modality, whose columns move to the model's places as rows are read."""

    where: str  # they come from, for messages
    matrix: Any  # (n, columns), an array or a sparse matrix, in memory or in its file
    cell_names: pd.Index  # (n,)
    feature_names: pd.Index  # (columns,)
    places: np.ndarray  # (columns,) int32, of each column among the model's features; -1: dropped
    modality: Modality  # the model's
    other_layers: Sequence[str] = ()  # where the counts may lie instead, for messages
    arguments: ArgumentNames = OPEN_CELLS

    @property
    def has_real_values(self) -> bool:
        """Whether the values may be any finite numbers, not counts alone."""
        return KINDS[self.modality.kind].real_values

    def read_counts(self, rows: np.ndarray) -> Counts:
        """Read cells as the model takes them.

        Args:
            rows: (n,), in any order, each once.

        Raises:
            DataError: a value is not a count, or not finite where real values are taken.
        """
        values = self.read_rows(rows)
        if isinstance(values, np.ndarray):
            return torch.from_numpy(values)
        return SparseCounts(
            torch.from_numpy(values.indptr.astype(np.int32)),
            torch.from_numpy(values.indices.astype(np.int32)),
            torch.from_numpy(values.data),
            self.modality.n_features,
        )

    def read_rows(self, rows: np.ndarray) -> sp.csr_matrix | np.ndarray:
        """Read cells as `read_counts` does: float32, CSR without zeros or (n, features)."""
        found = self._read_source(rows)
        if self.has_real_values:
            return self._align_values(found, rows)
        counts = self._align_counts(self._round_counts(sp.csr_matrix(found), rows))
        return counts.toarray() if self.modality.storage == "dense" else counts

    def mark_empty(self) -> np.ndarray:
        """Which cells have no counts of the model's features, (n,) bool; reads every value.

        Raises:
            DataError: a value is not a count, or not finite where real values are taken.
        """
        n_cells = len(self.cell_names)
        empty = np.zeros(n_cells, bool)
        for start in range(0, n_cells, _ROWS_AT_ONCE):
            rows = np.arange(start, min(start + _ROWS_AT_ONCE, n_cells))
            values = self.read_rows(rows)
            if not self.has_real_values:
                empty[rows] = np.asarray(values.sum(axis=1)).ravel() == 0
        return empty

    def _read_source(self, rows: np.ndarray) -> Any:
        """Rows as they lie in memory or in their file, an array or a sparse matrix."""
        # Cells of a MuData may lie in another order in a modality, and a file is read forwards.
        order = np.argsort(rows)
        ascending = rows[order]
        is_range = len(rows) and (np.diff(ascending) == 1).all()
        found = self.matrix[slice(ascending[0], ascending[-1] + 1) if is_range else ascending]
        if hasattr(found, "compute"):  # an array of Dask
            found = found.compute()
        if not sp.issparse(found):
            found = np.asarray(found)
        if found.dtype.kind not in "buif":
            raise DataError(
                "the matrix does not hold real numbers",
                where=self.where,
                got=found.dtype,
                expected="integers or floats",
            )
        # What scipy's sparse matrices do not hold: half floats, and bytes in the other order.
        if found.dtype == np.float16:
            found = found.astype(np.float32)
        elif not found.dtype.isnative:
            found = found.astype(found.dtype.newbyteorder("="))
        return found if (order[:-1] < order[1:]).all() else found[np.argsort(order)]

    def _align_values(self, found: Any, rows: np.ndarray) -> np.ndarray:
        """Real values as float32 (n, features)."""
        if sp.issparse(found):
            found = found.toarray()
        with np.errstate(over="ignore"):  # what float32 cannot hold becomes infinite: refused
            values = np.asarray(found, np.float32)
        wrong = np.argwhere(~np.isfinite(values))
        if len(wrong):
            row, column = wrong[0].tolist()
            raise self._make_value_error(rows[row], column, values[row, column])
        aligned = np.zeros((len(values), self.modality.n_features), np.float32)
        aligned[:, self.places[self.places >= 0]] = values[:, self.places >= 0]
        return aligned

    def _round_counts(self, matrix: sp.csr_matrix, rows: np.ndarray) -> sp.csr_matrix:
        """Round counts that are nearly whole; refuse what is no count."""
        values = matrix.data
        is_count = (values >= 0) & (values <= LARGEST_COUNT)
        if values.dtype.kind == "f":
            rounded = np.rint(values)
            with np.errstate(invalid="ignore"):  # missing and infinite values are no counts
                is_near = np.abs(rounded - values) <= limit_rounding(rounded)
            is_count = is_near & (rounded >= 0) & (values <= LARGEST_COUNT)
            values = np.abs(rounded)  # without -0.0
        if not is_count.all():
            wrong = int(np.flatnonzero(~is_count)[0])
            row = int(np.searchsorted(matrix.indptr, wrong, side="right")) - 1
            value, column = matrix.data[wrong], int(matrix.indices[wrong])
            raise self._make_value_error(rows[row], column, value)
        return sp.csr_matrix((values, matrix.indices, matrix.indptr), shape=matrix.shape)

    def _align_counts(self, matrix: sp.csr_matrix) -> sp.csr_matrix:
        """Move every entry to the place of its column: float32, sorted, without zeros."""
        places = self.places[matrix.indices]
        is_kept = (places >= 0) & (matrix.data > 0)
        kept_before = np.concatenate([[0], np.cumsum(is_kept, dtype=np.int64)])
        aligned = sp.csr_matrix(
            (
                matrix.data[is_kept].astype(np.float32),
                places[is_kept],
                kept_before[matrix.indptr],
            ),
            shape=(matrix.shape[0], self.modality.n_features),
        )
        aligned.sum_duplicates()  # sorts, too
        return aligned

    def _make_value_error(self, row: int, column: int, value: Any) -> DataError:
        """Make the error for a value that is not what the modality's kind takes."""
        fix = None
        if np.isnan(value):
            fix = "a value is missing: fill in zeros where nothing was counted"
        elif not self.has_real_values:
            others = f" (there are {list_names(self.other_layers)})" if self.other_layers else ""
            way = self.arguments.join_advice(layer=f"`{{}}` names the layer with them{others}")
            fix = f"give the raw counts, not normalised values: {way}"
        cell, feature = self.cell_names[row], self.feature_names[column]
        make_error = make_real_value_error if self.has_real_values else make_count_error
        return make_error(f"{self.where}, cell {cell!r}, feature {feature!r}", value, fix)


def align_features(
    where: str,
    names: Sequence[str],
    modality: Modality,
    min_known: float,
    arguments: ArgumentNames,
) -> tuple[np.ndarray, str | None]:
    """Find the place of each column among the features of a model.

    Args:
        where: the columns come from, for messages.
        names: of the columns.
        modality: the model's.
        min_known: the least share of the model's features that must be among the names.
        arguments: what the caller calls the arguments that would help.

    Returns:
        Places, (columns,) int32, -1 for what the model does not know; a warning, where features of
        the model are missing.

    Raises:
        DataError: too few features are there, or a name of them stands twice.
    """
    places_of_names = {name: place for place, name in enumerate(modality.features)}
    places = np.array([places_of_names.get(name, -1) for name in names], np.int32)
    times = np.bincount(places[places >= 0], minlength=modality.n_features)
    if (times > 1).any():
        repeated = [modality.features[place] for place in np.flatnonzero(times > 1)]
        raise DataError(
            f"{format_count(len(repeated), 'feature name')} more than once",
            where=where,
            got=list_names(repeated),
            fix="make them unique (`adata.var_names_make_unique()`), or add up the columns of one "
            "gene",
        )
    missing = [modality.features[place] for place in np.flatnonzero(times == 0)]
    n_known = modality.n_features - len(missing)
    found = f"{n_known:,} of {modality.n_features:,} features"
    if n_known < min_known * modality.n_features or not n_known:
        raise DataError(
            "too few of the model's features were measured",
            where=where,
            got=f"{found}; the first ones there are {list_names(names, 3)}",
            expected=f"{min_known:.0%} of them or more, named like "
            f"{list_names(modality.features, 3)}",
            fix=arguments.join_advice(
                feature_ids="`{}` names a column of var that names features as the model does",
                min_known="`{}0` takes the cells all the same",
            ),
        )
    if not missing:
        return places, None
    verb = "is missing and counts" if len(missing) == 1 else "are missing and count"
    return places, (
        f"{where}: {len(missing):,} of {modality.n_features:,} features {verb} as zero, which "
        f"moves z ({list_names(missing)})"
    )
