"""Matrices in HDF5: AnnData (.h5ad), MuData (.h5mu) and 10x (.h5), read slice by slice."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pandas as pd

from clue_dist.errors import DataError, list_names
from data_prep.options import ObsColumns
from data_prep.readers import sorted_entries
from data_prep.readers.h5_file import ANEW, open_h5, open_part
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
    read_format,
    read_shape,
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


@dataclass(frozen=True)
class AnnDataSource:
    """One AnnData: a whole .h5ad (`group` "") or a modality of a .h5mu (`group` "mod/rna")."""

    path: Path
    modality: str
    dataset: str = ""
    group: str = ""
    layer: str | None = None  # None: X
    keys: ObsColumns = field(default_factory=ObsColumns)
    id_columns: str | None = None

    @property
    def display_name(self) -> str:
        return f"{self.path.name}/{self.group}" if self.group else self.path.name

    @property
    def matrix(self) -> str:
        inside = {None: "X", "raw.X": "raw/X"}.get(self.layer, f"layers/{self.layer}")
        return f"{self.group}/{inside}".lstrip("/")

    def describe_identity(self) -> dict[str, Any]:
        kept = {
            "matrix": self.matrix,
            "modality": self.modality,
            "dataset": self.dataset,
            "ids": self.id_columns,
        }
        return identify_file(self.path) | kept

    def read_head(self) -> SourceHead:
        with open_h5(self.path) as file:
            root = open_part(file, self.group) if self.group else file
            matrix = self._matrix(file)
            var = "raw/var" if self.layer == "raw.X" else "var"
            barcodes, features = (
                read_names(root, "obs", self.display_name),
                read_index(root, var, self.display_name),
            )
            if read_shape(matrix) != (len(barcodes), len(features)):
                got = f"{read_shape(matrix)} for {len(barcodes)} cells and {len(features)} features"
                raise DataError(
                    "matrix, obs and var do not fit together",
                    where=f"{self.display_name}: {self.matrix}",
                    got=got,
                )
            if read_format(matrix) != "array":
                require_whole_matrix(
                    matrix, len(barcodes) if read_format(matrix) == "csr_matrix" else len(features)
                )
            fields = {
                f: c
                for f, key in self.keys.by_field.items()
                if (c := self._codes(file, key, barcodes)) is not None
            }
            columns = list_columns(root["obs"]) + (
                list_columns(file["obs"]) if self.group and has_obs(file) else []
            )
            nnz = int(matrix.size if isinstance(matrix, h5py.Dataset) else matrix["data"].shape[0])
            named_by, names = self._names(root[var], features)
            var_columns = list_columns(root[var])
        return SourceHead(barcodes, names, nnz, fields, columns, var_columns, named_by)

    def count_parts(self) -> int:
        with open_h5(self.path) as file:
            matrix = self._matrix(file)
            if read_format(matrix) != "csc_matrix":
                return 0
            return -(-int(matrix["data"].shape[0]) // sorted_entries.PART_ENTRIES)

    def prepare_part(self, part: int, scratch: Path) -> None:
        """Sort one run of a CSC matrix's entries by row."""
        lo = part * sorted_entries.PART_ENTRIES
        with open_h5(self.path) as file:
            matrix = self._matrix(file)
            n_rows, _ = read_shape(matrix)
            require_whole_matrix(matrix, read_shape(matrix)[1])
            rows, values = (
                open_part(matrix, name)[lo : lo + sorted_entries.PART_ENTRIES]
                for name in ("indices", "data")
            )
            indptr = open_part(matrix, "indptr")[:].astype(np.int64)
            where = f"{self.display_name}, entries {lo} to {lo + len(rows) - 1}"
            if (np.diff(indptr) < 0).any():
                raise DataError(MISFIT, where=where, fix=ANEW)
            require_inside_matrix(rows, n_rows, "cells", where)
            columns = np.searchsorted(indptr, np.arange(lo, lo + len(rows)), side="right") - 1
            values = require_real_numbers(values, where)
        sorted_entries.write_sorted_part(
            scratch / f"{part:06d}", rows.astype(np.int64), columns, values
        )

    def read_rows(self, start: int, stop: int, scratch: Path) -> SourceRows:
        with open_h5(self.path) as file:
            matrix = self._matrix(file)
            n_columns = read_shape(matrix)[1]
            if read_format(matrix) == "array":
                return require_real_numbers(np.asarray(matrix[start:stop]), self.display_name)
            if read_format(matrix) == "csr_matrix":
                return read_csr_slice(matrix, start, stop, n_columns, self.display_name)
        return sorted_entries.read_sorted_rows(
            sorted(scratch.glob("[0-9]" * 6)), start, stop, n_columns
        )

    def list_other_counts(self) -> list[str]:
        with open_h5(self.path) as file:
            root = open_part(file, self.group) if self.group else file
            names = [f"layers/{name}" for name in root.get("layers", {})] + ["raw/X"] * (
                "raw" in root and "X" in root["raw"]
            )
            fitting = [
                n
                for n in names
                if f"{self.group}/{n}".lstrip("/") != self.matrix
                and looks_like_counts(open_part(root, n))
            ]
        return ["raw.X" if name == "raw/X" else name.removeprefix("layers/") for name in fitting]

    def _matrix(self, file: h5py.File) -> Any:
        if self.matrix not in file:
            root = file[self.group] if self.group else file
            there = [*root.get("layers", {}), *(["raw.X"] if "raw" in root else [])]
            raise DataError(
                "the file has no such matrix",
                where=f"{self.display_name}: {self.matrix}",
                got=f"layers: {list_names(there) or 'none'}",
                fix=f"name one of them with `--layer`, or `--layer {self.modality}=NAME` for this modality alone",
            )
        return open_part(file, self.matrix)

    def _names(self, var: h5py.Group, own: list[str]) -> tuple[str | None, list[str]]:
        """The features' names, of the first column of `ids` there is, and that column; else their own."""
        for column in (self.id_columns or "").split(","):
            if column and column in var:
                values = read_values(var, column)
                return column, make_names_unique(
                    values.where(values.notna(), "").astype(str).tolist(), own
                )
        return None, own

    def _codes(self, file: h5py.File, key: str, barcodes: SlicedArray) -> CategoryCodes | None:
        """A column of the modality's own obs, else of MuData's: `key` or `modality:key`."""
        root = file[self.group] if self.group else file
        if key in root["obs"]:
            return read_codes(root["obs"], key, len(barcodes))
        if not self.group or not has_obs(file):
            return None
        for name in (key, f"{self.modality}:{key}"):
            if name in file["obs"]:
                shared = pd.Index(
                    encode_barcodes(read_index(file, "obs", self.display_name), self.display_name)
                )
                codes = read_codes(file["obs"], name, len(shared))
                return codes.take_rows(shared.get_indexer(pd.Index(barcodes[:])))
        return None
