"""What every input looks like to the conversion: a `Source` of rows, and the `Head` that says what they are."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, TypeAlias

import numpy as np
import pandas as pd
import scipy.sparse as sp

from clue_dist.errors import DataError
from clue_dist.store.layout import MAX_BARCODE_BYTES

SourceRows: TypeAlias = (
    sp.csr_matrix | np.ndarray
)  # (n, features), as the file has them: not validated, not aligned


class SlicedArray(Protocol):
    """An array, or what reads one from its file slice by slice."""

    def __len__(self) -> int: ...
    def __getitem__(self, rows: slice, /) -> np.ndarray: ...


@dataclass(frozen=True)
class CategoryCodes:
    """One category per cell. codes: (n,) integers into `names`, -1 = unknown."""

    codes: SlicedArray
    names: list[str]

    @classmethod
    def encode_values(cls, values: Any) -> CategoryCodes:
        """Encode a column of any type; NaN and the empty string are unknown, 1.0 is the same as 1."""
        codes, names = pd.factorize(pd.Series(values))
        own = names.categories if isinstance(names, pd.CategoricalIndex) else names
        if own.dtype.kind == "f" and all(name % 1 == 0 for name in names):
            names = names.map(int)
        texts = ["" if pd.isna(name) else str(name) for name in names]
        unique = sorted({t for t in texts if t})
        place = {t: i for i, t in enumerate(unique)} | {"": -1}
        renumber = np.array(
            [place[t] for t in texts] + [-1], np.int32
        )  # the last one: factorize's own -1
        return cls(renumber[codes], unique)

    def take_rows(self, rows: np.ndarray) -> CategoryCodes:
        """The codes of `rows`; -1 stays unknown."""
        return CategoryCodes(
            np.where(rows >= 0, self.codes[:][rows], -1).astype(np.int32), self.names
        )


@dataclass(frozen=True)
class SourceHead:
    """What a source holds. barcodes: (n,) bytes; nnz: stored entries, for sizing tasks only."""

    barcodes: SlicedArray
    features: list[str]
    nnz: int
    fields: dict[str, CategoryCodes]  # "batch", "label" where the file has them
    obs_columns: list[str]  # every obs column there is, for error messages
    var_columns: list[str] = field(default_factory=list)  # and those of var
    name_column: str | None = (
        None  # the column of var that gave the features' names; None: they are the var_names
    )

    @property
    def n_rows(self) -> int:
        return len(self.barcodes)


class Source(Protocol):
    """One modality of one input. Instances are small and travel to the workers; `read` may run anywhere."""

    @property
    def modality(self) -> str: ...
    @property
    def dataset(self) -> str:
        """Cells of different data sets never join; "" is a data set too."""
        ...

    @property
    def display_name(self) -> str:
        """The file, for messages and provenance."""
        ...

    @property
    def id_columns(self) -> str | None:
        """Columns of var, comma between, of which the first there is names the features; None: var_names do."""
        ...

    def describe_identity(self) -> dict[str, Any]:
        """What must be unchanged for an interrupted conversion to go on."""
        ...

    def read_head(self) -> SourceHead: ...
    def count_parts(self) -> int:
        """How many `prepare` tasks must run before `read`; 0 where rows can be read directly."""
        ...

    def prepare_part(self, part: int, scratch: Path) -> None:
        """Bring part of the input into a form from which rows can be read; bounded memory."""
        ...

    def read_rows(self, start: int, stop: int, scratch: Path) -> SourceRows:
        """Rows lo to hi, with this source's own columns."""
        ...

    def list_other_counts(self) -> list[str]:
        """Other matrices of the file that look like raw counts, to be named in errors."""
        ...


class DirectSource:
    """Mixin for sources whose rows can be read without preparation."""

    id_columns: str | None = None

    def count_parts(self) -> int:
        return 0

    def prepare_part(self, part: int, scratch: Path) -> None:
        raise AssertionError(f"nothing to prepare, asked for part {part} in {scratch}")

    def list_other_counts(self) -> list[str]:
        return []


def identify_file(path: Path) -> dict[str, Any]:
    """Path, size and time of a file: an interrupted conversion goes on only if these are unchanged."""
    stat = path.stat()
    return {"path": str(path.resolve()), "bytes": stat.st_size, "mtime_ns": stat.st_mtime_ns}


def encode_barcodes(texts: Sequence[Any] | np.ndarray, where: object) -> np.ndarray:
    """Barcodes, each str or UTF-8 bytes, as fixed-width bytes, (n,).

    Raises:
        DataError: one is too long, no UTF-8, or holds a NUL, which would end it; two axes. where: for messages.
    """
    texts = np.asarray(texts, object) if not isinstance(texts, np.ndarray) else texts
    if texts.ndim != 1:
        raise DataError("barcodes with more than one axis", where=where, got=f"shape {texts.shape}")
    each: list[Any] = texts.tolist()
    try:
        coded = [t if isinstance(t, bytes) else str(t).encode() for t in each]
        for text in coded:
            text.isascii() or text.decode()
    except UnicodeError as error:
        raise DataError("a barcode is no UTF-8", where=where, got=str(error)) from None
    bad = next((t for t in coded if len(t) > MAX_BARCODE_BYTES or b"\0" in t), None)
    if bad is not None:
        got, expected = (
            f"{len(bad)} bytes, {bad[:40]!r} ...",
            f"{MAX_BARCODE_BYTES} bytes at most, no NUL",
        )
        raise DataError("a barcode that cannot be kept", where=where, got=got, expected=expected)
    return np.array(coded, "S") if coded else np.empty(0, "S1")


def require_real_numbers(values: np.ndarray, where: object) -> np.ndarray:
    """Values of a type the kernels know: of this machine's order of bytes; bool, half precision and long doubles are
    brought to another width.

    Raises:
        DataError: texts, complex numbers, records.
    """
    if values.dtype.kind not in "buif":
        expected = "integers or floats"
        raise DataError(
            "the matrix does not hold real numbers",
            where=where,
            got=values.dtype,
            expected=expected,
        )
    known = {"bool": "uint8", "float16": "float32", np.dtype(np.longdouble).name: "float64"}
    return values.astype(known.get(values.dtype.name, values.dtype.newbyteorder("=")), copy=False)


def decode_barcodes(barcodes: np.ndarray) -> np.ndarray:
    """UTF-8 bytes -> str, (n,)."""
    decoded: np.ndarray = np.char.decode(barcodes, "utf-8")
    return decoded


def make_names_unique(names: Sequence[str], instead: Sequence[str]) -> list[str]:
    """`names`, where one that repeats, or is empty, gives way to what is given `instead`. All (features,)."""
    times = Counter(names)
    return [
        other if times[name] > 1 or not name else name
        for name, other in zip(names, instead, strict=True)
    ]


def select_columns(rows: sp.csr_matrix, wanted: np.ndarray) -> sp.csr_matrix:
    """The `wanted` columns of a CSR matrix (ascending), without SciPy's detour for a plain slice."""
    return rows if len(wanted) == rows.shape[1] else rows[:, wanted]
