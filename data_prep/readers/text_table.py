"""Tables of counts as text (.csv, .tsv, gzipped or not), with cells in rows or in columns.

The text is read once, some rows at a time, and kept as sorted parts (see `sorted_entries`).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from clue_dist.errors import DataError, list_names
from data_prep.jobs.whole_folders import make_whole_folder
from data_prep.options import InputArgument, ReadingOptions
from data_prep.readers import sorted_entries
from data_prep.readers.barcode_cores import FEWEST_BASES, extract_cores
from data_prep.readers.file_parts import FilePart
from data_prep.readers.source import (
    PROBED_VALUES,
    SourceHead,
    SourceRows,
    encode_barcodes,
    identify_file,
    looks_whole,
)
from data_prep.readers.text_files import (
    UNREADABLE,
    PlainText,
    make_unreadable_error,
    open_text,
    split_fields,
)

CELLS_IN_ROWS, CELLS_IN_COLUMNS = "cells-in-rows", "cells-in-columns"  # keys of such a file
_SEPARATORS = "\t,; "
_LONGEST_LINE = 2**27  # letters of a line, which may name or count each of a million cells
_MOST_COMMENTS = 100  # lines with a # before the table, as BD's pipeline writes them
_PROBED_FIELDS = 100  # of the second line: numbers, if the file is a table of counts
_PROBED_NAMES = 1000  # of each axis, which are compared with barcodes
_PART = "000000"  # the only one


@dataclass(frozen=True)
class _TableForm:
    """How a text is laid out."""

    separator: str
    columns: list[str]  # names of the columns, without the one that names the rows
    n_skipped: int  # lines before the first row: comments, and the names of the columns


def is_text_table(path: Path) -> bool:
    """Whether a file begins with a line of names, and one that has numbers behind its name."""
    return path.is_file() and _find_form(path) is not None


def list_table_parts(path: Path) -> list[FilePart]:
    """The one part that a table has; a key says where its cells are."""
    by_key = [
        FilePart(key, suggestion="adt", on_request=True, holds_counts=False)
        for key in (CELLS_IN_ROWS, CELLS_IN_COLUMNS)
    ]
    return [FilePart("", suggestion="adt", is_whole=True), *by_key]


def open_text_table(
    argument: InputArgument, modality: str, part: FilePart, options: ReadingOptions
) -> TextTableSource:
    """The source of a table; `orient_table` finds out where its cells are, if no key says so."""
    cells_in_rows = part.key == CELLS_IN_ROWS if part.key else None
    return TextTableSource(argument.local_path, modality, argument.dataset, cells_in_rows)


@dataclass(frozen=True)
class TextTableSource:
    """A table of counts as text."""

    path: Path
    modality: str
    dataset: str = ""
    cells_in_rows: bool | None = None  # None: not known yet, and guessed from the names alone
    id_columns: str | None = None

    @property
    def display_name(self) -> str:
        return self.path.name

    def describe_identity(self) -> dict[str, Any]:
        return identify_file(self.path) | {
            "modality": self.modality,
            "dataset": self.dataset,
            "cells_in_rows": self.cells_in_rows,
        }

    def read_axes(self) -> tuple[list[str], list[str]]:
        """Read the names of rows and columns."""
        columns, rows = read_axis_names(self.path, self.path.stat().st_mtime_ns)
        return rows, columns

    def read_head(self) -> SourceHead:
        rows, columns = self.read_axes()
        cells, features = (rows, columns) if self._has_cells_in_rows() else (columns, rows)
        barcodes = encode_barcodes(cells, self.display_name)
        # Zeros are read, too, and count for the size of tasks.
        return SourceHead(barcodes, features, len(cells) * len(features), {}, [])

    def count_parts(self) -> int:
        return 1  # text, and perhaps gzip, can only be read from its start

    def prepare_part(self, part: int, scratch: Path) -> None:
        start, in_rows = 0, self._has_cells_in_rows()
        n_columns = len(self.read_axes()[1])
        step = max(1, sorted_entries.PART_ENTRIES // n_columns)
        with make_whole_folder(scratch / f"{part:06d}") as folder:
            for i, values in enumerate(self._read_chunks(step)):
                rows, columns = np.nonzero(values)
                axes = (rows + start, columns)
                cells, features = axes if in_rows else axes[::-1]
                part_folder, entries = folder / f"{i:06d}", values[rows, columns]
                sorted_entries.write_sorted_part(part_folder, cells, features, entries)
                start += len(values)

    def read_rows(self, start: int, stop: int, scratch: Path) -> SourceRows:
        rows, columns = self.read_axes()
        n_features = len(columns) if self._has_cells_in_rows() else len(rows)
        return sorted_entries.read_sorted_rows(scratch / _PART, start, stop, n_features)

    def list_other_counts(self) -> list[str]:
        return []

    def probe_counts(self) -> bool:
        n_rows = max(1, PROBED_VALUES // len(self.read_axes()[1]))
        return looks_whole(next(self._read_chunks(n_rows)).ravel())

    def _has_cells_in_rows(self) -> bool:
        if self.cells_in_rows is not None:
            return self.cells_in_rows
        rows, columns = self.read_axes()
        in_rows, in_columns = _count_sequences(rows), _count_sequences(columns)
        # Files of many cells and few proteins are the rule, where no name looks like a barcode.
        return (in_rows, len(rows)) >= (in_columns, len(columns))

    def _read_chunks(self, n_rows: int) -> Iterator[np.ndarray]:
        """The values, `n_rows` rows at a time."""
        form = _require_form(self.path)
        n_columns, n_seen = len(form.columns), 0
        try:
            with open_text(self.path) as file:
                text: Any = PlainText(file)
                chunks = pd.read_csv(
                    text, sep=form.separator, header=None, skiprows=form.n_skipped,
                    names=range(n_columns + 1), index_col=False, low_memory=False,
                    dtype={0: str}, chunksize=n_rows,
                )  # fmt: skip
                for chunk in chunks:
                    numbers = chunk.iloc[:, 1:]
                    self._require_numbers(numbers, form.columns, n_seen)
                    yield numbers.to_numpy()
                    n_seen += len(chunk)
        except (ValueError, OverflowError, *UNREADABLE) as error:  # pandas raises ValueErrors
            raise DataError(
                "the table cannot be read to its end",
                where=f"{self.display_name}, after row {n_seen}",
                got=str(error).strip()[:300],
                fix="check that the file is complete",
            ) from None

    def _require_numbers(self, chunk: pd.DataFrame, columns: list[str], n_before: int) -> None:
        for column, name in zip(chunk.columns, columns, strict=True):
            if chunk[column].dtype.kind not in "iuf":
                found = next(value for value in chunk[column] if isinstance(value, str | bool))
                raise DataError(
                    "a column of the table does not hold numbers",
                    where=f"{self.display_name}, column {name!r}, rows from {n_before + 1}",
                    got=repr(found)[:80],
                    expected="counts alone, beside the names in the first column",
                    fix="take the column out of the file",
                )


def orient_table(
    table: TextTableSource, barcodes: Sequence[tuple[str, str, np.ndarray]]
) -> tuple[TextTableSource, str]:
    """Find out whether the cells of a table are its rows or its columns.

    Args:
        table: the source of a table.
        barcodes: data set, name and barcodes, (n,) bytes, of the other inputs.

    Returns:
        The source, which now knows it, and a sentence that says how it was found.

    Raises:
        DataError: the names show nothing: none is found in another file, none is a sequence.
    """
    axes = table.read_axes()
    cores = [
        extract_cores(encode_barcodes(names[:_PROBED_NAMES], table.display_name)) for names in axes
    ]
    for dataset, name, others in barcodes:
        if dataset == table.dataset:
            known = extract_cores(others)
            shared = [int(np.isin(core, known).sum()) for core in cores]
            if shared[0] != shared[1]:
                n_names = len(cores[shared[0] < shared[1]])
                reason = f"{max(shared):,} of {n_names:,} looked at are cells of {name}, too"
                return _settle_table(table, shared[0] > shared[1], reason)
    sequences = [_count_sequences(names) for names in axes]
    if sequences[0] == sequences[1]:
        fix = f"`{table.modality}={table.path.name}:{CELLS_IN_COLUMNS}`, or `:{CELLS_IN_ROWS}`"
        raise DataError(
            "are the cells of the table its rows or its columns?",
            where=table.display_name,
            got=f"rows {list_names(axes[0], 3)}; columns {list_names(axes[1], 3)}",
            expected="the barcodes of another input, or names that are sequences",
            fix=fix,
        )
    return _settle_table(table, sequences[0] > sequences[1], "their names look like barcodes")


def _settle_table(
    table: TextTableSource, cells_in_rows: bool, reason: str
) -> tuple[TextTableSource, str]:
    axis = "rows" if cells_in_rows else "columns"
    return replace(table, cells_in_rows=cells_in_rows), (
        f"{table.display_name}: its {axis} are cells, as {reason}"
    )


def _count_sequences(names: list[str]) -> int:
    """How many of the first names are a barcode's sequence, with a number behind it or not."""
    cores = extract_cores(encode_barcodes(names[:_PROBED_NAMES], "names"))
    return sum(
        len(core) >= FEWEST_BASES and not core.strip(b"ACGTN") and name.startswith(core.decode())
        for core, name in zip(cores.tolist(), names, strict=False)
    )


