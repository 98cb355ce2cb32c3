"""Tables of cells x features in the obsm of an AnnData, as totalVI's proteins are."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from clue_dist.errors import DataError
from clue_dist.kinds import find_kinds
from clue_dist.store.location import Location
from data_prep.options import ObsColumns
from data_prep.readers.file_parts import FilePart
from data_prep.readers.h5_cells import read_cells
from data_prep.readers.h5_file import (
    WRITE_ANEW,
    is_array,
    is_group,
    open_container,
    open_part,
    read_part,
)
from data_prep.readers.h5_frame import list_columns
from data_prep.readers.h5_matrix import (
    looks_like_counts,
    read_csr_slice,
    read_matrix_shape,
    require_whole_matrix,
)
from data_prep.readers.snapatac import FRAGMENT_KEYS
from data_prep.readers.source import (
    PROBED_VALUES,
    DirectSource,
    SourceHead,
    SourceRows,
    identify_file,
    looks_whole,
    require_real_numbers,
)

_MOST_AXES = 3  # of coordinates of cells
_MOST_FEATURES = 100_000  # of a table that a person is told of
# Where AnnData keeps the names of a table's columns if the table itself has none.
_NAMES_IN_UNS = ("protein_names",)


def list_obsm_parts(root: Any) -> list[FilePart]:
    """A part on request for each table of features; what cannot be read as one is passed over."""
    obsm = root.get("obsm")
    parts = []
    for name in obsm if is_group(obsm) else ():
        # Most of obsm is of no use here, so that damage in it does not matter.
        with suppress(DataError, KeyError, TypeError, ValueError, OSError, RuntimeError):
            table = open_part(obsm, name)
            columns = list_columns(table) if _is_frame(table) else None
            n_features = read_matrix_shape(table)[1] if columns is None else len(columns)
            if columns:
                counts = looks_whole(open_part(table, columns[0])[:PROBED_VALUES])
            else:
                counts = looks_like_counts(table)
            # Pixels of an image are whole numbers, too, and fragments have a column for each base.
            is_panel = bool(find_kinds(name)) or columns is not None or n_features > _MOST_AXES
            counts = counts and is_panel and n_features <= _MOST_FEATURES
            parts.append(
                FilePart(
                    f"obsm/{name}",
                    suggestion=_suggest_kind(f"obsm/{name}"),
                    on_request=True,
                    n_features=n_features,
                    holds_counts=counts,
                )
            )
    return parts


def _suggest_kind(key: str) -> str:
    """What a table measures: fragments, or what its name says, or proteins, as most do."""
    kinds = find_kinds(key)
    return "atac" if key in FRAGMENT_KEYS else kinds[0] if len(kinds) == 1 else "adt"


@dataclass(frozen=True)
class ObsmSource(DirectSource):
    """One table in the obsm of an AnnData: an array, a data frame or a CSR matrix."""

    path: Location
    modality: str
    dataset: str
    key: str  # `obsm/NAME`
    obs_columns: ObsColumns = field(default_factory=ObsColumns)

    @property
    def display_name(self) -> str:
        return f"{self.path.name}/{self.key}"

    def describe_identity(self) -> dict[str, Any]:
        return identify_file(self.path) | {
            "matrix": self.key,
            "modality": self.modality,
            "dataset": self.dataset,
        }

    def read_head(self) -> SourceHead:
        with open_container(self.path) as file:
            cells = read_cells(file, "", self.modality, self.obs_columns, self.display_name)
            table = open_part(file, self.key)
            n_cells = len(cells.barcodes)
            features = self._read_features(file, table)
            self._require_fitting_table(table, n_cells, len(features))
        nnz = n_cells * len(features)
        return SourceHead(
            cells.barcodes, features, nnz, cells.fields, cells.columns, kept_columns=cells.kept
        )

    def read_rows(self, start: int, stop: int, scratch: Path) -> SourceRows:
        with open_container(self.path) as file:
            table = open_part(file, self.key)
            if _is_frame(table):
                columns = [open_part(table, name)[start:stop] for name in list_columns(table)]
                return require_real_numbers(np.column_stack(columns), self.display_name)
            if is_group(table):
                n_columns = read_matrix_shape(table)[1]
                return read_csr_slice(table, start, stop, n_columns, self.display_name)
            return require_real_numbers(np.asarray(table[start:stop]), self.display_name)

    def _read_features(self, file: Any, table: Any) -> list[str]:
        if _is_frame(table):
            return list_columns(table)
        n_features = read_matrix_shape(table)[1]
        for name in _NAMES_IN_UNS:
            if name in file.get("uns", {}) and is_array(file["uns"][name]):
                names = np.ravel(read_part(file["uns"], name)).tolist()
                if len(names) == n_features:
                    return [str(text) for text in names]
        return [f"{self.key.removeprefix('obsm/')}_{i}" for i in range(n_features)]

    def _require_fitting_table(self, table: Any, n_cells: int, n_features: int) -> None:
        if _is_frame(table):
            shapes = {open_part(table, name).shape for name in list_columns(table)}
        else:
            shapes = {read_matrix_shape(table)[:1]}
            if is_group(table):
                require_whole_matrix(table, n_cells)
        if shapes != {(n_cells,)} or not n_features:
            raise DataError(
                "a table of obsm does not fit its cells",
                where=self.display_name,
                got=sorted(shapes) or "no columns",
                expected=(n_cells,),
                fix=WRITE_ANEW,
            )


def _is_frame(table: Any) -> bool:
    return is_group(table) and table.attrs.get("encoding-type") == "dataframe"
