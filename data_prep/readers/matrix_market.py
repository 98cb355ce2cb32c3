"""Matrix Market files with barcodes and features beside them, as 10x and others write them.

What the files may be called is told by `mtx_files`. Entries of the matrix come in any order, so the
text is read once, chunk by chunk, and kept as sorted parts (see `sorted_entries`).
"""

from __future__ import annotations

import csv
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np
import pandas as pd

from clue_dist.errors import DataError, format_count
from data_prep.jobs.whole_folders import make_whole_folder
from data_prep.options import InputArgument, ReadingOptions
from data_prep.readers import sorted_entries
from data_prep.readers.file_parts import FilePart, list_type_parts
from data_prep.readers.mtx_files import find_mtx_files, holds_matrix, is_mtx_file, read_list
from data_prep.readers.source import (
    PROBED_VALUES,
    SourceHead,
    SourceRows,
    encode_barcodes,
    identify_file,
    looks_whole,
    select_columns,
)
from data_prep.readers.tenx import TENX_COLUMNS, FeatureTable
from data_prep.readers.text_files import (
    MOST_LETTERS,
    UNREADABLE,
    PlainText,
    make_unreadable_error,
    open_text,
)
from data_prep.readers.zarr_file import has_zarr

_PART = "000000"  # the only one
_NUMBERS = ("integer", "real", "unsigned-integer", "double", "pattern")  # in a header
_ENTRY_FORM: dict[str, Any] = {
    "sep": r"\s+",
    "header": None,
    "comment": "%",
    "quoting": csv.QUOTE_NONE,
}


def is_matrix_market(path: Path) -> bool:
    """Whether a path is a Matrix Market file, or a folder that holds one."""
    if path.is_dir():
        return not has_zarr(path) and holds_matrix(path)
    return is_mtx_file(path)


def list_mtx_parts(path: Path) -> list[FilePart]:
    """A part for each feature type of a Matrix Market folder."""
    return list_type_parts(read_mtx_features(path).types)


def open_matrix_market(
    argument: InputArgument, modality: str, part: FilePart, options: ReadingOptions
) -> MatrixMarketSource:
    """The source of one part of a Matrix Market folder, as a modality."""
    return MatrixMarketSource(
        argument.local_path,
        modality,
        argument.dataset,
        None if part.is_whole else part.key,
        options.id_columns.get_value(modality),
    )


@dataclass(frozen=True)
class _MtxHeader:
    """What the first lines of a Matrix Market file say."""

    n_rows: int
    n_columns: int
    n_entries: int
    is_pattern: bool = False  # entries have no value: each is a one

    @property
    def sizes(self) -> tuple[int, int]:
        return self.n_rows, self.n_columns


