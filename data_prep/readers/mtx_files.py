"""The files of a Matrix Market input: a matrix, and lists of barcodes and features beside it.

Cell Ranger calls them matrix.mtx, barcodes.tsv and features.tsv (genes.tsv, peaks.bed); uploads to
GEO have the sample's name before that. kallisto-bustools writes cells_x_genes.mtx,
cells_x_genes.barcodes.txt and cells_x_genes.genes.txt; alevin quants_mat.mtx, quants_mat_rows.txt
and quants_mat_cols.txt. Each may be gzipped. Lists that were written in R or with pandas may have a
header, numbers of rows and quotes.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import NamedTuple

from clue_dist.errors import DataError, list_names
from data_prep.readers.text_files import UNREADABLE, open_text, read_lines, split_fields

_ENDING = r"\.(tsv|txt|csv|bed)(\.gz)?"
# How the name of a list may hold a word: GSM1_barcodes.tsv, or else GSM1_barcodes_sample.tsv.
_AT_THE_END = r"(.*[._-])?({word})" + _ENDING
_WITHIN = r"(.*[._-])?({word})([._-].*)?" + _ENDING
_MATRIX = re.compile(r".*\.mtx(\.gz)?", re.IGNORECASE)
# Words before an ending, in the order in which one is taken where there are several.
_BARCODES = ("barcodes?", "quants_mat_rows", "cells?")
_FEATURES = ("features?", "genes?", "peaks?", "quants_mat_cols", "proteins?")
# Words of paths to matrices of every droplet, of reads, and of introns or junctions alone.
_SELDOM_MEANT = {"raw", "read", "velocyto", "sj", "unspliced", "ambiguous", "nascent"}
_CELLS_IN_ROWS = re.compile(r"(.*[._-])?(cells_x_\w+|quants_mat)\.mtx(\.gz)?", re.IGNORECASE)

# The first field of a header. Nothing stands there where the columns alone have names.
_HEADER = re.compile(
    r"(x|v1|0|index|colnames\.x\.|cells\.use|"
    r"(cell|gene|feature|peak|protein)?[ ._]?(barcode|id|name|symbol)?s?)",
    re.IGNORECASE,
)


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
    files = sorted(file for file in folder.iterdir() if file.is_file())
    if path.is_dir() and not list_matrices(path):
        below = _list_folders(path)
        if len(below) == 1:
            return find_mtx_files(below[0])
        raise _make_missing_error(path, "matrix.mtx", below or files)
    matrix = _find_matrix(path) if path.is_dir() else path
    barcodes = _find_closest(matrix, files, _BARCODES)
    features = _find_closest(matrix, files, _FEATURES)
    if barcodes is None or features is None:
        missing = "barcodes.tsv" if barcodes is None else "features.tsv"
        raise _make_missing_error(path, missing, files)
    return MtxFiles(matrix, barcodes, features)


def holds_matrix(folder: Path) -> bool:
    """Whether a matrix lies in a folder, or in one alone of the folders in it."""
    return bool(list_matrices(folder)) or len(_list_folders(folder)) == 1


def _list_folders(folder: Path) -> list[Path]:
    """The folders of a folder that hold a matrix.

    Cell Ranger 2 makes one for each genome, alevin one in its output. CITE-seq-Count counts reads
    beside molecules, which are never meant where both are there.
    """
    found = [each for each in sorted(folder.iterdir()) if each.is_dir() and list_matrices(each)]
    molecules = [each for each in found if each.name == "umi_count"]
    return molecules if {each.name for each in found} == {"umi_count", "read_count"} else found


def list_matrices(folder: Path) -> list[Path]:
    """The matrices of a folder; an unzipped one comes before its gzipped twin."""
    files = (file for file in folder.iterdir() if _MATRIX.fullmatch(file.name))
    return sorted(file for file in files if file.is_file())


def split_path(path: str) -> set[str]:
    """The words of a path, in lower case."""
    return set(re.split(r"[^a-z0-9]+", path.lower().replace("unfiltered", "raw")))


def is_seldom_meant(path: str) -> bool:
    """Whether a matrix of this path is seldom what a person means, where there are others."""
    return not split_path(path).isdisjoint(_SELDOM_MEANT)


def _find_separator(line: str) -> str | None:
    """What follows the first field of a line, which stands in quotes."""
    match = re.match(r'"[^"]*"([\t,; ])', line)
    return match[1] if match else None


def read_list(path: Path, sizes: Collection[int]) -> list[list[str]]:
    """Read the fields of each line of a list, without a header, numbers of rows and quotes.

    Args:
        path: the list of barcodes or features.
        sizes: the numbers of rows and columns of the matrix. A list that fits has no header.

    Raises:
        DataError: the file cannot be read as text.
    """
    separator = "," if ".csv" in path.suffixes else "\t"
    lines = read_lines(path)
    is_quoted = all(line.startswith('"') for line in lines)
    if is_quoted:  # R's write.table puts blanks between them
        separator = next(filter(None, map(_find_separator, lines)), separator)
    rows = [
        (is_quoted and split_fields(line, separator)) or line.split(separator) for line in lines
    ]
    is_longer = len(rows) not in sizes and len(rows) - 1 in sizes
    if is_longer and rows[0] and _HEADER.fullmatch(rows[0][0]):
        rows = rows[1:]
    first_column = [row[0] if len(row) > 1 else "" for row in rows]
    if first_column and first_column[0] in ("0", "1"):
        first = int(first_column[0])
        if first_column == [str(number) for number in range(first, first + len(rows))]:
            rows = [row[1:] for row in rows]
    return rows


def _find_matrix(folder: Path) -> Path:
    matrices = list_matrices(folder)
    # Beside the usual matrix, STARsolo leaves others, which count multimappers, too.
    names = ("matrix.mtx", "matrix.mtx.gz")
    usual = [file for name in names for file in matrices if file.name == name]
    if len(matrices) > 1 and not usual:
        likely = min(matrices, key=lambda file: is_seldom_meant(file.name))
        raise DataError(
            "a folder with several matrices",
            where=folder,
            got=list_names(file.name for file in matrices),
            fix=f"give one of these files instead of the folder: `rna={likely}`, say; keep "
            "samples apart by a data set's name, `sample1:rna=FILE`",
        )
    return (usual or matrices)[0]


def _find_closest(matrix: Path, files: Sequence[Path], words: Sequence[str]) -> Path | None:
    """The file of the same sample, whose name shares most words with the matrix's name.

    Of those that share as many, the first by `words` is taken, then the one with the shortest name.
    """
    sample, found = set(_split_words(matrix)), []
    for form_rank, form in enumerate((_AT_THE_END, _WITHIN)):
        for rank, word in enumerate(words):
            pattern = re.compile(form.format(word=word), re.IGNORECASE)
            for file in files:
                if pattern.fullmatch(file.name):
                    n_shared = len(sample & set(_split_words(file)))
                    found.append((-n_shared, form_rank, rank, len(file.name), file))
    return min(found)[-1] if found else None


def _split_words(file: Path) -> list[str]:
    return re.split(r"[._-]", file.name.lower().removesuffix(".gz"))[:-1]


def _make_missing_error(path: Path, name: str, files: Sequence[Path]) -> DataError:
    return DataError(
        "a folder that is no Matrix Market input",
        where=path,
        got=f"no {name}; files: {list_names([file.name for file in files]) or 'none'}",
        expected="matrix.mtx, barcodes.tsv, features.tsv, or as kallisto and alevin call them",
    )
