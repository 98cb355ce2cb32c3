"""AnnData files (.h5ad), read slice by slice."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pandas as pd

from clue_dist.errors import DataError, list_names
from data_prep.options import InputArgument, ObsColumns, ReadingOptions
from data_prep.readers import sorted_entries
from data_prep.readers.h5_file import WRITE_ANEW, has_part, open_h5, open_part
from data_prep.readers.h5_frame import (
    has_obs,
    list_columns,
    read_codes,
    read_index,
    read_names,
    read_values,
)
from data_prep.readers.h5_matrix import (
    MISFIT,
    looks_like_counts,
    read_csr_slice,
    read_matrix_format,
    read_matrix_shape,
    require_inside_matrix,
    require_whole_matrix,
)
from data_prep.readers.source import (
    CategoryCodes,
    SlicedArray,
    SourceHead,
    SourceRows,
    encode_barcodes,
    identify_file,
    make_names_unique,
    require_real_numbers,
)


def is_h5ad(path: Path) -> bool:
    """Whether a file is an AnnData; a MuData may have an X of its own, too."""
    return has_part(path, "X", "layers") and not has_part(path, "mod")


def open_h5ad(argument: InputArgument, options: ReadingOptions) -> list[AnnDataSource]:
    """The one source of an AnnData, as the modality that a person names.

    Raises:
        DataError: no modality is named.
    """
    modality = argument.modality
    if modality is None:
        raise DataError(
            "an .h5ad needs a modality's name",
            where=argument.text,
            fix=f"write it as `rna={argument.path.name}`, say",
        )
    return [
        AnnDataSource(
            argument.path,
            modality,
            argument.dataset,
            "",
            options.layers.get_value(modality),
            options.obs_columns,
            options.id_columns.get_value(modality),
        )
    ]


@dataclass(frozen=True)
class AnnDataSource:
    """One AnnData: a whole .h5ad, or a modality of a .h5mu."""

    path: Path
    modality: str
    dataset: str = ""
    group: str = ""  # where it lies in the file: `mod/rna` in a .h5mu
    layer: str | None = None  # None: X
    obs_columns: ObsColumns = field(default_factory=ObsColumns)
    id_columns: str | None = None

    @property
    def display_name(self) -> str:
        return f"{self.path.name}/{self.group}" if self.group else self.path.name

    @property
    def matrix(self) -> str:
        """Where the matrix lies in the file: `X`, `mod/rna/layers/counts`."""
        name = {None: "X", "raw.X": "raw/X"}.get(self.layer, f"layers/{self.layer}")
        return f"{self.group}/{name}".lstrip("/")

    def describe_identity(self) -> dict[str, Any]:
        return identify_file(self.path) | {
            "matrix": self.matrix,
            "modality": self.modality,
            "dataset": self.dataset,
            "ids": self.id_columns,
        }

    def read_head(self) -> SourceHead:
        with open_h5(self.path) as file:
            root, matrix = self._open_root(file), self._open_matrix(file)
            # raw has a var of its own, as it may hold more features than X.
            var = "raw/var" if self.layer == "raw.X" else "var"
            barcodes = read_names(root, "obs", self.display_name)
            features = read_index(root, var, self.display_name)
            self._require_fitting_matrix(matrix, len(barcodes), len(features))
            codes = {
                field: self._read_field(file, column, barcodes)
                for field, column in self.obs_columns.by_field.items()
            }
            obs_columns = list_columns(root["obs"])
            if self.group and has_obs(file):  # `_read_field` looks there, too
                obs_columns += list_columns(file["obs"])
            # A dense matrix is read whole, so zeros count for the size of tasks as well.
            is_dense = isinstance(matrix, h5py.Dataset)
            nnz = int(matrix.size if is_dense else matrix["data"].shape[0])
            name_column, names = self._choose_feature_names(root[var], features)
            var_columns = list_columns(root[var])
        fields = {field: column for field, column in codes.items() if column is not None}
        return SourceHead(barcodes, names, nnz, fields, obs_columns, var_columns, name_column)

    def count_parts(self) -> int:
        """A CSC matrix is sorted part by part; the other forms have rows that can be read."""
        with open_h5(self.path) as file:
            matrix = self._open_matrix(file)
            if read_matrix_format(matrix) != "csc_matrix":
                return 0
            return -(-int(matrix["data"].shape[0]) // sorted_entries.PART_ENTRIES)

    def prepare_part(self, part: int, scratch: Path) -> None:
        """Sort one run of a CSC matrix's entries by row."""
        start = part * sorted_entries.PART_ENTRIES
        with open_h5(self.path) as file:
            matrix = self._open_matrix(file)
            n_rows, n_columns = read_matrix_shape(matrix)
            require_whole_matrix(matrix, n_columns)
            rows, values = (
                open_part(matrix, name)[start : start + sorted_entries.PART_ENTRIES]
                for name in ("indices", "data")
            )
            stop = start + len(rows)
            indptr = open_part(matrix, "indptr")[:].astype(np.int64)
            where = f"{self.display_name}, entries {start} to {stop - 1}"
            if (np.diff(indptr) < 0).any():
                raise DataError(MISFIT, where=where, fix=WRITE_ANEW)
            require_inside_matrix(rows, n_rows, "cells", where)
            # Entry k is of the column in whose range, indptr[c] to indptr[c + 1], k lies.
            columns = np.searchsorted(indptr, np.arange(start, stop), side="right") - 1
            values = require_real_numbers(values, where)
        folder = scratch / f"{part:06d}"
        sorted_entries.write_sorted_part(folder, rows.astype(np.int64), columns, values)

    def read_rows(self, start: int, stop: int, scratch: Path) -> SourceRows:
        with open_h5(self.path) as file:
            matrix = self._open_matrix(file)
            n_columns = read_matrix_shape(matrix)[1]
            if read_matrix_format(matrix) == "array":
                return require_real_numbers(np.asarray(matrix[start:stop]), self.display_name)
            if read_matrix_format(matrix) == "csr_matrix":
                return read_csr_slice(matrix, start, stop, n_columns, self.display_name)
        # Of a CSC matrix, `prepare_part` has sorted the entries by row.
        return sorted_entries.read_sorted_rows(scratch, start, stop, n_columns)

    def list_other_counts(self) -> list[str]:
        with open_h5(self.path) as file:
            root = self._open_root(file)
            paths = {f"layers/{name}": name for name in root.get("layers", {})}
            if "raw" in root and "X" in root["raw"]:
                paths["raw/X"] = "raw.X"
            return [
                str(name)
                for path, name in paths.items()
                if f"{self.group}/{path}".lstrip("/") != self.matrix
                and looks_like_counts(open_part(root, path))
            ]

    def _open_root(self, file: h5py.File) -> Any:
        return open_part(file, self.group) if self.group else file

    def _open_matrix(self, file: h5py.File) -> Any:
        if self.matrix not in file:
            root = file[self.group] if self.group else file
            layers = [*root.get("layers", {}), *(["raw.X"] if "raw" in root else [])]
            raise DataError(
                "the file has no such matrix",
                where=f"{self.display_name}: {self.matrix}",
                got=f"layers: {list_names(layers) or 'none'}",
                fix="name one of them with `--layer`, or "
                f"`--layer {self.modality}=NAME` for this modality alone",
            )
        return open_part(file, self.matrix)

    def _require_fitting_matrix(self, matrix: Any, n_cells: int, n_features: int) -> None:
        shape, form = read_matrix_shape(matrix), read_matrix_format(matrix)
        if shape != (n_cells, n_features):
            raise DataError(
                "matrix, obs and var do not fit together",
                where=f"{self.display_name}: {self.matrix}",
                got=f"{shape} for {n_cells} cells and {n_features} features",
            )
        if form != "array":
            require_whole_matrix(matrix, n_cells if form == "csr_matrix" else n_features)

    def _choose_feature_names(
        self, var: h5py.Group, var_names: list[str]
    ) -> tuple[str | None, list[str]]:
        """The first of `id_columns` that var has, and the names in it; else None and var_names."""
        for column in (self.id_columns or "").split(","):
            if column and column in var:
                values = read_values(var, column)
                # An unknown name becomes empty, and so gives way to the name in var_names.
                names = values.where(values.notna(), "").astype(str).tolist()
                return column, make_names_unique(names, var_names)
        return None, var_names

    def _read_field(
        self, file: h5py.File, column: str, barcodes: SlicedArray
    ) -> CategoryCodes | None:
        """A column of the modality's obs, else of the obs that the modalities of a MuData share.

        MuData's column is called as it is asked for, or has the modality before it, `rna:batch`.
        """
        root = file[self.group] if self.group else file
        if column in root["obs"]:
            return read_codes(root["obs"], column, len(barcodes))
        if not self.group or not has_obs(file):
            return None
        for name in (column, f"{self.modality}:{column}"):
            if name in file["obs"]:
                index = read_index(file, "obs", self.display_name)
                shared = pd.Index(encode_barcodes(index, self.display_name))
                # The shared obs lists the cells of all modalities; a cell that is not there has
                # index -1, and so an unknown code.
                codes = read_codes(file["obs"], name, len(shared))
                return codes.take_rows(shared.get_indexer(pd.Index(barcodes[:])))
        return None
