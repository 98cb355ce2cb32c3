"""Fragments files (10x `fragments.tsv.gz`), counted by cell and bin of the genome.

A line is a fragment: chromosome, start, end, barcode. A file is text, so one task reads it from its
start, chunk by chunk; several files are read at once. The counts are left as sorted parts (see
`sorted_entries`), from which rows are read like those of any other source.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import pandas as pd

from clue_dist.errors import DataError, list_names
from clue_dist.files import parse_path
from clue_dist.kinds import KINDS, infer_kind
from clue_dist.store.location import Location
from data_prep.jobs.array_files import load_array, save_array
from data_prep.jobs.whole_folders import make_whole_folder
from data_prep.jobs.workers import WorkerPool, run_missing
from data_prep.options import FeatureChoice, InputArgument, ReadingOptions
from data_prep.readers import sorted_entries
from data_prep.readers.file_parts import FilePart
from data_prep.readers.genome_bins import name_bin
from data_prep.readers.listed_cells import CellList, list_allowed_barcodes
from data_prep.readers.snapatac import read_stored_fragments
from data_prep.readers.source import (
    DirectSource,
    Source,
    SourceHead,
    SourceRows,
    decode_barcodes,
    encode_barcodes,
    identify_file,
)
from data_prep.readers.text_files import MOST_LETTERS, UNREADABLE, CommentFilter, open_text

CHUNK_LINES = 2**21  # read at once: about 100 MB
PROBED_BARCODES = 2**16  # compared with a list that names none of a file's barcodes
_COLUMNS = {"chromosome": "category", "start": "int64", "end": "int64", "barcode": "category"}
# Two numbers share one integer: a chromosome's and a bin's, or a row and a column. A bin's number
# fits into the lower bits, as no chromosome is longer than 2^32 base pairs.
_SHIFT = 32
_LOWER_BITS = 2**_SHIFT - 1


def is_fragments(path: Path) -> bool:
    """Whether the first line of a file that is no comment reads as a fragment."""
    if not path.is_file():
        return False
    try:
        with open_text(path) as file:
            line = "#"
            while line.startswith("#"):
                line = file.readline(MOST_LETTERS)
    except UNREADABLE:
        return False
    return _is_fragment(line)


def list_fragments_parts(path: Path) -> list[FilePart]:
    """The one part that a fragments file has."""
    return [FilePart("", suggestion="atac", is_whole=True)]


def open_fragments(
    argument: InputArgument, modality: str, part: FilePart, options: ReadingOptions
) -> FragmentsInput:
    """The input that a fragments file is.

    Raises:
        DataError: the modality is of a kind that has no bins.
    """
    kind = infer_kind(modality, options.kinds)
    if not KINDS[kind].binnable:
        binnable = list_names(name for name, row in KINDS.items() if row.binnable)
        what, fix = f"fragments are of kind {binnable}", f"`atac={argument.path.name}`"
        raise DataError(what, where=argument.text, got=kind, fix=fix)
    allowed = options.barcodes.get_value(modality)
    key = part.key or None
    return FragmentsInput(
        argument.path, modality, argument.dataset, options.cut_sites, allowed, key
    )


def _is_fragment(line: str) -> bool:
    fields = line.rstrip("\r\n").split("\t")
    return len(fields) >= 4 and fields[1].isdecimal() and fields[2].isdecimal()


@dataclass(frozen=True)
class FragmentsInput:
    """A fragments file as a person gave it; `count_fragments` makes a source of it."""

    path: Location
    modality: str
    dataset: str = ""
    # Count both ends of a fragment, each in its own bin, and not the fragment in its middle's bin.
    cut_sites: bool = False
    # A list of barcodes, or another modality: only its cells are counted. None: every barcode.
    allowed: str | None = None
    key: str | None = None  # where they lie in an .h5ad of SnapATAC2; None: the file is text

    @property
    def display_name(self) -> str:
        return f"{self.path.name}/{self.key}" if self.key else self.path.name

    @property
    def counted_unit(self) -> str:
        return "cut sites" if self.cut_sites else "fragments"

    def describe_identity(self) -> dict[str, Any]:
        """What must be unchanged for an interrupted conversion to go on."""
        is_list = self.allowed and parse_path(self.allowed).is_file()
        key = {"matrix": self.key} if self.key else {}
        return (
            identify_file(self.path)
            | key
            | {
                "modality": self.modality,
                "dataset": self.dataset,
                "cut_sites": self.cut_sites,
                "limit": self.allowed,
                "barcodes": identify_file(parse_path(self.allowed))
                if self.allowed and is_list
                else None,
            }
        )

    def read_first_barcodes(self, number: int) -> list[str]:
        """Read the first different barcodes of the file, in the order of its lines."""
        barcodes: dict[str, None] = {}
        for chunk in _read_chunks(self, 2**16):
            barcodes |= dict.fromkeys(chunk["barcode"].unique().tolist())
            break
        return list(barcodes)[:number]


# What the command line gives: most inputs are sources from the start.
ConversionInput: TypeAlias = Source | FragmentsInput


@dataclass(frozen=True)
class FragmentsSource(DirectSource):
    """A fragments file that has been counted."""

    given: FragmentsInput
    folder: Path  # folder of parts, barcodes.npy and bins.npy

    @property
    def modality(self) -> str:
        return self.given.modality

    @property
    def dataset(self) -> str:
        return self.given.dataset

    @property
    def display_name(self) -> str:
        return self.given.display_name

    @property
    def counted_unit(self) -> str:
        return self.given.counted_unit

    def describe_identity(self) -> dict[str, Any]:
        return self.given.describe_identity()

    def read_head(self) -> SourceHead:
        barcodes = load_array(self.folder / "barcodes.npy")
        bins = decode_barcodes(load_array(self.folder / "bins.npy")).tolist()
        parts = sorted_entries.list_sorted_parts(self.folder)
        nnz = sum(len(load_array(part / "rows.npy")) for part in parts)
        return SourceHead(barcodes, bins, nnz, {}, [])

    def read_rows(self, start: int, stop: int, scratch: Path) -> SourceRows:
        n_bins = len(load_array(self.folder / "bins.npy"))
        return sorted_entries.read_sorted_rows(self.folder, start, stop, n_bins)


@dataclass(frozen=True)
class _CountTask:
    given: FragmentsInput
    bin_width: int
    barcodes: Path | None  # a file of those to count; None: every barcode
    by_core: bool  # whether these are compared by their cores
    out: Path


def count_fragments(
    inputs: Sequence[ConversionInput],
    choices: Mapping[str, FeatureChoice],
    work: Path,
    pool: WorkerPool,
    by_core: bool = False,
) -> list[Source]:
    """Make a source of every fragments file among the inputs; the other inputs are sources.

    Args:
        inputs: inputs of the conversion.
        choices: choices of features, by modality; they say how wide bins are.
        work: a folder for the counts.
        pool: counts the files.
        by_core: whether barcodes of lists are compared by their cores.

    Raises:
        DataError: the width of bins is missing; a file, or a list of barcodes, is damaged.
    """
    sources: list[Source] = []
    tasks: dict[Path, _CountTask] = {}
    others = [given for given in inputs if not isinstance(given, FragmentsInput)]
    for i, given in enumerate(inputs):
        if not isinstance(given, FragmentsInput):
            sources.append(given)
            continue
        bin_width = choices.get(given.modality, FeatureChoice()).bin_width
        if bin_width is None:
            what = "fragments are counted in bins of the genome: how wide?"
            fix = f"`--bins {given.modality}=5000`, in base pairs"
            raise DataError(what, where=given.display_name, fix=fix)
        out, barcodes = work / f"{i:03d}", None
        if given.allowed is not None:
            work.mkdir(parents=True, exist_ok=True)
            barcodes = work / f"keep{i:03d}.npy"
            listed = list_allowed_barcodes(given.modality, given.dataset, given.allowed, others)
            save_array(barcodes, listed)
        tasks[out] = _CountTask(given, bin_width, barcodes, by_core, out)
        sources.append(FragmentsSource(given, out))
    if tasks:
        run_missing(pool, "count fragments", _count_file, tasks)
    return sources


class _Numbering:
    """Numbers things in the order in which they are first seen."""

    def __init__(self) -> None:
        self.numbers: dict[Any, int] = {}

    def number_values(self, values: list[Any]) -> np.ndarray:
        numbers = [self.numbers.setdefault(value, len(self.numbers)) for value in values]
        return np.array(numbers, np.int64)

    def number_categories(self, column: pd.Series) -> np.ndarray:
        """Numbers of a categorical column, (n,)."""
        return self.number_values(column.cat.categories.tolist())[column.cat.codes]


def _count_file(task: _CountTask) -> None:
    """Count one file into a folder of parts, barcodes.npy and bins.npy."""
    allowed = None
    if task.barcodes is not None:
        allowed = CellList(load_array(task.barcodes), task.by_core)
    first_barcodes = np.empty(0, "S1")
    cells, chromosomes, bins = _Numbering(), _Numbering(), _Numbering()
    where = task.given.display_name
    with make_whole_folder(task.out) as folder:
        for part, chunk in enumerate(_read_chunks(task.given)):
            # Barcodes that are left out must not be numbered: every number becomes a cell.
            if allowed is not None:
                found = chunk["barcode"].cat.categories
                if not part:
                    first_barcodes = encode_barcodes(found[:PROBED_BARCODES].tolist(), where)
                chunk = chunk[allowed.find_wanted_texts(found)[chunk["barcode"].cat.codes]]
                barcodes = chunk["barcode"].cat.remove_unused_categories()
                chunk = chunk.assign(barcode=barcodes)
            rows = cells.number_categories(chunk["barcode"])
            chromosome = chromosomes.number_categories(chunk["chromosome"]) << _SHIFT
            start, end = chunk["start"].to_numpy(), chunk["end"].to_numpy()
            hits = [start, end - 1] if task.given.cut_sites else [(start + end) // 2]
            keys = np.concatenate([chromosome + position // task.bin_width for position in hits])
            # Python numbers the bins, so it should see each of them once in a chunk.
            unique, inverse = np.unique(keys, return_inverse=True)
            columns = bins.number_values(unique.tolist())[inverse]
            _write_counts(folder / f"{part:06d}", np.tile(rows, len(hits)), columns)
        if not cells.numbers:
            if allowed is not None:
                raise allowed.make_absence_error(where, first_barcodes)
            raise DataError("the file holds no fragments", where=where)
        names = list(chromosomes.numbers)
        texts = [
            name_bin(names[key >> _SHIFT], key & _LOWER_BITS, task.bin_width)
            for key in bins.numbers
        ]
        save_array(folder / "barcodes.npy", encode_barcodes(list(cells.numbers), where))
        save_array(folder / "bins.npy", encode_barcodes(texts, where))


def _write_counts(folder: Path, rows: np.ndarray, columns: np.ndarray) -> None:
    """Add up what falls into the same cell and bin. rows, columns: (n,)."""
    pairs, counts = np.unique((rows << _SHIFT) + columns, return_counts=True)
    rows, columns = pairs >> _SHIFT, pairs & _LOWER_BITS
    sorted_entries.write_sorted_part(folder, rows, columns, counts.astype(np.int32))


def _read_chunks(given: FragmentsInput, chunk_lines: int | None = None) -> Iterator[pd.DataFrame]:
    """The fragments of a file, `chunk_lines` (or CHUNK_LINES) at a time.

    Raises:
        DataError: one of them is none, or the file is damaged.
    """
    chunk_lines, n_seen = chunk_lines or CHUNK_LINES, 0
    if given.key:
        chunks = read_stored_fragments(given.path, given.key, chunk_lines)
    else:
        chunks = _read_lines(given, chunk_lines)
    for chunk in chunks:
        _require_fragments(chunk, n_seen, given.display_name)
        n_seen += len(chunk)
        yield chunk


def _read_lines(given: FragmentsInput, chunk_lines: int) -> Iterator[pd.DataFrame]:
    """The fragments of a text."""
    n_seen, path = 0, given.path
    assert isinstance(path, Path)
    try:
        with open_text(path) as file:
            text: Any = CommentFilter(file)
            # With low_memory, pandas would cut each chunk into smaller ones, and take longer to
            # bring their categories together.
            reader = pd.read_csv(
                text, sep="\t", header=None, usecols=range(4),
                names=list(_COLUMNS), dtype=_COLUMNS, quoting=3, na_filter=False,
                chunksize=chunk_lines, low_memory=False,
            )  # fmt: skip
            for chunk in reader:
                n_seen += len(chunk)
                yield chunk
    except (ValueError, OverflowError, *UNREADABLE) as error:  # pandas raises ValueErrors
        place, line = _find_broken_line(path, n_seen)
        raise DataError(
            "the fragments cannot be read to their end",
            where=f"{given.display_name}, after fragment {place}",
            got=str(error).strip() if line is None else repr(line[:80]),
            expected="lines of chromosome, start, end, barcode, with tabs between",
            fix="check that the file is complete",
        ) from None


def _find_broken_line(path: Path, n_before: int) -> tuple[int, str | None]:
    """The first line that is no fragment, and the number of fragments before it.

    Args:
        path: the file.
        n_before: fragments at its start that have been read.

    Returns:
        Also where the file itself is damaged; then there is no line.
    """
    number = 0
    try:
        with open_text(path) as file:
            while line := file.readline(MOST_LETTERS):
                if line.startswith("#") or line.isspace():
                    continue
                if number >= n_before and not _is_fragment(line):
                    return number, line.rstrip("\r\n")
                number += 1
    except UNREADABLE:
        pass
    return number, None


def _require_fragments(chunk: pd.DataFrame, n_before: int, name: str) -> None:
    """Refuse lines that are not fragments; n_before: fragments of the file before the chunk."""
    wrong = (chunk["start"] < 0) | (chunk["end"] <= chunk["start"])
    wrong |= (chunk["end"] > 1 << _SHIFT) | (chunk["barcode"] == "")
    places = np.flatnonzero(wrong.to_numpy())
    if len(places):
        raise DataError(
            "not a fragment",
            where=f"{name}, fragment {n_before + places[0] + 1}",
            got=" ".join(map(str, chunk.iloc[places[0]])),
            expected="chromosome, 0 <= start < end <= 2^32, barcode",
        )
