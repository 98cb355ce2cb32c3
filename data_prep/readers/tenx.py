"""10x HDF5 files, and the table of features that 10x folders have too."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from clue_dist.errors import DataError, list_names
from clue_dist.store.unique_names import make_names_unique
from data_prep.options import InputArgument, ReadingOptions
from data_prep.readers.file_parts import FilePart, list_type_parts
from data_prep.readers.h5_file import (
    WRITE_ANEW,
    has_hdf5,
    has_part,
    open_h5,
    open_part,
)
from data_prep.readers.h5_frame import TextColumn
from data_prep.readers.h5_matrix import read_csr_slice, require_whole_matrix
from data_prep.readers.source import (
    DirectSource,
    SourceHead,
    SourceRows,
    identify_file,
    select_columns,
)

_MATRIX = "matrix"  # the group of a file of Cell Ranger 3 or later
# What Cell Ranger 2 writes into the group of a genome.
_OLD_PARTS = {"data", "indices", "indptr", "shape", "barcodes", "genes", "gene_names"}
# What scanpy and Cell Ranger call the two columns of a feature table.
TENX_COLUMNS = {
    "gene_ids": "id",
    "gene_id": "id",
    "id": "id",
    "gene_symbols": "name",
    "gene_name": "name",
    "name": "name",
}


def is_tenx(path: Path) -> bool:
    """Whether a file is a 10x HDF5 file, of Cell Ranger 2 (a group for each genome) or later."""
    if has_part(path, f"{_MATRIX}/features"):
        return True
    return has_hdf5(path) and bool(_list_genomes(path))


def list_tenx_parts(path: Path) -> list[FilePart]:
    """A part for each feature type of a 10x file; of Cell Ranger 2, for each genome."""
    if genomes := _list_genomes(path):
        is_only = len(genomes) == 1
        modality = "rna" if is_only else None
        return [FilePart(genome, modality, is_whole=is_only) for genome in genomes]
    with open_h5(path) as file:
        return list_type_parts(read_tenx_features(file, _MATRIX).types)


def _list_genomes(path: Path) -> list[str]:
    """The groups of a file that Cell Ranger 2 writes, and tools that write as it does."""
    with open_h5(path) as file:
        groups = {name: file[name] for name in file if file.get(name, getclass=True) is h5py.Group}
        return [name for name, group in groups.items() if set(group) >= _OLD_PARTS]


def open_tenx(
    argument: InputArgument, modality: str, part: FilePart, options: ReadingOptions
) -> TenxSource:
    """The source of one part of a 10x file, as a modality."""
    is_old = bool(_list_genomes(argument.local_path))
    return TenxSource(
        argument.local_path,
        modality,
        argument.dataset,
        None if part.is_whole or is_old else part.key,
        options.id_columns.get_value(modality),
        part.key if is_old else _MATRIX,
    )


@dataclass(frozen=True)
class FeatureTable:
    """The features of a 10x file, which may mix modalities. All lists are (features,)."""

    ids: list[str]
    names: list[str]
    types: list[str]

    def select_features(
        self, feature_type: str | None, id_columns: str | None = None
    ) -> tuple[np.ndarray, list[str], str | None]:
        """The features of one type.

        Args:
            feature_type: their type; None for all features.
            id_columns: columns to name them by, comma between; the first that a 10x file has is
                taken, and the column of names where there is none.

        Returns:
            The columns of the matrix, (n,); the features' names, where a name that repeats gives
            way to its id; the column that was asked for and gave the names, or None.
        """
        wanted = [i for i, t in enumerate(self.types) if feature_type in (None, t)]
        column = next((c for c in (id_columns or "").split(",") if c in TENX_COLUMNS), None)
        texts = self.ids if column and TENX_COLUMNS[column] == "id" else self.names
        names = make_names_unique([texts[i] for i in wanted], [self.ids[i] for i in wanted])
        return np.array(wanted, np.int64), names, column


@dataclass(frozen=True)
class TenxSource(DirectSource):
    """One feature type of a 10x .h5, whose CSC of features x cells is a CSR of cells x features."""

    path: Path
    modality: str
    dataset: str = ""
    feature_type: str | None = None  # None: the file holds one type
    id_columns: str | None = None
    group: str = "matrix"  # where the matrix lies; of Cell Ranger 2, the genome

    @property
    def display_name(self) -> str:
        genome = None if self.group == _MATRIX else self.group
        return "/".join(part for part in (self.path.name, genome, self.feature_type) if part)

    def describe_identity(self) -> dict[str, Any]:
        return identify_file(self.path) | {
            "feature_type": self.feature_type,
            "modality": self.modality,
            "dataset": self.dataset,
            "ids": self.id_columns,
            **({} if self.group == _MATRIX else {"genome": self.group}),
        }

    def read_head(self) -> SourceHead:
        with open_h5(self.path) as file:
            table = read_tenx_features(file, self.group)
            matrix = open_part(file, self.group)
            # Millions of barcodes stay in the file until they are needed.
            barcodes = TextColumn.open_dataset(open_part(matrix, "barcodes"))
            nnz = int(open_part(matrix, "data").shape[0])
            shape = tuple(open_part(matrix, "shape")[:].tolist())
            expected = (len(table.ids), len(barcodes))
            if shape != expected:
                raise DataError(
                    "the matrix does not fit its features and barcodes",
                    where=self.display_name,
                    got=shape,
                    expected=expected,
                )
            require_whole_matrix(matrix, len(barcodes))
        wanted, names, name_column = table.select_features(self.feature_type, self.id_columns)
        # How the entries are spread over types is not known before they are read.
        share = nnz * len(wanted) // max(len(table.ids), 1)
        return SourceHead(barcodes, names, share, {}, [], list(TENX_COLUMNS), name_column)

    def read_rows(self, start: int, stop: int, scratch: Path) -> SourceRows:
        with open_h5(self.path) as file:
            table = read_tenx_features(file, self.group)
            matrix = open_part(file, self.group)
            rows = read_csr_slice(matrix, start, stop, len(table.ids), self.display_name)
        return select_columns(rows, table.select_features(self.feature_type)[0])


def read_tenx_features(file: h5py.File, group: str) -> FeatureTable:
    """The feature table of a 10x file.

    Args:
        file: the file.
        group: where the matrix lies; Cell Ranger 2 knew genes alone, beside the matrix.

    Raises:
        DataError: its columns differ in length.
    """
    names = [f"features/{name}" for name in ("id", "name", "feature_type")]
    if group != _MATRIX:
        names = ["genes", "gene_names"]
    parts = [open_part(file, f"{group}/{name}") for name in names]
    columns = [part.asstr("utf-8")[:].tolist() for part in parts]
    if len({len(column) for column in columns}) > 1:
        sizes = [f"{len(column)} of {name}" for name, column in zip(names, columns, strict=True)]
        what = "the columns of the features differ in length"
        raise DataError(what, where=file.filename, got=list_names(sizes), fix=WRITE_ANEW)
    if len(columns) == 2:
        columns.append(["Gene Expression"] * len(columns[0]))
    return FeatureTable(*columns)
