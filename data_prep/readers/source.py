"""What every input looks like to the conversion: a source of rows, and a head that names them."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, Protocol, TypeAlias

import numpy as np
import pandas as pd
import scipy.sparse as sp

from clue_dist.errors import DataError
from clue_dist.store.count_rules import limit_rounding
from clue_dist.store.layout import MAX_BARCODE_BYTES
from clue_dist.store.location import Location, RemoteLocation
from clue_dist.store.obs_columns import MISSING_TEXTS, name_value
from data_prep.readers.zarr_file import identify_zarr

# (n, features), as the file has them: neither validated nor aligned to the store's features.
SourceRows: TypeAlias = sp.csr_matrix | np.ndarray

PROBED_VALUES = 10_000  # looked at to guess whether a matrix holds counts
# Types that the kernels do not know, and the types that hold the same values.
_KNOWN_TYPES = {"bool": "uint8", "float16": "float32", np.dtype(np.longdouble).name: "float64"}


class SlicedArray(Protocol):
    """An array, or what reads one from its file slice by slice."""

    def __len__(self) -> int: ...
    def __getitem__(self, rows: slice, /) -> np.ndarray: ...


@dataclass(frozen=True)
class CategoryCodes:
    """One category for each cell."""

    codes: SlicedArray  # (n,) integers into `names`; -1 = unknown
    names: list[str]
    # Texts of the file that stand for a missing value, as "nan" does: their cells are unknown.
    missing_texts: tuple[str, ...] = ()

    @classmethod
    def encode_values(cls, values: Any) -> CategoryCodes:
        """Encode a column of any type, whose values are named by `name_value`.

        NaN and empty strings are unknown, and so are the texts that programs make of NaN.
        """
        codes, found = pd.factorize(pd.Series(values))
        texts = ["" if pd.isna(value) else name_value(value) for value in found]
        missing = tuple(sorted({text for text in texts if text in MISSING_TEXTS}))
        texts = ["" if text in MISSING_TEXTS else text for text in texts]
        names = sorted({text for text in texts if text})
        places = {name: i for i, name in enumerate(names)} | {"": -1}
        # The last one is for the -1 of factorize, which means unknown as well.
        final_codes = np.array([places[text] for text in texts] + [-1], np.int32)
        return cls(final_codes[codes], names, missing)

    def take_rows(self, rows: np.ndarray) -> CategoryCodes:
        """The categories of other cells. rows: (m,), of the cells here; -1 becomes unknown."""
        codes = np.where(rows >= 0, self.codes[:][rows], -1)
        return CategoryCodes(codes.astype(np.int32), self.names, self.missing_texts)


class ObsValues(Protocol):
    """A column of obs, which is read when its values are asked for."""

    def read_values(self) -> pd.Series:
        """Read all values, (n,); what is unknown is missing."""
        ...


@dataclass(frozen=True)
class ChosenObsValues:
    """Values of some of the cells of a column."""

    column: ObsValues
    rows: np.ndarray  # (n,), of the cells that the column has

    def read_values(self) -> pd.Series:
        """Read the values of the chosen cells, (n,)."""
        return self.column.read_values().iloc[self.rows].reset_index(drop=True)


@dataclass(frozen=True)
class SourceHead:
    """What a source holds, apart from the values."""

    barcodes: SlicedArray  # (n,) bytes
    features: list[str]
    nnz: int  # stored entries, by which the sizes of tasks are chosen
    fields: dict[str, CategoryCodes]  # "batch" and "label", where the file has their column
    obs_columns: list[str]  # all there are, for messages
    var_columns: list[str] = field(default_factory=list)  # likewise
    name_column: str | None = None  # of var, that gave the features' names; None: var_names did
    kept_columns: Mapping[str, ObsValues] = field(default_factory=dict)  # that a store may keep

    @property
    def n_rows(self) -> int:
        return len(self.barcodes)


class Source(Protocol):
    """One modality of one input.

    Sources are small and travel to the workers; rows may be read anywhere.
    """

    @property
    def modality(self) -> str: ...
    @property
    def dataset(self) -> str:
        """Cells of different data sets never join; "" is a data set too."""
        ...

    @property
    def display_name(self) -> str:
        """The file, and the part of it, for messages and provenance."""
        ...

    @property
    def id_columns(self) -> str | None:
        """Columns of var, comma between, of which the first that is present names the features.

        None: var_names do.
        """
        ...

    def describe_identity(self) -> dict[str, Any]:
        """What must be unchanged for an interrupted conversion to go on; JSON-able."""
        ...

    def read_head(self) -> SourceHead: ...
    def count_parts(self) -> int:
        """How many calls of `prepare_part` must come before `read_rows`; 0 for most formats."""
        ...

    def prepare_part(self, part: int, scratch: Path) -> None:
        """Bring a part of the input into a form from which rows can be read, in bounded memory.

        Args:
            part: its number, from 0 on.
            scratch: the folder where all parts of this source lie.
        """
        ...

    def read_rows(self, start: int, stop: int, scratch: Path) -> SourceRows:
        """Rows `start` to `stop`, with this source's columns in its order."""
        ...

    def list_other_counts(self) -> list[str]:
        """Other matrices of the file that look like raw counts, to be named in errors."""
        ...

    def probe_counts(self) -> bool:
        """Whether the first values are whole and not negative, as counts are."""
        ...


