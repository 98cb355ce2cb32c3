"""AnnData files (.h5ad, .zarr), read slice by slice."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from clue_dist.errors import DataError, list_names
from clue_dist.kinds import TYPE_COLUMNS, match_alias
from clue_dist.store.location import Location
from clue_dist.store.unique_names import make_names_unique
from data_prep.options import InputArgument, ObsColumns, ReadingOptions
from data_prep.readers import sorted_entries
from data_prep.readers.file_parts import FilePart, list_type_parts
from data_prep.readers.fragments import ConversionInput, open_fragments
from data_prep.readers.h5_cells import read_cells
from data_prep.readers.h5_file import (
    WRITE_ANEW,
    has_part,
    is_array,
    is_group,
    open_container,
    open_part,
)
from data_prep.readers.h5_frame import list_columns, read_index, read_values
from data_prep.readers.h5_matrix import (
    MISFIT,
    looks_like_counts,
    read_csr_slice,
    read_matrix_format,
    read_matrix_shape,
    require_inside_matrix,
    require_whole_matrix,
)
from data_prep.readers.h5_obsm import ObsmSource, list_obsm_parts
from data_prep.readers.snapatac import FRAGMENT_KEYS, find_fragments_key
from data_prep.readers.source import (
    SourceHead,
    SourceRows,
    identify_file,
    require_real_numbers,
)


def is_h5ad(path: Location) -> bool:
    """Whether a file is an AnnData; a MuData may have an X of its own, too."""
    # Loom files have layers, too, but no obs; the fragments of SnapATAC2 have no var.
    is_anndata = has_part(path, "X") or (
        has_part(path, "obs") and has_part(path, "var", "layers", "obsm")
    )
    return is_anndata and not has_part(path, "mod")


def list_h5ad_parts(path: Location) -> list[FilePart]:
    """The matrix of an AnnData, or a part of it for each type of features, and tables of obsm.

    Raises:
        DataError: the file holds nothing of the kind.
    """
    with open_container(path) as file:
        tables = list_obsm_parts(file)
        if not has_matrix(file) and not list_layers(file):
            return _list_parts_beside(file, tables, path)
        choices = tuple(list_choices(file))
        types = _read_feature_types(file, "var")
        parts = list_type_parts(types) if types else [FilePart("", is_whole=True)]
        return [replace(part, layers=choices) for part in parts] + tables


def _list_parts_beside(root: Any, tables: list[FilePart], path: Location) -> list[FilePart]:
    """The parts of an AnnData without X and layers: the fragments of SnapATAC2, tables of obsm."""
    if key := find_fragments_key(root):
        others = [table for table in tables if table.key != key]
        return [FilePart(key, suggestion="atac", is_whole=True), *others]
    if counts := [table for table in tables if table.holds_counts]:
        is_only = len(counts) == 1
        usual = [replace(table, on_request=False, is_whole=is_only) for table in counts]
        return usual + [table for table in tables if not table.holds_counts]
    raise DataError(
        "the file holds no matrix of cells x features",
        where=path,
        got=f"no X, layers or raw; obsm: {list_names(root.get('obsm', {})) or 'nothing'}",
        fix="write the file again with its counts in X; of SnapATAC2, `snap.pp.add_tile_matrix` "
        "makes a matrix, and `snap.ex.export_fragments` writes fragments, which are read, too",
    )


def open_h5ad(
    argument: InputArgument, modality: str, part: FilePart, options: ReadingOptions
) -> ConversionInput:
    """The input that one part of an AnnData is, as a modality."""
    if part.key in FRAGMENT_KEYS:
        return open_fragments(argument, modality, part, options)
    if part.key.startswith("obsm/"):
        columns = options.obs_columns.select_modality(modality)
        return ObsmSource(argument.path, modality, argument.dataset, part.key, columns)
    return AnnDataSource(
        argument.path,
        modality,
        argument.dataset,
        "",
        choose_layer(argument.path, "", options.layers.get_value(modality)),
        options.obs_columns.select_modality(modality),
        options.id_columns.get_value(modality),
        None if part.is_whole else part.key,
    )


def has_matrix(root: Any) -> bool:
    """Whether an AnnData has an X; newer versions write down that it has none."""
    return "X" in root and root["X"].attrs.get("encoding-type") != "null"


def list_layers(root: Any) -> dict[str, str]:
    """Where the matrices beside X lie, by what `--layer` calls them."""
    layers, raw = root.get("layers"), root.get("raw")
    paths = {str(name): f"layers/{name}" for name in (layers if is_group(layers) else ())}
    return paths | ({"raw.X": "raw/X"} if is_group(raw) and "X" in raw else {})


def list_choices(root: Any) -> list[str]:
    """The layers of which one must be named, as there is no X; first those that hold counts."""
    paths = {} if has_matrix(root) else list_layers(root)
    if len(paths) < 2:
        return []
    return sorted(paths, key=lambda name: not looks_like_counts(open_part(root, paths[name])))


def choose_layer(path: Location, group: str, wanted: str | None) -> str | None:
    """Choose the layer that is read: the wanted one, else the only matrix there is; None: X."""
    if wanted is not None:
        return wanted
    with open_container(path) as file:
        root = open_part(file, group) if group else file
        layers = [] if has_matrix(root) else [*list_layers(root)]
    return layers[0] if len(layers) == 1 else None


def _read_feature_types(root: Any, var: str) -> list[str]:
    """What each feature is, by a column of var, where its types name kinds; else nothing."""
    frame = root.get(var)
    for column in TYPE_COLUMNS if is_group(frame) else ():
        if column in frame:
            values = read_values(frame, column)
            types: list[str] = values.where(values.notna(), "").astype(str).tolist()
            if any(match_alias(name) for name in set(types)):
                return types
    return []


@dataclass(frozen=True)
class AnnDataSource:
    """One AnnData: a whole .h5ad, or a modality of a .h5mu."""

    path: Location
    modality: str
    dataset: str = ""
    group: str = ""  # where it lies in the file: `mod/rna` in a .h5mu
    layer: str | None = None  # None: X
    obs_columns: ObsColumns = field(default_factory=ObsColumns)
    id_columns: str | None = None
    feature_type: str | None = None  # None: every feature

    @property
    def display_name(self) -> str:
        parts = (self.path.name, self.group, self.feature_type)
        return "/".join(part for part in parts if part)

    @property
    def matrix(self) -> str:
        """Where the matrix lies in the file: `X`, `mod/rna/layers/counts`."""
        name = {None: "X", "raw.X": "raw/X"}.get(self.layer, f"layers/{self.layer}")
        return f"{self.group}/{name}".lstrip("/")

    def describe_identity(self) -> dict[str, Any]:
        identity = {
            "matrix": self.matrix,
            "modality": self.modality,
            "dataset": self.dataset,
            "ids": self.id_columns,
        }
        # A conversion that was begun before there were types goes on.
        types = {"feature_type": self.feature_type} if self.feature_type is not None else {}
        return identify_file(self.path) | identity | types

    def read_head(self) -> SourceHead:
        with open_container(self.path) as file:
            root, matrix, var = self._open_root(file), self._open_matrix(file), self._var
            cells = read_cells(file, self.group, self.modality, self.obs_columns, self.display_name)
            features = read_index(root, var, self.display_name)
            self._require_fitting_matrix(matrix, len(cells.barcodes), len(features))
            # A dense matrix is read whole, so zeros count for the size of tasks as well.
            is_dense = is_array(matrix)
            nnz = int(matrix.size if is_dense else matrix["data"].shape[0])
            name_column, names = self._choose_feature_names(root[var], features)
            var_columns = list_columns(root[var])
            wanted = self._find_wanted(root)
        if wanted is not None:
            # How the entries are spread over types is not known before they are read.
            nnz = nnz * len(wanted) // max(len(names), 1)
            names = [names[i] for i in wanted]
        return SourceHead(
            cells.barcodes,
            names,
            nnz,
            cells.fields,
            cells.columns,
            var_columns,
            name_column,
            cells.kept,
        )

    def count_parts(self) -> int:
        """A CSC matrix is sorted part by part; the other forms have rows that can be read."""
        with open_container(self.path) as file:
            matrix = self._open_matrix(file)
            if read_matrix_format(matrix) != "csc_matrix":
                return 0
            return -(-int(matrix["data"].shape[0]) // sorted_entries.PART_ENTRIES)

    def prepare_part(self, part: int, scratch: Path) -> None:
        """Sort one run of a CSC matrix's entries by row."""
        start = part * sorted_entries.PART_ENTRIES
        with open_container(self.path) as file:
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
        rows = self._read_all_columns(start, stop, scratch)
        if self.feature_type is None:
            return rows
        with open_container(self.path) as file:
            wanted = self._find_wanted(self._open_root(file))
        return rows[:, wanted]

    def _read_all_columns(self, start: int, stop: int, scratch: Path) -> SourceRows:
        with open_container(self.path) as file:
            matrix = self._open_matrix(file)
            n_columns = read_matrix_shape(matrix)[1]
            if read_matrix_format(matrix) == "array":
                return require_real_numbers(np.asarray(matrix[start:stop]), self.display_name)
            if read_matrix_format(matrix) == "csr_matrix":
                return read_csr_slice(matrix, start, stop, n_columns, self.display_name)
        # Of a CSC matrix, `prepare_part` has sorted the entries by row.
        return sorted_entries.read_sorted_rows(scratch, start, stop, n_columns)

    def list_other_counts(self) -> list[str]:
        with open_container(self.path) as file:
            root = self._open_root(file)
            return [
                name
                for name, path in list_layers(root).items()
                if name != self.layer and looks_like_counts(open_part(root, path))
            ]

    def probe_counts(self) -> bool:
        with open_container(self.path) as file:
            return looks_like_counts(self._open_matrix(file))

    @property
    def _var(self) -> str:
        # raw has a var of its own, as it may hold more features than X.
        return "raw/var" if self.layer == "raw.X" else "var"

    def _find_wanted(self, root: Any) -> np.ndarray | None:
        """The columns of the type that is wanted, (n,); None: every column."""
        if self.feature_type is None:
            return None
        return np.flatnonzero(np.array(_read_feature_types(root, self._var)) == self.feature_type)

    def _open_root(self, file: Any) -> Any:
        return open_part(file, self.group) if self.group else file

    def _open_matrix(self, file: Any) -> Any:
        root = file[self.group] if self.group else file
        if self.matrix not in file or (self.layer is None and not has_matrix(root)):
            layers = list_choices(root) or [*list_layers(root)]
            fix = "write the file again with its counts in X"
            if layers:
                fix = (
                    "name one of them with `--layer`, or "
                    f"`--layer {self.modality}={layers[0]}` for this modality alone"
                )
            raise DataError(
                "the file has no such matrix",
                where=f"{self.display_name}: {self.matrix}",
                got=f"layers: {list_names(layers) or 'none'}",
                fix="leave `--layer` out" if self.layer and not layers else fix,
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

    def _choose_feature_names(self, var: Any, var_names: list[str]) -> tuple[str | None, list[str]]:
        """The first of `id_columns` that var has, and the names in it; else None and var_names."""
        for column in (self.id_columns or "").split(","):
            if column and column in var:
                values = read_values(var, column)
                # An unknown name becomes empty, and so gives way to the name in var_names.
                names = values.where(values.notna(), "").astype(str).tolist()
                return column, make_names_unique(names, var_names)
        return None, var_names
