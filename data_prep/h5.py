"""Matrices in HDF5: AnnData (.h5ad), MuData (.h5mu) and 10x (.h5), read slice by slice."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pandas as pd
import scipy.sparse as sp
from anndata.io import read_elem

from clue_dist.errors import ClueError, DataError, listed
from data_prep import entries
from data_prep.sources import (
    TENX_COLUMNS,
    Codes,
    Direct,
    FeatureTable,
    Head,
    Keys,
    Rows,
    Sliced,
    as_bytes,
    columns_of,
    file_identity,
    real_numbers,
    unrepeated,
)

_SLICE = 2**20  # rows of a column that are looked at together
_MOST = 1000  # values of a dataset for each byte of its file: compressed zeros come to less
_PROBE = 10_000  # values looked at to guess whether a matrix holds counts
_ANEW = "write the file again, from what it was made of"


@contextmanager
def open_h5(path: Path) -> Iterator[h5py.File]:
    """Open for reading; what HDF5 cannot read becomes a DataError."""
    try:
        file = h5py.File(path, "r")
    except OSError as error:
        raise DataError(
            "not a readable HDF5 file", where=path, got=str(error), fix="check that the file is complete"
        ) from None
    with file:
        try:
            yield file
        except ClueError:
            raise
        except Exception as error:  # of h5py and anndata, which have no kind of error in common
            got = f"{type(error).__name__}: {error}"[:500]
            raise DataError("part of the file is missing or damaged", where=path, got=got, fix=_ANEW) from error


def part_of(parent: Any, name: str) -> Any:
    """A part of a file, which lies in it and is of a size that it can be.

    Raises:
        DataError: it lies in another file; it says that it holds absurdly many values.
        KeyError: there is none.
    """
    part, path = parent[name], parent.file.filename
    if part.file.filename != path:
        raise DataError("part of the file lies in another file", where=f"{path}: {name}", fix=_ANEW)
    if not isinstance(part, h5py.Dataset):
        return part
    if part.external or part.is_virtual:
        raise DataError("values of the file lie in another file", where=_place(part), fix=_ANEW)
    if (part.size or 0) > _MOST * max(Path(path).stat().st_size, 2**16):
        got = f"{part.size} values in a file of {Path(path).stat().st_size} bytes"
        raise DataError("a dataset says that it holds more than its file can", where=_place(part), got=got, fix=_ANEW)
    return part


def read_part(parent: Any, name: str) -> Any:
    """A part of a file as anndata reads it, after a look at all of it; raises as `part_of`."""
    part = part_of(parent, name)
    for inner in part if isinstance(part, h5py.Group) else ():
        part_of(part, inner)
    return read_elem(part)


@dataclass(frozen=True)
class AnnDataSource:
    """One AnnData: a whole .h5ad (`group` "") or a modality of a .h5mu (`group` "mod/rna")."""

    path: Path
    modality: str
    dataset: str = ""
    group: str = ""
    layer: str | None = None  # None: X
    keys: Keys = field(default_factory=Keys)
    ids: str | None = None

    @property
    def where(self) -> str:
        return f"{self.path.name}/{self.group}" if self.group else self.path.name

    @property
    def matrix(self) -> str:
        inside = {None: "X", "raw.X": "raw/X"}.get(self.layer, f"layers/{self.layer}")
        return f"{self.group}/{inside}".lstrip("/")

    def identity(self) -> dict[str, Any]:
        kept = {"matrix": self.matrix, "modality": self.modality, "dataset": self.dataset, "ids": self.ids}
        return file_identity(self.path) | kept

    def head(self) -> Head:
        with open_h5(self.path) as file:
            root = part_of(file, self.group) if self.group else file
            matrix = self._matrix(file)
            var = "raw/var" if self.layer == "raw.X" else "var"
            barcodes, features = _names(root, "obs", self.where), _index(root, var, self.where)
            if _shape(matrix) != (len(barcodes), len(features)):
                got = f"{_shape(matrix)} for {len(barcodes)} cells and {len(features)} features"
                raise DataError(
                    "matrix, obs and var do not fit together", where=f"{self.where}: {self.matrix}", got=got
                )
            if _format(matrix) != "array":
                _require_whole(matrix, len(barcodes) if _format(matrix) == "csr_matrix" else len(features))
            fields = {
                f: c for f, key in self.keys.columns.items() if (c := self._codes(file, key, barcodes)) is not None
            }
            columns = _columns(root["obs"]) + (_columns(file["obs"]) if self.group and _is_frame(file) else [])
            nnz = int(matrix.size if isinstance(matrix, h5py.Dataset) else matrix["data"].shape[0])
            named_by, names = self._names(root[var], features)
            var_columns = _columns(root[var])
        return Head(barcodes, names, nnz, fields, columns, var_columns, named_by)

    def parts(self) -> int:
        with open_h5(self.path) as file:
            matrix = self._matrix(file)
            if _format(matrix) != "csc_matrix":
                return 0
            return -(-int(matrix["data"].shape[0]) // entries.PART_ENTRIES)

    def prepare(self, part: int, scratch: Path) -> None:
        """Sort one run of a CSC matrix's entries by row."""
        lo = part * entries.PART_ENTRIES
        with open_h5(self.path) as file:
            matrix = self._matrix(file)
            n_rows, _ = _shape(matrix)
            _require_whole(matrix, _shape(matrix)[1])
            rows, values = (part_of(matrix, name)[lo : lo + entries.PART_ENTRIES] for name in ("indices", "data"))
            indptr = part_of(matrix, "indptr")[:].astype(np.int64)
            where = f"{self.where}, entries {lo} to {lo + len(rows) - 1}"
            if (np.diff(indptr) < 0).any():
                raise DataError(_MISFIT, where=where, fix=_ANEW)
            _require_inside(rows, n_rows, "cells", where)
            columns = np.searchsorted(indptr, np.arange(lo, lo + len(rows)), side="right") - 1
            values = real_numbers(values, where)
        entries.write_part(scratch / f"{part:06d}", rows.astype(np.int64), columns, values)

    def read(self, lo: int, hi: int, scratch: Path) -> Rows:
        with open_h5(self.path) as file:
            matrix = self._matrix(file)
            n_columns = _shape(matrix)[1]
            if _format(matrix) == "array":
                return real_numbers(np.asarray(matrix[lo:hi]), self.where)
            if _format(matrix) == "csr_matrix":
                return _csr_slice(matrix, lo, hi, n_columns, self.where)
        return entries.read_rows(sorted(scratch.glob("[0-9]" * 6)), lo, hi, n_columns)

    def other_counts(self) -> list[str]:
        with open_h5(self.path) as file:
            root = part_of(file, self.group) if self.group else file
            names = [f"layers/{name}" for name in root.get("layers", {})] + ["raw/X"] * (
                "raw" in root and "X" in root["raw"]
            )
            fitting = [
                n
                for n in names
                if f"{self.group}/{n}".lstrip("/") != self.matrix and _looks_like_counts(part_of(root, n))
            ]
        return ["raw.X" if name == "raw/X" else name.removeprefix("layers/") for name in fitting]

    def _matrix(self, file: h5py.File) -> Any:
        if self.matrix not in file:
            root = file[self.group] if self.group else file
            there = [*root.get("layers", {}), *(["raw.X"] if "raw" in root else [])]
            raise DataError(
                "the file has no such matrix",
                where=f"{self.where}: {self.matrix}",
                got=f"layers: {listed(there) or 'none'}",
                fix=f"name one of them with `--layer`, or `--layer {self.modality}=NAME` for this modality alone",
            )
        return part_of(file, self.matrix)

    def _names(self, var: h5py.Group, own: list[str]) -> tuple[str | None, list[str]]:
        """The features' names, of the first column of `ids` there is, and that column; else their own."""
        for column in (self.ids or "").split(","):
            if column and column in var:
                values = pd.Series(read_part(var, column), dtype=object)
                return column, unrepeated(values.where(values.notna(), "").astype(str).tolist(), own)
        return None, own

    def _codes(self, file: h5py.File, key: str, barcodes: Sliced) -> Codes | None:
        """A column of the modality's own obs, else of MuData's: `key` or `modality:key`."""
        root = file[self.group] if self.group else file
        if key in root["obs"]:
            return _codes_of(root["obs"], key, len(barcodes))
        if not self.group or not _is_frame(file):
            return None
        for name in (key, f"{self.modality}:{key}"):
            if name in file["obs"]:
                shared = pd.Index(as_bytes(_index(file, "obs", self.where), self.where))
                codes = _codes_of(file["obs"], name, len(shared))
                return codes.take(shared.get_indexer(pd.Index(barcodes[:])))
        return None


