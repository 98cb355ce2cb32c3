"""The files of a Matrix Market input: a matrix, and lists of barcodes and features beside it.

Cell Ranger calls them matrix.mtx, barcodes.tsv and features.tsv (genes.tsv, peaks.bed); uploads to
GEO have the sample's name before that. kallisto-bustools writes cells_x_genes.mtx,
cells_x_genes.barcodes.txt and cells_x_genes.genes.txt; alevin quants_mat.mtx, quants_mat_rows.txt
and quants_mat_cols.txt. Each may be gzipped.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from itertools import takewhile
from pathlib import Path
from typing import NamedTuple

from clue_dist.errors import DataError, list_names
from data_prep.readers.text_files import UNREADABLE, open_text

_ENDING = r"\.(tsv|txt|bed)(\.gz)?"
_MATRIX = re.compile(r".*\.mtx(\.gz)?", re.IGNORECASE)
# Words before an ending, in the order in which one is taken where there are several.
_BARCODES = ("barcodes?", "quants_mat_rows", "cells?")
_FEATURES = ("features?", "genes?", "peaks?", "quants_mat_cols", "proteins?")
_CELLS_IN_ROWS = re.compile(r"(.*[._-])?(cells_x_\w+|quants_mat)\.mtx(\.gz)?", re.IGNORECASE)


class MtxFiles(NamedTuple):
    """The three files of an input."""

    matrix: Path
    barcodes: Path
    features: Path

    @property
    def cells_in_rows(self) -> bool:
        """Whether a matrix of this name has cells in its rows, which its size usually shows."""
        return _CELLS_IN_ROWS.fullmatch(self.matrix.name) is not None


def is_mtx_file(path: Path) -> bool:
    """Whether a file begins as Matrix Market files do."""
    try:
        with open_text(path) as file:
            return file.readline(64).lower().startswith("%%matrixmarket")
    except UNREADABLE:
        return False


def find_mtx_files(path: Path) -> MtxFiles:
    """Find the three files of an input.

    Args:
        path: a folder, or the matrix itself, if several lie in one folder.

    Raises:
        DataError: one of the files is missing; a folder holds several matrices.
    """
    folder = path if path.is_dir() else path.parent
    # An unzipped file comes before its gzipped twin.
    files = sorted(file for file in folder.iterdir() if file.is_file())
    matrix = _find_matrix(path, files) if path.is_dir() else path
    barcodes = _find_closest(matrix, files, _BARCODES)
    features = _find_closest(matrix, files, _FEATURES)
    if barcodes is None or features is None:
        missing = "barcodes.tsv" if barcodes is None else "features.tsv"
        raise _describe_missing(path, missing, files)
    return MtxFiles(matrix, barcodes, features)


def _find_matrix(folder: Path, files: Sequence[Path]) -> Path:
    matrices = [file for file in files if _MATRIX.fullmatch(file.name)]
    # Beside the usual matrix, STARsolo leaves others, which count multimappers, too.
    names = ("matrix.mtx", "matrix.mtx.gz")
    usual = [file for name in names for file in matrices if file.name == name]
    if not matrices:
        raise _describe_missing(folder, "matrix.mtx", files)
    if len(matrices) > 1 and not usual:
        raise DataError(
            "a folder with several matrices",
            where=folder,
            got=list_names(file.name for file in matrices),
            fix=f"give one of these files instead of the folder: `rna={matrices[0]}`, say; keep "
            "samples apart by a data set's name, `sample1:rna=FILE`",
        )
    return (usual or matrices)[0]


def _find_closest(matrix: Path, files: Sequence[Path], words: Sequence[str]) -> Path | None:
    """The file of the same sample: its name shares the longest beginning with the matrix's name.

    Of those that share as much, the first by words is taken, then the one with the shortest name.
    """
    found = []
    for rank, word in enumerate(words):
        pattern = re.compile(rf"(.*[._-])?({word}){_ENDING}", re.IGNORECASE)
        for file in files:
            if pattern.fullmatch(file.name):
                same = takewhile(
                    lambda pair: pair[0] == pair[1], zip(matrix.name, file.name, strict=False)
                )
                found.append((-len(list(same)), rank, len(file.name), file))
    return min(found)[-1] if found else None


def _describe_missing(path: Path, name: str, files: Sequence[Path]) -> DataError:
    return DataError(
        "a folder that is no Matrix Market input",
        where=path,
        got=f"no {name}; files: {list_names([file.name for file in files]) or 'none'}",
        expected="matrix.mtx, barcodes.tsv, features.tsv, or as kallisto and alevin call them",
    )
