"""Matrix Market folders as 10x writes them: matrix.mtx, barcodes.tsv, features.tsv (or genes.tsv), each maybe gzipped.

Entries may come in any order, so the text is read once, in pieces, and kept as sorted parts (see `entries`).
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
from data_prep.jobs.whole_files import make_whole_folder
from data_prep.readers import sorted_entries
from data_prep.readers.source import (
    SourceHead,
    SourceRows,
    encode_barcodes,
    identify_file,
    select_columns,
)
from data_prep.readers.tenx import TENX_COLUMNS, FeatureTable
from data_prep.readers.text_files import LINE, UNREADABLE, explain_unreadable, open_text, read_lines


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
        files = [
            identify_file(_find(self.path, name)) for name in ("matrix", "barcodes", "features")
        ]
        kept = {
            "feature_type": self.feature_type,
            "modality": self.modality,
            "dataset": self.dataset,
            "ids": self.id_columns,
        }
        return {"files": files} | kept

    def read_head(self) -> SourceHead:
        table = read_mtx_features(self.path)
        barcodes = read_lines(_find(self.path, "barcodes"))
        matrix = _find(self.path, "matrix")
        try:
            with open_text(matrix) as file:
                n_features, n_cells, nnz = self._sizes(file)
        except UNREADABLE as error:
            raise explain_unreadable(matrix, error) from None
        if (n_features, n_cells) != (len(table.ids), len(barcodes)):
            turned = (n_cells, n_features) == (len(table.ids), len(barcodes))
            raise DataError(
                "the matrix does not fit its features and barcodes",
                where=f"{self.path.name}: header of the matrix",
                got=f"{n_features} x {n_cells}",
                expected=f"{len(table.ids)} features x {len(barcodes)} barcodes",
                fix="the matrix is transposed: write it as features x cells"
                if turned
                else "check that the three files belong together",
            )
        wanted, names, named_by = table.select(self.feature_type, self.id_columns)
        share = nnz * len(wanted) // max(len(table.ids), 1)
        cells = encode_barcodes([b.split("\t")[0] for b in barcodes], f"{self.path.name}: barcodes")
        return SourceHead(cells, names, share, {}, [], list(TENX_COLUMNS), named_by)

    def count_parts(self) -> int:
        return 1  # text, and perhaps gzip, can only be read from its start

    def prepare_part(self, part: int, scratch: Path) -> None:
        path = _find(self.path, "matrix")
        with make_whole_folder(scratch / f"{part:06d}") as folder, open_text(path) as file:
            n_features, n_cells, nnz = self._sizes(file)
            seen = 0
            for i, piece in enumerate(self._pieces(file) if nnz else []):
                self._validate(piece, seen, n_features, n_cells)
                seen += len(piece)
                row, column, value = (piece[k].to_numpy() for k in range(3))
                sorted_entries.write_sorted_part(folder / f"{i:06d}", column - 1, row - 1, value)
            if seen != nnz:
                raise DataError(
                    "the matrix ends early or late",
                    where=path.name,
                    got=f"{seen} entries",
                    expected=f"{nnz}, as its header says",
                )

    def read_rows(self, start: int, stop: int, scratch: Path) -> SourceRows:
        table = read_mtx_features(self.path)
        rows = sorted_entries.read_sorted_rows(
            sorted((scratch / "000000").glob("[0-9]" * 6)), start, stop, len(table.ids)
        )
        return select_columns(rows, table.select(self.feature_type)[0])

    def list_other_counts(self) -> list[str]:
        return []

    def _sizes(self, file: IO[str]) -> tuple[int, int, int]:
        """Read the header up to and with the sizes line; the file stands at the first entry then."""
        where = f"{self.path.name}: {_find(self.path, 'matrix').name}"
        banner = file.readline(LINE).split()
        fits = [w.lower() for w in banner[:3]] == [
            "%%matrixmarket",
            "matrix",
            "coordinate",
        ] and len(banner) == 5
        if (
            not fits
            or banner[3].lower() not in ("integer", "real")
            or banner[4].lower() != "general"
        ):
            expected = "%%MatrixMarket matrix coordinate integer (or real) general"
            raise DataError(
                "not a Matrix Market header this reader knows",
                where=where,
                got=" ".join(banner)[:80],
                expected=expected,
            )
        line = file.readline(LINE)
        while line.startswith("%") or line.isspace():
            line = file.readline(LINE)
        sizes = line.split()
        if len(sizes) != 3 or not all(re.fullmatch("[0-9]{1,18}", s) for s in sizes):
            raise DataError(
                "the sizes line is wrong",
                where=where,
                got=line.strip()[:80],
                expected="FEATURES CELLS ENTRIES",
            )
        return int(sizes[0]), int(sizes[1]), int(sizes[2])

    def _pieces(self, file: IO[str]) -> Iterator[pd.DataFrame]:
        """The entries, some at a time; parse errors as DataErrors."""
        try:
            how: dict[str, Any] = {
                "sep": r"\s+",
                "header": None,
                "comment": "%",
                "quoting": csv.QUOTE_NONE,
            }
            yield from pd.read_csv(file, chunksize=sorted_entries.PART_ENTRIES, **how)
        except (ValueError, OverflowError, *UNREADABLE) as error:  # those of pandas are ValueErrors
            raise DataError(
                "the matrix cannot be read to its end", where=self.path.name, got=str(error).strip()
            ) from None

    def _validate(self, piece: pd.DataFrame, before: int, n_features: int, n_cells: int) -> None:
        where = f"{self.path.name}: matrix"
        if (
            piece.shape[1] != 3
            or any(piece[k].dtype.kind not in "iuf" for k in range(3))
            or piece[[0, 1]].dtypes.ne("int64").any()
        ):
            got = piece.iloc[0].tolist()
            raise DataError(
                "an entry is not `feature cell count`",
                where=f"{where}, entries from {before + 1}",
                got=got,
            )
        bad = np.flatnonzero(
            ~(piece[0].between(1, n_features) & piece[1].between(1, n_cells)).to_numpy()
        )
        if len(bad):
            at = int(bad[0])
            feature, cell = (int(piece[k].iloc[at]) for k in (0, 1))
            raise DataError(
                "an entry lies outside the matrix",
                where=f"{where}, entry {before + at + 1}",
                got=f"feature {feature}, cell {cell}",
                expected=f"feature 1 to {n_features}, cell 1 to {n_cells} (counted from 1)",
            )


def read_mtx_features(path: Path) -> FeatureTable:
    """The feature table of a Matrix Market folder: id, name and type, as many of them as there are."""
    lines = [line.split("\t") for line in read_lines(_find(path, "features"))]
    return FeatureTable(
        [line[0] for line in lines],
        [line[1] if len(line) > 1 else line[0] for line in lines],
        [line[2] if len(line) > 2 else "" for line in lines],
    )


def _find(folder: Path, name: str) -> Path:
    stems = {
        "matrix": ["matrix.mtx"],
        "barcodes": ["barcodes.tsv"],
        "features": ["features.tsv", "genes.tsv"],
    }[name]
    for stem in stems:
        for path in (folder / stem, folder / f"{stem}.gz"):
            if path.is_file():
                return path
    raise DataError(
        "a folder that is no Matrix Market input",
        where=folder,
        got=f"no {stems[0]}",
        expected="matrix.mtx, barcodes.tsv, features.tsv",
    )