@dataclass(frozen=True)
class TenxSource(Direct):
    """One feature type of a 10x .h5 (Cell Ranger 3 and later): CSC over features x cells is CSR over cells."""

    path: Path
    modality: str
    dataset: str = ""
    feature_type: str | None = None  # None: the file holds one type
    ids: str | None = None

    @property
    def where(self) -> str:
        return f"{self.path.name}/{self.feature_type}" if self.feature_type else self.path.name

    def identity(self) -> dict[str, Any]:
        kept = {"feature_type": self.feature_type, "modality": self.modality, "dataset": self.dataset, "ids": self.ids}
        return file_identity(self.path) | kept

    def head(self) -> Head:
        with open_h5(self.path) as file:
            table = tenx_features(file)
            matrix = part_of(file, "matrix")
            barcodes, nnz = Texts.of(part_of(matrix, "barcodes")), int(part_of(matrix, "data").shape[0])
            expected = (len(table.ids), len(barcodes))
            if (got := tuple(part_of(matrix, "shape")[:].tolist())) != expected:
                raise DataError(
                    "the matrix does not fit its features and barcodes", where=self.where, got=got, expected=expected
                )
            _require_whole(matrix, len(barcodes))
        wanted, names, named_by = table.select(self.feature_type, self.ids)
        share = nnz * len(wanted) // max(len(table.ids), 1)
        return Head(barcodes, names, share, {}, [], list(TENX_COLUMNS), named_by)

    def read(self, lo: int, hi: int, scratch: Path) -> Rows:
        with open_h5(self.path) as file:
            table = tenx_features(file)
            rows = _csr_slice(part_of(file, "matrix"), lo, hi, len(table.ids), self.where)
        return columns_of(rows, table.select(self.feature_type)[0])