@lru_cache(maxsize=16)
def read_axis_names(path: Path, mtime_ns: int) -> tuple[list[str], list[str]]:
    """Read the names of a table's columns and rows; the time tells a file from its next version.

    Raises:
        DataError: the file is damaged.
    """
    form = _require_form(path)
    try:
        with open_text(path) as file:
            text: Any = PlainText(file)
            names = pd.read_csv(
                text, sep=form.separator, header=None, skiprows=form.n_skipped,
                names=range(len(form.columns) + 1), index_col=False, usecols=[0],
                dtype=str, na_filter=False,
            )[0]  # fmt: skip
    except (ValueError, OverflowError, *UNREADABLE) as error:  # pandas raises ValueErrors
        raise make_unreadable_error(path, error) from None
    return form.columns, names.tolist()


def _require_form(path: Path) -> _TableForm:
    form = _find_form(path)
    if form is None:
        raise DataError("the table has changed while it was read", where=path)
    return form


def _find_form(path: Path) -> _TableForm | None:
    """Find the form of a table from its first two lines behind comments; None: it is none."""
    try:
        with open_text(path) as file:
            lines, n_comments = [file.readline(_LONGEST_LINE)], 0
            while lines[0].startswith("#") and n_comments < _MOST_COMMENTS:
                lines, n_comments = [file.readline(_LONGEST_LINE)], n_comments + 1
            lines.append(file.readline(_LONGEST_LINE))
    except UNREADABLE:
        return None
    if any(len(line) == _LONGEST_LINE for line in lines) or lines[0].startswith(("#", "%")):
        return None
    for separator in _SEPARATORS:
        head, row = (split_fields(line, separator) for line in lines)
        # R leaves the name of the first column out.
        if len(row) < 2 or len(head) not in (len(row), len(row) - 1):
            continue
        columns = head[len(head) - len(row) + 1 :]
        numbers = row[1 : _PROBED_FIELDS + 1]
        if all(map(_is_number, numbers)) and not all(map(_is_number, columns)):
            return _TableForm(separator, columns, n_comments + 1)
    return None


def _is_number(text: str) -> bool:
    try:
        float(text or "nan")  # nothing stands for a missing value
    except ValueError:
        return False
    return True
