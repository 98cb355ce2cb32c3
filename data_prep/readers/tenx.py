"""10x HDF5 files, and the table of features that 10x folders have too."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from clue_dist.errors import DataError, list_names
from clue_dist.kinds import TENX_TYPES
from data_prep.readers.h5_file import ANEW, open_h5, open_part
from data_prep.readers.h5_frame import TextColumn
from data_prep.readers.h5_matrix import (
    read_csr_slice,
    require_whole_matrix,
)
from data_prep.readers.source import (
    DirectSource,
    SourceHead,
    SourceRows,
    identify_file,
    make_names_unique,
    select_columns,
)


@dataclass(frozen=True)
class FeatureTable:
    """The features of a 10x file, which may mix modalities. All lists are (features,)."""

    ids: list[str]
    names: list[str]
    types: list[str]

    def select(
        self, feature_type: str | None, asked: str | None = None
    ) -> tuple[np.ndarray, list[str], str | None]:
        """Columns of one type (None: all), their names, and which of the columns `asked` for gave them.

        A name that repeats gives way to its id.
        """
        wanted = [i for i, t in enumerate(self.types) if feature_type is None or t == feature_type]
        column = next((c for c in (asked or "").split(",") if c in TENX_COLUMNS), None)
        own = self.ids if column is not None and TENX_COLUMNS[column] == "id" else self.names
        names = make_names_unique([own[i] for i in wanted], [self.ids[i] for i in wanted])
        return np.array(wanted, np.int64), names, column

    def type_for(self, kind: str, where: str) -> str | None:
        """The feature type that holds `kind`; None where the file does not tell types apart.

        Raises:
            DataError: the file has several types and none of this kind.
        """
        types = sorted(set(self.types))
        if len(types) <= 1:
            return None
        fitting = [t for t in types if t in TENX_TYPES and TENX_TYPES[t] == kind]
        if len(fitting) != 1:
            raise DataError(
                "the file has no features of this kind",
                where=where,
                got=list_names(types),
                expected=kind,
            )
        return fitting[0]


# What scanpy and Cell Ranger call the two columns of a 10x feature table.
TENX_COLUMNS = {
    "gene_ids": "id",
    "gene_id": "id",
    "id": "id",
    "gene_symbols": "name",
    "gene_name": "name",
    "name": "name",
}


@dataclass(frozen=True)
class TenxSource(DirectSource):
    """One feature type of a 10x .h5 (Cell Ranger 3 and later): CSC over features x cells is CSR over cells."""

    path: Path
    modality: str
    dataset: str = ""
    feature_type: str | None = None  # None: the file holds one type
    id_columns: str | None = None

    @property
    def display_name(self) -> str:
        return f"{self.path.name}/{self.feature_type}" if self.feature_type else self.path.name

    def describe_identity(self) -> dict[str, Any]:
        kept = {
            "feature_type": self.feature_type,
            "modality": self.modality,
            "dataset": self.dataset,
            "ids": self.id_columns,
        }
        return identify_file(self.path) | kept

    def read_head(self) -> SourceHead:
        with open_h5(self.path) as file:
            table = read_tenx_features(file)
            matrix = open_part(file, "matrix")
            barcodes, nnz = (
                TextColumn.open_dataset(open_part(matrix, "barcodes")),
                int(open_part(matrix, "data").shape[0]),
            )
            expected = (len(table.ids), len(barcodes))
            if (got := tuple(open_part(matrix, "shape")[:].tolist())) != expected:
                raise DataError(
                    "the matrix does not fit its features and barcodes",
                    where=self.display_name,
                    got=got,
                    expected=expected,
                )
            require_whole_matrix(matrix, len(barcodes))
        wanted, names, named_by = table.select(self.feature_type, self.id_columns)
        share = nnz * len(wanted) // max(len(table.ids), 1)
        return SourceHead(barcodes, names, share, {}, [], list(TENX_COLUMNS), named_by)

    def read_rows(self, start: int, stop: int, scratch: Path) -> SourceRows:
        with open_h5(self.path) as file:
            table = read_tenx_features(file)
            rows = read_csr_slice(
                open_part(file, "matrix"), start, stop, len(table.ids), self.display_name
            )
        return select_columns(rows, table.select(self.feature_type)[0])


def read_tenx_features(file: h5py.File) -> FeatureTable:
    """The feature table of a 10x file.

    Raises:
        DataError: its columns differ in length.
    """
    names = ("id", "name", "feature_type")
    columns = [
        open_part(file, f"matrix/features/{name}").asstr("utf-8")[:].tolist() for name in names
    ]
    if len({len(column) for column in columns}) > 1:
        got = list_names(
            f"{len(column)} of {name}" for name, column in zip(names, columns, strict=True)
        )
        raise DataError(
            "the columns of the features differ in length", where=file.filename, got=got, fix=ANEW
        )
    return FeatureTable(*columns)