def tenx_features(file: h5py.File) -> FeatureTable:
    """The feature table of a 10x file.

    Raises:
        DataError: its columns differ in length.
    """
    names = ("id", "name", "feature_type")
    columns = [part_of(file, f"matrix/features/{name}").asstr("utf-8")[:].tolist() for name in names]
    if len({len(column) for column in columns}) > 1:
        got = listed(f"{len(column)} of {name}" for name, column in zip(names, columns, strict=True))
        raise DataError("the columns of the features differ in length", where=file.filename, got=got, fix=_ANEW)
    return FeatureTable(*columns)


def _stretch(dataset: h5py.Dataset, lo: int, hi: int) -> np.ndarray:
    """Values lo to hi of a dataset with one axis; straight from the file where they lie there as they are.

    HDF5 copies them twice, and lets one thread at a time do it.
    """
    lo, hi = max(lo, 0), min(hi, len(dataset))
    form = dataset.id.get_create_plist()
    plain = form.get_layout() == h5py.h5d.CHUNKED and not form.get_nfilters() and dataset.dtype.isnative
    if not plain or dataset.file.userblock_size or dataset.file.driver != "sec2":
        return dataset[lo:hi]
    out, (width,) = np.empty(max(hi - lo, 0), dataset.dtype), dataset.chunks
    with open(dataset.file.filename, "rb", buffering=0) as file:
        for first in range(lo // width * width, hi, width):
            begin, end = max(first, lo), min(first + width, hi)
            chunk = dataset.id.get_chunk_info_by_coord((first,))
            if chunk.byte_offset is None:  # never written: HDF5 knows what to give
                out[begin - lo : end - lo] = dataset[begin:end]
                continue
            file.seek(chunk.byte_offset + (begin - first) * out.itemsize)
            if file.readinto(out[begin - lo : end - lo].data) != (end - begin) * out.itemsize:
                raise OSError("the file ends within its data")
    return out


_MISFIT = "the sparse matrix is damaged: its indptr does not fit its data"


def _require_whole(matrix: Any, n: int) -> None:
    """indptr of n rows (CSR) or columns (CSC), and as many indices as values; else a DataError."""
    indptr, indices, data = (part_of(matrix, name) for name in ("indptr", "indices", "data"))
    shapes = {part.name.rpartition("/")[2]: part.shape for part in (indptr, indices, data)}
    one_axis = all(shape is not None and len(shape) == 1 for shape in shapes.values())
    if not one_axis or shapes["indptr"] != (n + 1,) or shapes["indices"] != shapes["data"]:
        raise DataError(_MISFIT, where=_place(matrix), got=shapes, expected=f"an indptr of {n + 1}", fix=_ANEW)
    if any(part.dtype.kind not in "iu" for part in (indptr, indices)):
        got = f"{indptr.dtype} and {indices.dtype}"
        raise DataError("indptr and indices are no integers", where=_place(matrix), got=got, fix=_ANEW)
    ends = int(indptr[0]), int(indptr[-1])
    if ends != (0, len(data)):
        raise DataError(_MISFIT, where=_place(matrix), got=ends, expected=(0, len(data)), fix=_ANEW)


def _require_inside(indices: np.ndarray, n: int, what: str, where: str) -> None:
    if len(indices) and not 0 <= indices.min() <= indices.max() < n:
        got, expected = f"{indices.min()} to {indices.max()}", f"0 to {n - 1}"
        raise DataError(f"the sparse matrix points outside its {what}", where=where, got=got, expected=expected)


def _csr_slice(matrix: Any, lo: int, hi: int, n_columns: int, where: str) -> sp.csr_matrix:
    """Rows of a matrix that `_require_whole` has seen."""
    indptr = part_of(matrix, "indptr")[lo : hi + 1].astype(np.int64)
    start, stop = int(indptr[0]), int(indptr[-1])
    where = f"{where}, rows {lo} to {hi - 1}"
    if start < 0 or stop > len(matrix["data"]) or (np.diff(indptr) < 0).any():
        raise DataError(_MISFIT, where=where, fix=_ANEW)
    indices, values = (_stretch(part_of(matrix, name), start, stop) for name in ("indices", "data"))
    _require_inside(indices, n_columns, "features", where)
    values = real_numbers(values, where)
    return sp.csr_matrix((values, indices, indptr - start), shape=(hi - lo, n_columns), copy=False)


def _format(matrix: Any) -> str:
    if isinstance(matrix, h5py.Dataset):
        return "array"
    name = matrix.attrs.get("encoding-type", "")
    name = name or {"csr": "csr_matrix", "csc": "csc_matrix"}.get(matrix.attrs.get("h5sparse_format", ""), "")
    if name not in ("csr_matrix", "csc_matrix"):
        raise DataError(
            "a matrix in a form this reader does not know",
            where=_place(matrix),
            got=name or "a group that says no encoding-type",
            expected="array, CSR or CSC",
            fix=_ANEW,
        )
    return str(name)


def _shape(matrix: Any) -> tuple[int, int]:
    shape = (
        matrix.shape if _format(matrix) == "array" else matrix.attrs.get("shape", matrix.attrs.get("h5sparse_shape"))
    )
    if np.shape(shape) != (2,):
        raise DataError(
            "a matrix that is not one of cells x features",
            where=_place(matrix),
            got="no shape" if shape is None else f"shape {tuple(np.ravel(shape).tolist())}",
            expected="two axes",
            fix=_ANEW,
        )
    return int(shape[0]), int(shape[1])


def _place(part: Any) -> str:
    """A part of a file, for messages."""
    return f"{Path(part.file.filename).name}: {part.name.lstrip('/')}"


@dataclass(frozen=True)
class Texts:
    """A dataset of texts, of which a slice gives (n,) UTF-8 bytes."""

    path: Path
    name: str
    n: int

    @classmethod
    def of(cls, texts: h5py.Dataset) -> Texts:
        if texts.ndim != 1 or not (h5py.check_string_dtype(texts.dtype) or texts.dtype.kind == "S"):
            raise DataError(
                "names that are no texts", where=_place(texts), got=f"{texts.dtype} {texts.shape}", fix=_ANEW
            )
        return cls(Path(texts.file.filename), texts.name, len(texts))

    def __len__(self) -> int:
        return self.n

    def __getitem__(self, rows: slice) -> np.ndarray:
        with open_h5(self.path) as file:
            return as_bytes(part_of(file, self.name)[rows], _place(file[self.name]))


@dataclass(frozen=True)
class Categories:
    """Codes of a categorical column, of which a slice gives (n,) int32. final: of each own code, -1 last."""

    path: Path
    name: str
    n: int
    final: np.ndarray

    def __len__(self) -> int:
        return self.n

    def __getitem__(self, rows: slice) -> np.ndarray:
        with open_h5(self.path) as file:
            out: np.ndarray = self.final[file[self.name][rows]]
        return out


def _codes_of(obs: h5py.Group, name: str, n: int) -> Codes:
    """A column of obs, which has n rows; a categorical one is read when it is needed, and categories that no cell has
    do not count."""
    column = part_of(obs, name)
    if column.attrs.get("encoding-type") != "categorical":
        values = read_part(obs, name)
        if len(values) != n:
            raise DataError("a column of obs does not fit its cells", where=_place(column), got=len(values), expected=n)
        return Codes.of(values)
    codes, categories = part_of(column, "codes"), np.asarray(read_part(column, "categories"))
    if codes.shape != (n,) or codes.dtype.kind not in "iu" or categories.ndim != 1:
        got = f"codes {codes.dtype} {codes.shape}, categories {categories.shape}"
        raise DataError("a column of obs does not fit its cells", where=_place(column), got=got, expected=n, fix=_ANEW)
    used = np.zeros(len(categories) + 1, bool)
    for lo in range(0, len(codes), _SLICE):
        piece = codes[lo : lo + _SLICE]
        if not -1 <= piece.min() <= piece.max() < len(categories):
            raise DataError(
                "a column of obs points outside its categories",
                where=_place(column),
                got=f"codes {piece.min()} to {piece.max()}",
                expected=f"-1 (unknown) to {len(categories) - 1}",
                fix=_ANEW,
            )
        used[piece] = True  # the last one: -1
    kept = np.flatnonzero(used[:-1])
    names, final = Codes.of(categories[kept]), np.full(len(used), -1, np.int32)
    final[kept] = names.codes[:]
    return Codes(Categories(Path(codes.file.filename), codes.name, len(codes), final), names.names)


def _names(root: Any, name: str, where: str) -> Sliced:
    """Row names of a data frame, as bytes."""
    if name in root and not isinstance(root[name], h5py.Dataset):
        frame = part_of(root, name)
        index = part_of(frame, frame.attrs["_index"])
        if isinstance(index, h5py.Dataset) and (h5py.check_string_dtype(index.dtype) or index.dtype.kind == "S"):
            return Texts.of(index)
    return as_bytes(_index(root, name, where), where)


def _index(root: Any, name: str, where: str) -> list[str]:
    """Row names of a data frame (`obs`, `var`)."""
    if name not in root or isinstance(root[name], h5py.Dataset):
        fix = "read and write it once with a current anndata"
        raise DataError(f"no {name} of a current AnnData", where=where, fix=fix)
    frame = part_of(root, name)
    values = np.asarray(read_part(frame, frame.attrs["_index"]))
    if values.ndim != 1 or values.dtype.kind not in "OUSTiufb":
        raise DataError("names that are no texts", where=_place(frame), got=f"{values.dtype} {values.shape}", fix=_ANEW)
    return [value.decode() if isinstance(value, bytes) else str(value) for value in values.tolist()]


def _is_frame(file: h5py.File) -> bool:
    """Whether a MuData has an obs of its own."""
    return "obs" in file and isinstance(file["obs"], h5py.Group)


def _columns(frame: h5py.Group) -> list[str]:
    return [str(name) for name in np.ravel(frame.attrs.get("column-order", []))]


def _looks_like_counts(matrix: Any) -> bool:
    if isinstance(matrix, h5py.Dataset):
        whole = matrix.size and matrix.ndim == 2
        values = matrix[: max(1, _PROBE // matrix.shape[1])] if whole else np.empty(0)
    else:
        values = part_of(matrix, "data")[:_PROBE]
    return bool(
        len(values) and np.isfinite(values).all() and (values >= 0).all() and (values == np.floor(values)).all()
    )
