"""What is no input: what it seems to be, by its first bytes or its name, and the way on."""

from __future__ import annotations

import bz2
import codecs
import gzip
import lzma
import re
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

from clue_dist.errors import DataError, list_names
from data_prep.readers.text_files import UNREADABLE

UNKNOWN = "not in a format this reader knows"
_WRITE_IN_R = (
    '`DropletUtils::write10xCounts("x.h5", x[["RNA"]]$counts, version = "3")` for a Seurat object '
    'x (of version 4 or older, `x[["RNA"]]@counts`), `zellkonverter::writeH5AD(x, "x.h5ad")` '
    'for a SingleCellExperiment, `Matrix::writeMM(x, "matrix.mtx")` for a matrix'
)


class FolderSearch(NamedTuple):
    """The inputs that were found in a folder and below it."""

    inputs: list[Path]  # what is usually meant comes first
    n_entries: int  # files and folders that were looked at
    is_whole: bool  # whether these are all


class _OtherFormat(NamedTuple):
    """What files of one format begin with, and what to do with them."""

    name: str
    fix: str
    signatures: tuple[bytes, ...] = ()  # one of which its first bytes are, once it is unpacked
    offset: int = 0  # of the signature
    suffixes: tuple[str, ...] = ()  # which tell it where no signature does
    is_text: bool = False  # a text, too, may begin with a signature; other formats are binary


_ZIP = (b"PK\x03\x04", b"PK\x05\x06")
# The first row that fits says what a file is.
_OTHERS = (
    _OtherFormat("an R workspace", f'in R, `load("FILE")`, then {_WRITE_IN_R}',
                 (b"RDX2\n", b"RDX3\n", b"RDA2\n", b"RDA3\n"), suffixes=(".rdata", ".rda"),
                 is_text=True),
    _OtherFormat("an object of R, as Seurat's are kept",
                 f'in R, `x <- readRDS("FILE")`, then {_WRITE_IN_R}',
                 (b"X\n\x00\x00\x00", b"A\n2\n", b"A\n3\n"), suffixes=(".rds",), is_text=True),
    _OtherFormat("a tar archive", "unpack it, `tar -xf FILE`, and give what lies in it",
                 (b"ustar",), 257, (".tar", ".tgz")),
    _OtherFormat("an Excel workbook", "save its sheet as .csv, with nothing beside the table",
                 (b"\xd0\xcf\x11\xe0",), suffixes=(".xlsx", ".xls")),
    _OtherFormat("arrays of NumPy or SciPy", "put the matrix, barcodes and features into an "
                 "AnnData, and `write_h5ad`", (b"\x93NUMPY",), suffixes=(".npz", ".npy")),
    _OtherFormat("a zip archive", "unpack it, `unzip FILE`, and give what lies in it", _ZIP),
    _OtherFormat("a Parquet table", "`pandas.read_parquet('FILE').to_csv('table.csv.gz')`, with "
                 "the names of cells as its index", (b"PAR1",), suffixes=(".parquet",)),
    _OtherFormat("a Feather table", "`pandas.read_feather('FILE').to_csv('table.csv.gz')`",
                 (b"ARROW1", b"FEA1"), suffixes=(".feather",)),
    _OtherFormat("a pickle of Python", "load it where you trust it, and `write_h5ad`",
                 tuple(bytes([128, version]) for version in range(2, 6)), suffixes=(".pkl",)),
    _OtherFormat("aligned reads", "count them first, with Cell Ranger or STARsolo, say",
                 (b"BAM\x01", b"CRAM"), suffixes=(".bam", ".cram", ".fastq", ".fq")),
    _OtherFormat("a web page", "a download gave it in place of the file: download it again",
                 (b"<!DOCTYPE", b"<!doctype", b"<html", b"<HTML"), is_text=True),
    _OtherFormat("a pointer of git LFS", "`git lfs pull` gets the file that it stands for",
                 (b"version https://git-lfs",), is_text=True),
    _OtherFormat("packed by xz, bzip2 or zstd", "unpack it",
                 (b"\xfd7zXZ", b"BZh", b"\x28\xb5\x2f\xfd")),
    _OtherFormat("an HDF5 file that is packed", "unpack it, as by `gunzip FILE`",
                 (b"\x89HDF\r\n\x1a\n",)),
    _OtherFormat("named as an HDF5 file, but no HDF5",
                 "check that the file is complete, and copy it again",
                 suffixes=(".h5ad", ".h5mu", ".h5", ".hdf5", ".loom", ".h5seurat")),
)  # fmt: skip
_PROBED_BYTES = 2048
_CONTROL_LETTERS = re.compile(r"[\x00-\x08\x0e-\x1f]")
# Files in a folder that tell what it is.
_OTHER_FOLDERS = {
    "__tiledb_group.tdb": "a TileDB-SOMA experiment: `tiledbsoma.io.to_h5ad` reads it",
    "index_data": "a matrix of BPCells: `write_matrix_anndata_hdf5` writes it as .h5ad, in R",
    "quants_mat.gz": "alevin's own format: run it with `--dumpMtx`, or read it with pyroe",
    "ArrowFiles": "a project of ArchR: `getMatrixFromProject` reads it in R, or give the "
    "fragments it was made of",
}


