"""The formats of input files: one row for each; a new format needs a reader and a row here.

A format is recognised by what is in a file, not by what the file is called.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from clue_dist.errors import DataError, list_names
from clue_dist.store.location import Location
from data_prep.options import InputArgument, PerModality, ReadingOptions
from data_prep.readers.file_parts import FilePart
from data_prep.readers.fragments import (
    ConversionInput,
    FragmentsInput,
    is_fragments,
    list_fragments_parts,
    open_fragments,
)
from data_prep.readers.h5_file import has_hdf5, open_container
from data_prep.readers.h5ad import is_h5ad, list_h5ad_parts, open_h5ad
from data_prep.readers.h5mu import is_h5mu, list_h5mu_parts, open_h5mu
from data_prep.readers.matrix_market import (
    is_matrix_market,
    list_mtx_parts,
    open_matrix_market,
)
from data_prep.readers.mtx_files import is_seldom_meant, list_matrices, split_path
from data_prep.readers.other_formats import (
    UNKNOWN,
    FolderSearch,
    make_other_file_error,
    make_other_folder_error,
)
from data_prep.readers.source import decode_barcodes
from data_prep.readers.tenx import is_tenx, list_tenx_parts, open_tenx
from data_prep.readers.text_table import is_text_table, list_table_parts, open_text_table
from data_prep.readers.zarr_file import has_zarr


@dataclass(frozen=True)
class InputFormat:
    """How the files of one format are recognised and opened."""

    name: str  # for people
    # Locations are paths; formats of Zarr know URLs, too.
    recognises: Callable[[Any], bool]
    list_parts: Callable[[Any], list[FilePart]]
    # Opens one part as the modality of this name.
    open_part: Callable[[InputArgument, str, FilePart, ReadingOptions], ConversionInput]
    flags: tuple[str, ...] = ()  # of the command line, those that some formats alone know
    reads_urls: bool = False


# The first format that recognises a file reads it.
FORMATS = (
    InputFormat(
        "AnnData (.h5ad, .zarr)",
        is_h5ad,
        list_h5ad_parts,
        open_h5ad,
        ("--layer", "--feature-type"),
        reads_urls=True,
    ),
    InputFormat(
        "MuData (.h5mu, .zarr)",
        is_h5mu,
        list_h5mu_parts,
        open_h5mu,
        ("--layer", "--feature-type"),
        reads_urls=True,
    ),
    InputFormat("10x .h5", is_tenx, list_tenx_parts, open_tenx, ("--feature-type",)),
    InputFormat("a table as text", is_text_table, list_table_parts, open_text_table),
    InputFormat(
        "fragments.tsv.gz",
        is_fragments,
        list_fragments_parts,
        open_fragments,
    ),
    InputFormat(
        "a Matrix Market folder",
        is_matrix_market,
        list_mtx_parts,
        open_matrix_market,
        ("--feature-type",),
    ),
)


# What lies in files that are no inputs, and what to do with such a file.
_OTHER_FORMATS = {
    "strata": "this is a store: training reads it as it is, and `append` adds cells to it",
    "row_attrs": "this is a loom file: `anndata.io.read_loom` reads it, write_h5ad writes it",
    "assays": "this is Seurat's: write it as .h5ad, with SeuratDisk, sceasy or zellkonverter",
    "tables": "this is SpatialData: give the table in it, as `FILE/tables/table`",
    "Fragments": "this is ArchR's: give the fragments that it was made of, or a matrix that "
    "`getMatrixFromProject` reads in R",
    "barcode_idx": "this lists molecules: give the matrix that Cell Ranger wrote beside it",
}


# How far inputs are looked for in a folder: Cell Ranger's `outs` has them four folders below.
_DEEPEST_FOLDER = 4
_MOST_ENTRIES = 2000
_SEARCHED_SUFFIXES = {".h5", ".h5ad", ".h5mu", ".mtx", ".tsv", ".bed"}


@dataclass(frozen=True)
class PartDescription:
    """What one part of a file holds."""

    part: FilePart
    source: ConversionInput  # of the part, under the name that it suggests
    n_cells: int | None  # None: not known before the whole file is read, as of fragments
    n_features: int | None  # likewise
    holds_counts: bool  # whether the first values are whole and not negative
    barcodes: list[str]  # the first ones
    features: list[str]  # likewise
    obs_columns: list[str]


@dataclass(frozen=True)
class FileDescription:
    """What a file is, and what it holds."""

    path: Location
    format: InputFormat
    parts: list[PartDescription]


def describe_file(path: Location, shown: int = 1000) -> FileDescription:
    """Describe a file or folder of any format.

    Args:
        path: the file or folder.
        shown: how many barcodes and features are listed.

    Raises:
        DataError: the file is damaged, or in no format that is known.
    """
    input_format = find_format(path)
    parts = [
        _describe_part(input_format, path, part, shown) for part in input_format.list_parts(path)
    ]
    return FileDescription(path, input_format, parts)


def _describe_part(
    input_format: InputFormat, path: Location, part: FilePart, shown: int
) -> PartDescription:
    argument = InputArgument(path.name, path)
    modality = part.modality or part.suggestion
    options = ReadingOptions(layers=PerModality("--layer", next(iter(part.layers), None)))
    source = input_format.open_part(argument, modality, part, options)
    if isinstance(source, FragmentsInput):
        barcodes = source.read_first_barcodes(shown)
        return PartDescription(part, source, None, None, True, barcodes, [], [])
    head = source.read_head()
    barcodes = decode_barcodes(head.barcodes[:shown]).tolist()
    return PartDescription(
        part,
        source,
        head.n_rows,
        len(head.features),
        source.probe_counts(),
        barcodes,
        head.features[:shown],
        head.obs_columns,
    )


def find_format(location: Location) -> InputFormat:
    """Find the format of a file or folder, or of what lies behind a URL.

    Raises:
        DataError: the file is damaged, or in no format that is known.
        StoreError: a server fails.
    """
    if found := _match_format(location):
        return found
    if isinstance(location, Path) and not has_zarr(location):
        if location.is_dir():
            raise make_other_folder_error(
                location, find_inputs_below(location), list_format_names()
            )
        if not has_hdf5(location):
            raise make_other_file_error(location, list_format_names())
    with open_container(location) as file:
        advice = next((fix for name, fix in _OTHER_FORMATS.items() if name in file), None)
        top_level = list_names(file) or "nothing"
    raise DataError(
        UNKNOWN,
        where=location,
        got=f"top level: {top_level}",
        expected=list_format_names(),
        fix=advice,
    )


def _match_format(location: Location) -> InputFormat | None:
    """The first format that recognises a location."""
    is_local = isinstance(location, Path)
    known = (each for each in FORMATS if is_local or each.reads_urls)
    return next((each for each in known if each.recognises(location)), None)


def locate_input(path: Path) -> Path:
    """The only input in a folder that is none itself, as `Solo.out/Gene/raw` may be; else `path`.

    Raises:
        DataError: a file on the way cannot be read.
    """
    if not path.is_dir() or _match_format(path):
        return path
    below = find_inputs_below(path)
    return below.inputs[0] if len(below.inputs) == 1 and below.is_whole else path


def find_inputs_below(folder: Path) -> FolderSearch:
    """Find the inputs in a folder and in those below it, of its first `_MOST_ENTRIES` entries.

    Tables as text are passed over: reports are written as such.
    """
    found: list[Path] = []
    waiting, n_entries, is_whole = deque([(folder, 0)]), 0, True
    while waiting and is_whole:
        current, depth = waiting.popleft()
        with suppress(OSError):  # a folder that may not be read
            entries = sorted(current.iterdir())
            is_whole = len(entries) <= _MOST_ENTRIES - n_entries
            for entry in entries[: _MOST_ENTRIES - n_entries]:
                n_entries += 1
                if _is_input_below(entry):
                    found.append(entry)
                elif entry.is_dir() and depth < _DEEPEST_FOLDER and not has_zarr(entry):
                    waiting.append((entry, depth + 1))
    found.sort(key=lambda path: _rank_input(path.relative_to(folder)))
    return FolderSearch(found, n_entries, is_whole)


def _is_input_below(entry: Path) -> bool:
    if entry.is_dir() and not has_zarr(entry):
        return bool(list_matrices(entry))
    if entry.is_file() and not {*entry.suffixes} & _SEARCHED_SUFFIXES:
        return False
    try:
        known = _match_format(entry)
    except DataError:  # a damaged file beside the others
        return False
    return known is not None and known.recognises is not is_text_table


def _rank_input(path: Path) -> tuple[bool, bool, int, str]:
    """Sort filtered matrices before others, and these before raw ones."""
    is_unusual = split_path(str(path)).isdisjoint({"filtered", "umi"})
    return is_seldom_meant(str(path)), is_unusual, len(path.parts), str(path)


def list_format_names() -> str:
    """The names of all formats, in one phrase."""
    names = [known.name for known in FORMATS]
    return f"{', '.join(names[:-1])} or {names[-1]}"