def count_probed_rows(head: SourceHead) -> int:
    """Count the rows that hold about as many values as are looked at to guess what they are."""
    return min(max(1, PROBED_VALUES * head.n_rows // max(head.nnz, 1)), head.n_rows)


class OpenedSource(NamedTuple):
    """A source, and its head, which has been read."""

    source: Source
    head: SourceHead


class DirectSource(ABC):
    """Mixin for sources whose rows can be read without preparation."""

    id_columns: str | None = None

    def count_parts(self) -> int:
        return 0

    def prepare_part(self, part: int, scratch: Path) -> None:
        raise AssertionError(f"nothing to prepare, asked for part {part} in {scratch}")

    def list_other_counts(self) -> list[str]:
        return []

    def probe_counts(self) -> bool:
        head = self.read_head()
        rows = self.read_rows(0, count_probed_rows(head), Path())
        return looks_whole(rows if isinstance(rows, np.ndarray) else rows.data)

    @abstractmethod
    def read_head(self) -> SourceHead: ...
    @abstractmethod
    def read_rows(self, start: int, stop: int, scratch: Path) -> SourceRows: ...


def identify_file(path: Location) -> dict[str, Any]:
    """Path, size and time of a file; if they change, an interrupted conversion does not go on.

    Of a Zarr folder, the file in its root stands for all, as it is written with the others.
    """
    if isinstance(path, RemoteLocation) or path.is_dir():
        return identify_zarr(path)
    stat = path.stat()
    return {"path": str(path.resolve()), "bytes": stat.st_size, "mtime_ns": stat.st_mtime_ns}


def encode_barcodes(texts: Sequence[Any] | np.ndarray, where: object) -> np.ndarray:
    """Barcodes as bytes of fixed width, (n,).

    Args:
        texts: each a str, or UTF-8 bytes.
        where: they come from, for messages.

    Raises:
        DataError: a barcode is too long, is not UTF-8, or holds a NUL, at which bytes of fixed
            width would end; the barcodes have two axes.
    """
    array = texts if isinstance(texts, np.ndarray) else np.asarray(texts, object)
    if array.ndim != 1:
        raise DataError("barcodes with more than one axis", where=where, got=f"shape {array.shape}")
    barcodes: list[Any] = array.tolist()
    try:
        encoded = [b if isinstance(b, bytes) else str(b).encode() for b in barcodes]
        for barcode in encoded:
            if not barcode.isascii():
                barcode.decode()
    except UnicodeError as error:
        raise DataError("a barcode is no UTF-8", where=where, got=str(error)) from None
    bad = next((b for b in encoded if len(b) > MAX_BARCODE_BYTES or b"\0" in b), None)
    if bad is not None:
        raise DataError(
            "a barcode that cannot be kept",
            where=where,
            got=f"{len(bad)} bytes, {bad[:40]!r} ...",
            expected=f"{MAX_BARCODE_BYTES} bytes at most, no NUL",
        )
    return np.array(encoded, "S") if encoded else np.empty(0, "S1")


def decode_barcodes(barcodes: np.ndarray) -> np.ndarray:
    """UTF-8 bytes to str, (n,)."""
    decoded: np.ndarray = np.char.decode(barcodes, "utf-8")
    return decoded


def require_real_numbers(values: np.ndarray, where: object) -> np.ndarray:
    """Values in a type that the kernels know, in this machine's byte order.

    Bool, half precision and long doubles are brought to another width.

    Raises:
        DataError: texts, complex numbers or records.
    """
    if values.dtype.kind not in "buif":
        raise DataError(
            "the matrix does not hold real numbers",
            where=where,
            got=values.dtype,
            expected="integers or floats",
        )
    final_type = _KNOWN_TYPES.get(values.dtype.name, values.dtype.newbyteorder("="))
    return values.astype(final_type, copy=False)


def looks_whole(values: np.ndarray) -> bool:
    """Whether there are values, and all of them are not negative and whole, or nearly so."""
    if not len(values) or values.dtype.kind not in "buif":
        return False
    whole = np.rint(values)
    with np.errstate(invalid="ignore"):  # infinite values are as far from whole as missing ones
        return bool(((whole >= 0) & (np.abs(whole - values) <= limit_rounding(whole))).all())


def select_columns(rows: sp.csr_matrix, wanted: np.ndarray) -> sp.csr_matrix:
    """The `wanted` columns, ascending; all of them without a copy, unlike SciPy."""
    return rows if len(wanted) == rows.shape[1] else rows[:, wanted]
