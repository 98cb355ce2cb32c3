"""A data frame in HDF5, as anndata writes it: row names and columns, the large ones read when they are needed."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pandas as pd

from clue_dist.errors import DataError
from data_prep.readers.h5_file import ANEW, name_part, open_h5, open_part, read_part
from data_prep.readers.source import CategoryCodes, SlicedArray, encode_barcodes

_SLICE = 2**20  # rows of a column that are looked at together


@dataclass(frozen=True)
class TextColumn:
    """A dataset of texts, of which a slice gives (n,) UTF-8 bytes."""

    path: Path
    name: str
    n: int

    @classmethod
    def open_dataset(cls, texts: h5py.Dataset) -> TextColumn:
        if texts.ndim != 1 or not (h5py.check_string_dtype(texts.dtype) or texts.dtype.kind == "S"):
            raise DataError(
                "names that are no texts",
                where=name_part(texts),
                got=f"{texts.dtype} {texts.shape}",
                fix=ANEW,
            )
        return cls(Path(texts.file.filename), texts.name, len(texts))

    def __len__(self) -> int:
        return self.n

    def __getitem__(self, rows: slice) -> np.ndarray:
        with open_h5(self.path) as file:
            return encode_barcodes(open_part(file, self.name)[rows], name_part(file[self.name]))


@dataclass(frozen=True)
class CategoryColumn:
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


def read_codes(obs: h5py.Group, name: str, n: int) -> CategoryCodes:
    """A column of obs, which has n rows; a categorical one is read when it is needed, and categories that no cell has
    do not count."""
    column, categorical = open_part(obs, name), _categorical(obs, name)
    if categorical is None:
        if isinstance(column, h5py.Dataset) and column.shape != (n,):  # before any of it is read
            got = column.shape
            raise DataError(
                "a column of obs does not fit its cells",
                where=name_part(column),
                got=got,
                expected=(n,),
            )
        values = _plain(obs, name)
        if len(values) != n:
            raise DataError(
                "a column of obs does not fit its cells",
                where=name_part(column),
                got=len(values),
                expected=n,
            )
        return CategoryCodes.encode_values(values)
    codes, categories = categorical
    if codes.shape != (n,) or codes.dtype.kind not in "iu" or categories.ndim != 1:
        got = f"codes {codes.dtype} {codes.shape}, categories {categories.shape}"
        raise DataError(
            "a column of obs does not fit its cells",
            where=name_part(column),
            got=got,
            expected=n,
            fix=ANEW,
        )
    used = np.zeros(len(categories) + 1, bool)
    for lo in range(0, len(codes), _SLICE):
        piece = codes[lo : lo + _SLICE]
        if not -1 <= piece.min() <= piece.max() < len(categories):
            raise DataError(
                "a column of obs points outside its categories",
                where=name_part(column),
                got=f"codes {piece.min()} to {piece.max()}",
                expected=f"-1 (unknown) to {len(categories) - 1}",
                fix=ANEW,
            )
        used[piece] = True  # the last one: -1
    kept = np.flatnonzero(used[:-1])
    names, final = CategoryCodes.encode_values(categories[kept]), np.full(len(used), -1, np.int32)
    final[kept] = names.codes[:]
    return CategoryCodes(
        CategoryColumn(Path(codes.file.filename), codes.name, len(codes), final), names.names
    )


def read_values(frame: h5py.Group, name: str) -> pd.Series:
    """A column of a data frame, all of it; what is unknown is NaN."""
    categorical = _categorical(frame, name)
    if categorical is None:
        return pd.Series(_plain(frame, name), dtype=object)
    codes, categories = categorical
    return pd.Series(pd.Categorical.from_codes(codes[:], pd.Index(categories)), dtype=object)


def _categorical(frame: h5py.Group, name: str) -> tuple[h5py.Dataset, np.ndarray] | None:
    """Codes and categories of a column; None where it holds its values themselves.

    Before anndata 0.8 a column's codes were a dataset that refers to its categories.
    """
    column = open_part(frame, name)
    if column.attrs.get("encoding-type") == "categorical":
        return open_part(column, "codes"), np.asarray(read_part(column, "categories"))
    if not (isinstance(column, h5py.Dataset) and "categories" in column.attrs):
        return None
    referred = column.file[column.attrs["categories"]]
    categories = open_part(referred.parent, referred.name)
    return column, (
        categories.asstr() if h5py.check_string_dtype(categories.dtype) else categories
    )[:]


def _plain(frame: h5py.Group, name: str) -> Any:
    values = read_part(frame, name)
    if not isinstance(values, np.ndarray | pd.api.extensions.ExtensionArray):
        got = type(values).__name__
        raise DataError(
            "not a column of a data frame", where=name_part(frame[name]), got=got, fix=ANEW
        )
    return values


def read_names(root: Any, name: str, where: str) -> SlicedArray:
    """Row names of a data frame, as bytes."""
    if name in root and not isinstance(root[name], h5py.Dataset):
        frame = open_part(root, name)
        index = open_part(frame, frame.attrs["_index"])
        if isinstance(index, h5py.Dataset) and (
            h5py.check_string_dtype(index.dtype) or index.dtype.kind == "S"
        ):
            return TextColumn.open_dataset(index)
    return encode_barcodes(read_index(root, name, where), where)


def read_index(root: Any, name: str, where: str) -> list[str]:
    """Row names of a data frame (`obs`, `var`)."""
    if name not in root or isinstance(root[name], h5py.Dataset):
        fix = "read and write it once with a current anndata"
        raise DataError(f"no {name} of a current AnnData", where=where, fix=fix)
    frame = open_part(root, name)
    values = np.asarray(read_part(frame, frame.attrs["_index"]))
    if values.ndim != 1 or values.dtype.kind not in "OUSTiufb":
        raise DataError(
            "names that are no texts",
            where=name_part(frame),
            got=f"{values.dtype} {values.shape}",
            fix=ANEW,
        )
    return [value.decode() if isinstance(value, bytes) else str(value) for value in values.tolist()]


def has_obs(file: h5py.File) -> bool:
    """Whether a MuData has an obs of its own."""
    return "obs" in file and isinstance(file["obs"], h5py.Group)


def list_columns(frame: h5py.Group) -> list[str]:
    return [str(name) for name in np.ravel(frame.attrs.get("column-order", []))]
