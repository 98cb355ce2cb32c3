"""A data frame in HDF5 or Zarr, as anndata writes it: names and columns, read when needed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import h5py
import numpy as np
import pandas as pd

from clue_dist.errors import DataError
from clue_dist.store.location import Location
from data_prep.readers.h5_file import (
    WRITE_ANEW,
    is_array,
    is_group,
    locate_part,
    name_part,
    open_container,
    open_part,
    read_part,
    require_plausible_size,
)
from data_prep.readers.source import CategoryCodes, SlicedArray, encode_barcodes

_SLICE_ROWS = 2**20  # rows of a column that are looked at together


@dataclass(frozen=True)
class TextColumn:
    """A dataset of texts; a slice of it gives UTF-8 bytes, (n,)."""

    path: Location
    name: str  # name of the dataset
    n_rows: int

    @classmethod
    def open_dataset(cls, texts: Any) -> TextColumn:
        """Refer to an array of an open file.

        Raises:
            DataError: it does not hold texts, or has several axes.
        """
        if texts.ndim != 1 or not _holds_texts(texts):
            raise DataError(
                "names that are no texts",
                where=name_part(texts),
                got=f"{texts.dtype} {texts.shape}",
                fix=WRITE_ANEW,
            )
        require_plausible_size(texts)
        return cls(locate_part(texts), texts.name, texts.shape[0])

    def __len__(self) -> int:
        return self.n_rows

    def __getitem__(self, rows: slice) -> np.ndarray:
        with open_container(self.path) as file:
            return encode_barcodes(open_part(file, self.name)[rows], name_part(file[self.name]))


@dataclass(frozen=True)
class CategoryColumn:
    """The codes of a categorical column; a slice of it gives int32, (n,)."""

    path: Location
    name: str  # name of the dataset that holds the codes
    n_rows: int
    final_codes: np.ndarray  # what each code in the file becomes; the last one is for -1

    def __len__(self) -> int:
        return self.n_rows

    def __getitem__(self, rows: slice) -> np.ndarray:
        with open_container(self.path) as file:
            codes: np.ndarray = self.final_codes[file[self.name][rows]]
        return codes


def read_codes(obs: Any, name: str, n_cells: int) -> CategoryCodes:
    """A column of obs as categories; those that no cell has are left out.

    Of a categorical column only the categories are kept in memory: its codes are looked through
    here, and read again when they are needed.

    Raises:
        DataError: the column does not have a value for each of `n_cells` cells, or is damaged.
    """
    column, categorical = open_part(obs, name), _open_categorical(obs, name)
    if categorical is None:
        return CategoryCodes.encode_values(_read_plain_column(obs, name, n_cells))
    codes, categories = categorical
    if codes.shape != (n_cells,) or codes.dtype.kind not in "iu" or categories.ndim != 1:
        raise DataError(
            "a column of obs does not fit its cells",
            where=name_part(column),
            got=f"codes {codes.dtype} {codes.shape}, categories {categories.shape}",
            expected=n_cells,
            fix=WRITE_ANEW,
        )
    used = np.flatnonzero(_find_used_codes(codes, len(categories), name_part(column)))
    encoded = CategoryCodes.encode_values(categories[used])
    final_codes = np.full(len(categories) + 1, -1, np.int32)
    final_codes[used] = encoded.codes[:]
    path = locate_part(codes)
    column_codes = CategoryColumn(path, codes.name, n_cells, final_codes)
    return CategoryCodes(column_codes, encoded.names, encoded.missing_texts)


def _read_plain_column(obs: Any, name: str, n_cells: int) -> Any:
    column = open_part(obs, name)
    shape = column.shape if is_array(column) else (n_cells,)
    what, where = "a column of obs does not fit its cells", name_part(column)
    if shape != (n_cells,):  # before any of it is read
        raise DataError(what, where=where, got=shape, expected=(n_cells,))
    values = _read_column(obs, name)
    if len(values) != n_cells:
        raise DataError(what, where=where, got=len(values), expected=n_cells)
    return values


def _find_used_codes(codes: Any, n_categories: int, where: str) -> np.ndarray:
    """Whether any cell has a category, (categories,) bool."""
    used = np.zeros(n_categories + 1, bool)  # the last one is for -1
    for start in range(0, codes.shape[0], _SLICE_ROWS):
        some = codes[start : start + _SLICE_ROWS]
        if not -1 <= some.min() <= some.max() < n_categories:
            raise DataError(
                "a column of obs points outside its categories",
                where=where,
                got=f"codes {some.min()} to {some.max()}",
                expected=f"-1 (unknown) to {n_categories - 1}",
                fix=WRITE_ANEW,
            )
        used[some] = True
    return used[:-1]


def read_typed_values(frame: Any, name: str, n_rows: int) -> pd.Series:
    """All of a column of a data frame, of the type that it has there.

    Raises:
        DataError: the column does not have a value for each of `n_rows` rows, or is damaged.
    """
    categorical = _open_categorical(frame, name)
    if categorical is None:
        return pd.Series(_read_plain_column(frame, name, n_rows))
    codes, categories = categorical
    fits = codes.shape == (n_rows,) and codes.dtype.kind in "iu"
    found = codes[:] if fits else np.empty(0, np.int64)
    if not fits or found.min(initial=0) < -1 or found.max(initial=-1) >= len(categories):
        raise DataError(
            "a column of obs does not fit its cells",
            where=name_part(open_part(frame, name)),
            got=f"codes {codes.dtype} {codes.shape}, {len(categories)} categories",
            expected=n_rows,
            fix=WRITE_ANEW,
        )
    return pd.Series(pd.Categorical.from_codes(found, pd.Index(categories)))


def read_values(frame: Any, name: str) -> pd.Series:
    """All of a column of a data frame; what is unknown is NaN."""
    categorical = _open_categorical(frame, name)
    if categorical is None:
        return pd.Series(_read_column(frame, name), dtype=object)
    codes, categories = categorical
    return pd.Series(pd.Categorical.from_codes(codes[:], pd.Index(categories)), dtype=object)


def _open_categorical(frame: Any, name: str) -> tuple[Any, np.ndarray] | None:
    """Codes and categories of a column; None where the column is not categorical."""
    column = open_part(frame, name)
    if column.attrs.get("encoding-type") == "categorical":
        return open_part(column, "codes"), np.asarray(read_part(column, "categories"))
    if not (is_array(column) and "categories" in column.attrs):
        return None
    # Before anndata 0.8, the column was an array of codes with a reference to its categories.
    reference = column.attrs["categories"]
    if not isinstance(column, h5py.Dataset):
        return column, np.asarray(read_part(frame, reference))
    referred = column.file[reference]
    categories = open_part(referred.parent, referred.name)
    if h5py.check_string_dtype(categories.dtype):
        return column, categories.asstr()[:]
    return column, categories[:]


def _read_column(frame: Any, name: str) -> Any:
    values = read_part(frame, name)
    if not isinstance(values, np.ndarray | pd.api.extensions.ExtensionArray):
        raise DataError(
            "not a column of a data frame",
            where=name_part(frame[name]),
            got=type(values).__name__,
            fix=WRITE_ANEW,
        )
    return values


def read_names(root: Any, name: str, where: str) -> SlicedArray:
    """Row names of the data frame `name` (`obs`, `var`) as bytes; texts are read when needed."""
    if name in root and not is_array(root[name]):
        frame = open_part(root, name)
        index = open_part(frame, frame.attrs["_index"])
        if is_array(index) and _holds_texts(index):
            return TextColumn.open_dataset(index)
    return encode_barcodes(read_index(root, name, where), where)


def read_index(root: Any, name: str, where: str) -> list[str]:
    """Row names of the data frame `name` (`obs`, `var`).

    Raises:
        DataError: there is no such data frame, or its names are not texts.
    """
    if name not in root or is_array(root[name]):
        fix = "read and write it once with a current anndata"
        raise DataError(f"no {name} of a current AnnData", where=where, fix=fix)
    frame = open_part(root, name)
    # The attribute names the column that holds the row names.
    values = np.asarray(read_part(frame, frame.attrs["_index"]))
    if values.ndim != 1 or values.dtype.kind not in "OUSTiufb":
        raise DataError(
            "names that are no texts",
            where=name_part(frame),
            got=f"{values.dtype} {values.shape}",
            fix=WRITE_ANEW,
        )
    return [value.decode() if isinstance(value, bytes) else str(value) for value in values.tolist()]


def _holds_texts(array: Any) -> bool:
    if isinstance(array, h5py.Dataset):
        return bool(h5py.check_string_dtype(array.dtype)) or array.dtype.kind == "S"
    return array.dtype.kind in "SUTO"


def has_obs(file: Any) -> bool:
    """Whether a MuData has an obs that its modalities share."""
    return "obs" in file and is_group(file["obs"])


def list_columns(frame: Any) -> list[str]:
    """The columns of a data frame, in its order."""
    return [str(name) for name in np.ravel(frame.attrs.get("column-order", []))]
