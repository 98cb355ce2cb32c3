"""Matrix Market folders, as 10x writes them.

A folder holds matrix.mtx, barcodes.tsv and features.tsv (or genes.tsv), each maybe gzipped. Entries
of the matrix come in any order, so the text is read once, chunk by chunk, and kept as sorted parts
(see `sorted_entries`).
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

from clue_dist.errors import DataError
from data_prep.jobs.whole_folders import make_whole_folder
from data_prep.options import InputArgument, ReadingOptions
from data_prep.readers import sorted_entries
from data_prep.readers.file_parts import FilePart, list_type_parts
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
    explain_unreadable,
    open_text,
    read_lines,
)

# What the files of a folder may be called, apart from an ending .gz.
_NAMES = {
    "matrix": ["matrix.mtx"],
    "barcodes": ["barcodes.tsv"],
    "features": ["features.tsv", "genes.tsv"],
}
_PART = "000000"  # the only one
_ENTRY_FORM: dict[str, Any] = {
    "sep": r"\s+",
    "header": None,
    "comment": "%",
    "quoting": csv.QUOTE_NONE,
}


def is_matrix_market(path: Path) -> bool:
    """Whether a path is a folder; when it is opened, it must hold the three files."""
    return path.is_dir()


def list_mtx_parts(path: Path) -> list[FilePart]:
    """A part for each feature type of a Matrix Market folder."""
    return list_type_parts(read_mtx_features(path).types)


def open_matrix_market(
    argument: InputArgument, modality: str, part: FilePart, options: ReadingOptions
) -> MatrixMarketSource:
    """The source of one part of a Matrix Market folder, as a modality."""
    return MatrixMarketSource(
        argument.path,
        modality,
        argument.dataset,
        None if part.is_whole else part.key,
        options.id_columns.get_value(modality),
    )


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
            "files": [identify_file(_find_file(self.path, name)) for name in _NAMES],
            "feature_type": self.feature_type,
            "modality": self.modality,
            "dataset": self.dataset,
            "ids": self.id_columns,
        }

    def read_head(self) -> SourceHead:
        table = read_mtx_features(self.path)
        barcodes = read_lines(_find_file(self.path, "barcodes"))
        matrix = _find_file(self.path, "matrix")
        try:
            with open_text(matrix) as file:
                n_features, n_cells, nnz = self._read_sizes(file)
        except UNREADABLE as error:
            raise explain_unreadable(matrix, error) from None
        if (n_features, n_cells) != (len(table.ids), len(barcodes)):
            # People who write such folders themselves tend to write cells x features.
            is_transposed = (n_cells, n_features) == (len(table.ids), len(barcodes))
            raise DataError(
                "the matrix does not fit its features and barcodes",
                where=f"{self.path.name}: header of the matrix",
                got=f"{n_features} x {n_cells}",
                expected=f"{len(table.ids)} features x {len(barcodes)} barcodes",
                fix="the matrix is transposed: write it as features x cells"
                if is_transposed
                else "check that the three files belong together",
            )
        wanted, names, name_column = table.select_features(self.feature_type, self.id_columns)
        # How the entries are spread over types is not known before they are read.
        share = nnz * len(wanted) // max(len(table.ids), 1)
        where = f"{self.path.name}: barcodes"
        cells = encode_barcodes([line.split("\t")[0] for line in barcodes], where)
        return SourceHead(cells, names, share, {}, [], list(TENX_COLUMNS), name_column)

    def count_parts(self) -> int:
        return 1  # text, and perhaps gzip, can only be read from its start

    def prepare_part(self, part: int, scratch: Path) -> None:
        path = _find_file(self.path, "matrix")
        with make_whole_folder(scratch / f"{part:06d}") as folder, open_text(path) as file:
            n_features, n_cells, nnz = self._read_sizes(file)
            n_seen = 0
            for i, chunk in enumerate(self._read_chunks(file) if nnz else []):
                self._validate_chunk(chunk, n_seen, n_features, n_cells)
                n_seen += len(chunk)
                # The file is features x cells, counted from 1; a row here is a cell.
                columns, rows, values = (chunk[k].to_numpy() for k in range(3))
                sorted_entries.write_sorted_part(folder / f"{i:06d}", rows - 1, columns - 1, values)
            if n_seen != nnz:
                raise DataError(
                    "the matrix ends early or late",
                    where=path.name,
                    got=f"{n_seen} entries",
                    expected=f"{nnz}, as its header says",
                )

    def read_rows(self, start: int, stop: int, scratch: Path) -> SourceRows:
        table = read_mtx_features(self.path)
        rows = sorted_entries.read_sorted_rows(scratch / _PART, start, stop, len(table.ids))
        return select_columns(rows, table.select_features(self.feature_type)[0])

    def list_other_counts(self) -> list[str]:
        return []

    def probe_counts(self) -> bool:
        with open_text(_find_file(self.path, "matrix")) as file:
            nnz = self._read_sizes(file)[2]
            values = pd.read_csv(file, **_ENTRY_FORM, nrows=PROBED_VALUES)[2] if nnz else []
        return looks_whole(np.asarray(values))

    def _read_sizes(self, file: IO[str]) -> tuple[int, int, int]:
        """Read the header up to the line of sizes; the file then stands at the first entry.

        Returns:
            Numbers of features, cells and entries.
        """
        where = f"{self.path.name}: {_find_file(self.path, 'matrix').name}"
        banner = file.readline(MOST_LETTERS).split()
        words = [word.lower() for word in banner]
        known = [
            ["%%matrixmarket", "matrix", "coordinate", number, "general"]
            for number in ("integer", "real")
        ]
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
                expected="FEATURES CELLS ENTRIES",
            )
        return int(sizes[0]), int(sizes[1]), int(sizes[2])

    def _read_chunks(self, file: IO[str]) -> Iterator[pd.DataFrame]:
        """The entries, a bounded number at a time; what cannot be parsed becomes a DataError."""
        try:
            yield from pd.read_csv(file, **_ENTRY_FORM, chunksize=sorted_entries.PART_ENTRIES)
        except (ValueError, OverflowError, *UNREADABLE) as error:  # pandas raises ValueErrors
            what = "the matrix cannot be read to its end"
            raise DataError(what, where=self.path.name, got=str(error).strip()) from None

    def _validate_chunk(
        self, chunk: pd.DataFrame, n_before: int, n_features: int, n_cells: int
    ) -> None:
        """Refuse entries that are no numbers or lie outside. n_before: entries before the chunk."""
        where = f"{self.path.name}: matrix"
        if (
            chunk.shape[1] != 3
            or any(chunk[k].dtype.kind not in "iuf" for k in range(3))
            or chunk[[0, 1]].dtypes.ne("int64").any()
        ):
            raise DataError(
                "an entry is not `feature cell count`",
                where=f"{where}, entries from {n_before + 1}",
                got=chunk.iloc[0].tolist(),
            )
        inside = chunk[0].between(1, n_features) & chunk[1].between(1, n_cells)
        outside = np.flatnonzero(~inside.to_numpy())
        if len(outside):
            first = int(outside[0])
            feature, cell = (int(chunk[k].iloc[first]) for k in (0, 1))
            raise DataError(
                "an entry lies outside the matrix",
                where=f"{where}, entry {n_before + first + 1}",
                got=f"feature {feature}, cell {cell}",
                expected=f"feature 1 to {n_features}, cell 1 to {n_cells} (counted from 1)",
            )


def read_mtx_features(path: Path) -> FeatureTable:
    """The features of a Matrix Market folder, whose table has one to three columns."""
    # Cell Ranger 3 writes id, name and type; genes.tsv of older versions has no type.
    lines = [line.split("\t") for line in read_lines(_find_file(path, "features"))]
    return FeatureTable(
        [line[0] for line in lines],
        [line[1] if len(line) > 1 else line[0] for line in lines],
        [line[2] if len(line) > 2 else "" for line in lines],
    )


def _find_file(folder: Path, name: str) -> Path:
    """The file that is the `name` of a folder: its matrix, barcodes or features."""
    for stem in _NAMES[name]:
        for path in (folder / stem, folder / f"{stem}.gz"):
            if path.is_file():
                return path
    raise DataError(
        "a folder that is no Matrix Market input",
        where=folder,
        got=f"no {_NAMES[name][0]}",
        expected="matrix.mtx, barcodes.tsv, features.tsv",
    )