def make_other_file_error(path: Path, expected: str) -> DataError:
    """Make an error that says what a file seems to be, which is no HDF5 and no table.

    Args:
        path: the file.
        expected: the formats that are read.
    """
    head = _read_head(path)
    name, fix = _name_format(path, head)
    return DataError(UNKNOWN, where=path, got=name, expected=expected, fix=fix)


def _name_format(path: Path, head: bytes) -> tuple[str, str]:
    if not path.stat().st_size:
        return "an empty file", "copy or download it again"
    suffixes = {suffix.lower() for suffix in path.suffixes[-2:]}
    text = _decode_text(head)
    by_bytes = [
        each
        for each in _OTHERS
        if head[each.offset :].startswith(each.signatures) and (each.is_text or text is None)
    ]
    by_name = [each for each in _OTHERS if suffixes.intersection(each.suffixes)]
    # A workbook is a zip archive, and so are arrays of NumPy: there, the name says more.
    if by_bytes and by_name and by_bytes[0].signatures == _ZIP:
        by_bytes = by_name
    if found := by_bytes or by_name:
        return found[0].name, found[0].fix.replace("FILE", path.name)
    if text is None:
        return f"binary: {head[:16]!r} ...", "write its counts as .h5ad, or as text in UTF-8"
    lines = [line for line in text.splitlines() if not line.startswith("#")]
    if not "".join(lines).strip():
        return "a text without a line, but for comments", "check that the file is complete"
    if all(len(line.split()) == 1 and "," not in line for line in lines[:-1] or lines):
        return f"a list of names: {list_names(lines[:3])} ...", (
            "give the matrix, or the folder in which this list lies beside it; as a list of cells, "
            f"`--barcodes atac={path.name}`"
        )
    return f"a text that begins {lines[0][:80]!r}", (
        "tables have names in the first line and the first column, and numbers beside; fragments "
        "have chromosome, start, end and barcode, with tabs between"
    )


def _decode_text(head: bytes) -> str | None:
    """The text that a file begins with; None where its first bytes are no text."""
    try:
        # The decoder waits for the rest of a letter that is cut at the end.
        text = codecs.getincrementaldecoder("utf-8")().decode(head)
    except UnicodeDecodeError:
        return None
    return None if _CONTROL_LETTERS.search(text) else text


def _read_head(path: Path) -> bytes:
    """The first bytes of what a file holds, once it is unpacked."""
    unpackers: tuple[Callable[[Path], Any], ...] = (gzip.open, bz2.open, lzma.open)
    for unpack in unpackers:
        with suppress(*UNREADABLE, lzma.LZMAError), unpack(path) as file:
            return bytes(file.read(_PROBED_BYTES))
    with path.open("rb") as file:
        return file.read(_PROBED_BYTES)


def make_other_folder_error(path: Path, below: FolderSearch, expected: str) -> DataError:
    """Make an error that says what a folder that is no input holds.

    Args:
        path: the folder.
        below: the inputs that were found in it.
        expected: the formats that are read.
    """
    names = sorted(file.name for file in path.iterdir())
    searched = "" if below.is_whole else f", in its first {below.n_entries:,} files and folders"
    if below.inputs:
        paths = [str(each.relative_to(path)) for each in below.inputs]
        return DataError(
            "a folder that holds several inputs"
            if below.is_whole
            else "a folder that is too large to find its inputs",
            where=path,
            got=list_names(paths) + searched,
            fix=f"give one of them in place of the folder: `{below.inputs[0]}`, say",
        )
    known = [name for name in _OTHER_FOLDERS if name in names]
    return DataError(
        "a folder in which no input lies",
        where=path,
        got=(list_names(names) or "an empty folder") + searched,
        expected=f"matrix.mtx, barcodes.tsv, features.tsv, or as kallisto and alevin call them; "
        f"otherwise {expected}",
        fix=f"this is {_OTHER_FOLDERS[known[0]]}" if known else None,
    )