@dataclass(frozen=True)
class MatrixMarketSource:
    """One feature type of a Matrix Market folder."""

    path: Path
    modality: str
    dataset: str = ""
    feature_type: str | None = None  # None: every feature
    id_columns: str | None = None

    @property
    def display_name(self) -> str:
        return f"{self.path.name}/{self.feature_type}" if self.feature_type else self.path.name

    def describe_identity(self) -> dict[str, Any]:
        return {
            "files": [identify_file(path) for path in find_mtx_files(self.path)],
            "feature_type": self.feature_type,
            "modality": self.modality,
            "dataset": self.dataset,
            "ids": self.id_columns,
        }

    def read_head(self) -> SourceHead:
        table, files = read_mtx_features(self.path), find_mtx_files(self.path)
        header = _open_header(files.matrix)
        barcodes = read_list(files.barcodes, header.sizes)
        self._has_cells_in_rows(header, len(table.ids), len(barcodes))  # refuses a misfit
        nnz = header.n_entries
        wanted, names, name_column = table.select_features(self.feature_type, self.id_columns)
        # How the entries are spread over types is not known before they are read.
        share = nnz * len(wanted) // max(len(table.ids), 1)
        where = f"{self.path.name}: barcodes"
        cells = encode_barcodes([row[0] for row in barcodes], where)
        return SourceHead(cells, names, share, {}, [], list(TENX_COLUMNS), name_column)

    def count_parts(self) -> int:
        return 1  # text, and perhaps gzip, can only be read from its start

    def prepare_part(self, part: int, scratch: Path) -> None:
        path, head = find_mtx_files(self.path).matrix, self.read_head()
        n_features = len(read_mtx_features(self.path).ids)
        with make_whole_folder(scratch / f"{part:06d}") as folder, open_text(path) as file:
            header, n_seen = _read_header(file, path), 0
            in_rows = self._has_cells_in_rows(header, n_features, head.n_rows)
            for i, chunk in enumerate(self._read_chunks(file) if header.n_entries else []):
                if header.is_pattern:
                    chunk = chunk.assign(**{"2": 1}).set_axis(range(chunk.shape[1] + 1), axis=1)
                self._validate_chunk(chunk, n_seen, header.n_rows, header.n_columns)
                n_seen += len(chunk)
                # Rows and columns are counted from 1.
                rows, columns, values = (chunk[k].to_numpy() for k in range(3))
                cells, features = (rows, columns) if in_rows else (columns, rows)
                part_folder = folder / f"{i:06d}"
                sorted_entries.write_sorted_part(part_folder, cells - 1, features - 1, values)
            if n_seen != header.n_entries:
                raise DataError(
                    "the matrix ends early or late",
                    where=path.name,
                    got=format_count(n_seen, "entry", "entries"),
                    expected=f"{header.n_entries}, as its header says",
                )

    def read_rows(self, start: int, stop: int, scratch: Path) -> SourceRows:
        table = read_mtx_features(self.path)
        rows = sorted_entries.read_sorted_rows(scratch / _PART, start, stop, len(table.ids))
        return select_columns(rows, table.select_features(self.feature_type)[0])

    def list_other_counts(self) -> list[str]:
        return []

    def probe_counts(self) -> bool:
        matrix = find_mtx_files(self.path).matrix
        with open_text(matrix) as file:
            header = _read_header(file, matrix)
            if header.is_pattern or not header.n_entries:
                return header.is_pattern
            chunk = pd.read_csv(file, **_ENTRY_FORM, nrows=PROBED_VALUES)
            return looks_whole(chunk.iloc[:, -1].to_numpy())

    def _has_cells_in_rows(self, header: _MtxHeader, n_features: int, n_cells: int) -> bool:
        """Whether rows of the matrix are cells: its size tells, else the names of its files.

        Raises:
            DataError: the size fits neither way.
        """
        shape, usual = (header.n_rows, header.n_columns), (n_features, n_cells)
        if shape not in (usual, usual[::-1]):
            raise DataError(
                "the matrix does not fit its features and barcodes",
                where=f"{self.path.name}: header of the matrix",
                got=f"{header.n_rows} x {header.n_columns}",
                expected=f"{n_features} features x {n_cells} barcodes, or the other way round",
                fix="check that the three files belong together",
            )
        if n_features == n_cells:
            return find_mtx_files(self.path).cells_in_rows
        return shape != usual

    def _read_chunks(self, file: IO[str]) -> Iterator[pd.DataFrame]:
        """The entries, a bounded number at a time; what cannot be parsed becomes a DataError."""
        try:
            text: Any = PlainText(file)
            yield from pd.read_csv(text, **_ENTRY_FORM, chunksize=sorted_entries.PART_ENTRIES)
        except (ValueError, OverflowError, *UNREADABLE) as error:  # pandas raises ValueErrors
            what = "the matrix cannot be read to its end"
            raise DataError(what, where=self.path.name, got=str(error).strip()) from None

    def _validate_chunk(
        self, chunk: pd.DataFrame, n_before: int, n_rows: int, n_columns: int
    ) -> None:
        """Refuse entries that are no numbers or lie outside. n_before: entries before the chunk."""
        where = f"{self.path.name}: matrix"
        if (
            chunk.shape[1] != 3
            or any(chunk[k].dtype.kind not in "iuf" for k in range(3))
            or chunk[[0, 1]].dtypes.ne("int64").any()
        ):
            raise DataError(
                "an entry is not `row column count`",
                where=f"{where}, entries from {n_before + 1}",
                got=chunk.iloc[0].tolist(),
            )
        inside = chunk[0].between(1, n_rows) & chunk[1].between(1, n_columns)
        outside = np.flatnonzero(~inside.to_numpy())
        if len(outside):
            first = int(outside[0])
            row, column = (int(chunk[k].iloc[first]) for k in (0, 1))
            raise DataError(
                "an entry lies outside the matrix",
                where=f"{where}, entry {n_before + first + 1}",
                got=f"row {row}, column {column}",
                expected=f"row 1 to {n_rows}, column 1 to {n_columns} (counted from 1)",
            )


def _read_header(file: IO[str], matrix: Path) -> _MtxHeader:
    """Read up to the line of sizes; the file then stands at the first entry."""
    where = f"{matrix.parent.name}: {matrix.name}"
    banner = file.readline(MOST_LETTERS).split()
    words = [word.lower() for word in banner]
    known = [["%%matrixmarket", "matrix", "coordinate", name, "general"] for name in _NUMBERS]
    if words not in known:
        raise DataError(
            "not a Matrix Market header this reader knows",
            where=where,
            got=" ".join(banner)[:80],
            expected="%%MatrixMarket matrix coordinate integer (or real) general",
        )
    line = file.readline(MOST_LETTERS)
    while line.startswith("%") or line.isspace():
        line = file.readline(MOST_LETTERS)
    sizes = line.split()
    if len(sizes) != 3 or not all(re.fullmatch("[0-9]{1,18}", size) for size in sizes):
        raise DataError(
            "the sizes line is wrong",
            where=where,
            got=line.strip()[:80],
            expected="ROWS COLUMNS ENTRIES",
        )
    n_rows, n_columns, n_entries = map(int, sizes)
    return _MtxHeader(n_rows, n_columns, n_entries, words[3] == "pattern")


def _open_header(matrix: Path) -> _MtxHeader:
    """Read the header of a matrix alone."""
    try:
        with open_text(matrix) as file:
            return _read_header(file, matrix)
    except UNREADABLE as error:
        raise make_unreadable_error(matrix, error) from None


def read_mtx_features(path: Path) -> FeatureTable:
    """The features beside a Matrix Market file: a table of one to three columns, or regions."""
    matrix, _, file = find_mtx_files(path)
    lines = read_list(file, _open_header(matrix).sizes)
    # Cell Ranger ATAC writes chromosome, start and end of each peak.
    if ".bed" in file.suffixes and all(len(line) > 2 for line in lines):
        regions = [f"{line[0]}:{line[1]}-{line[2]}" for line in lines]
        return FeatureTable(regions, regions, ["Peaks"] * len(regions))
    # Cell Ranger 3 writes id, name and type; genes.tsv of older versions has no type.
    return FeatureTable(
        [line[0] for line in lines],
        [line[1] if len(line) > 1 else line[0] for line in lines],
        [line[2] if len(line) > 2 else "" for line in lines],
    )
