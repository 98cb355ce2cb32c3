"""Fragments files (10x `fragments.tsv.gz`: chromosome, start, end, barcode) -> counts per cell and genome bin.

A file is text, so one task reads it from its start, some lines at a time; several files are read at once. What it
leaves is sorted parts (see `entries`), from which rows are read like those of any other source.
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
from data_prep.jobs.whole_files import make_whole_folder, save_array
from data_prep.jobs.workers import WorkerPool, run_missing
from data_prep.options import FeatureChoice
from data_prep.readers import sorted_entries
from data_prep.readers.genome_bins import name_bin
from data_prep.readers.source import (
    DirectSource,
    Source,
    SourceHead,
    SourceRows,
    decode_barcodes,
    encode_barcodes,
    identify_file,
)
from data_prep.readers.text_files import LINE, UNREADABLE, open_text, read_lines

CHUNK_LINES = 2**21  # read at once: about 100 MB
_SHIFT = 32  # a bin's key is (chromosome << 32) + its number; no chromosome is longer than 2^32 bp


@dataclass(frozen=True)
class FragmentsInput:
    """A fragments file as it was given; `counted` makes a source of it.

    cut_sites: count both ends of a fragment, each in its own bin, instead of the fragment in the bin of its middle.
    limit: a list of barcodes, or another modality, whose cells alone are counted; None: every barcode.
    """

    path: Path
    modality: str
    dataset: str = ""
    cut_sites: bool = False
    allowed: str | None = None

    @property
    def display_name(self) -> str:
        return self.path.name

    @property
    def counted_unit(self) -> str:
        return "cut sites" if self.cut_sites else "fragments"

    def describe_identity(self) -> dict[str, Any]:
        """What must be unchanged for an interrupted conversion to go on."""
        kept = {
            "modality": self.modality,
            "dataset": self.dataset,
            "cut_sites": self.cut_sites,
            "limit": self.allowed,
        }
        listed_in = (
            identify_file(Path(self.allowed))
            if self.allowed and parse_path(self.allowed).is_file()
            else None
        )
        return identify_file(self.path) | kept | {"barcodes": listed_in}


@dataclass(frozen=True)
class FragmentsSource(DirectSource):
    """A fragments file after it was counted. folder: its parts, barcodes and bins."""

    given: FragmentsInput
    folder: Path

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
        barcodes, bins = (
            np.load(self.folder / "barcodes.npy"),
            decode_barcodes(np.load(self.folder / "bins.npy")),
        )
        nnz = sum(len(np.load(part / "rows.npy", mmap_mode="r")) for part in self._parts())
        return SourceHead(barcodes, bins.tolist(), nnz, {}, [])

    def read_rows(self, start: int, stop: int, scratch: Path) -> SourceRows:
        n_bins = len(np.load(self.folder / "bins.npy", mmap_mode="r"))
        return sorted_entries.read_sorted_rows(self._parts(), start, stop, n_bins)

    def _parts(self) -> list[Path]:
        return sorted(self.folder.glob("[0-9]" * 6))


@dataclass(frozen=True)
class _Count:
    given: FragmentsInput
    width: int
    keep: Path | None
    out: Path


def count_fragments(
    inputs: Sequence[Source | FragmentsInput],
    choices: Mapping[str, FeatureChoice],
    work: Path,
    pool: WorkerPool,
) -> list[Source]:
    """Count every fragments file among the inputs; the other inputs stay what they are.

    Raises:
        DataError: no width of the bins; a file, or a list of barcodes, that is not what it should be.
    """
    sources: list[Source] = []
    tasks: dict[Path, _Count] = {}
    for i, given in enumerate(inputs):
        if not isinstance(given, FragmentsInput):
            sources.append(given)
            continue
        width, out = choices.get(given.modality, FeatureChoice()).bin_width, work / f"{i:03d}"
        if width is None:
            fix = f"`--bins {given.modality}=5000`, in base pairs"
            raise DataError(
                "fragments are counted in bins of the genome: how wide?",
                where=given.display_name,
                fix=fix,
            )
        keep = None
        if given.allowed is not None:
            work.mkdir(parents=True, exist_ok=True)
            keep = work / f"keep{i:03d}.npy"
            save_array(keep, _wanted(given, inputs))
        tasks[out] = _Count(given, width, keep, out)
        sources.append(FragmentsSource(given, out))
    if tasks:
        run_missing(pool, "count fragments", _count, tasks)
    return sources


def _wanted(given: FragmentsInput, inputs: Sequence[Source | FragmentsInput]) -> np.ndarray:
    """The barcodes that `given.allowed` allows, (n,) bytes: a list's, or those of a modality in the same data set."""
    assert given.allowed is not None
    if parse_path(given.allowed).is_file():
        barcodes = encode_barcodes(
            [line.split("\t")[0] for line in read_lines(Path(given.allowed))], given.allowed
        )
        mine = f"{given.dataset}:".encode()
        return np.array(
            [b.removeprefix(mine) for b in barcodes.tolist()] if given.dataset else barcodes, "S"
        )
    others = [s for s in inputs if not isinstance(s, FragmentsInput)]
    found = [
        s.read_head().barcodes[:]
        for s in others
        if (s.modality, s.dataset) == (given.allowed, given.dataset)
    ]
    if not found:
        raise DataError(
            "neither a list of barcodes nor another modality of this data set",
            where=f"--barcodes {given.modality}={given.allowed}",
            got=f"modalities with cells: {list_names(dict.fromkeys(s.modality for s in others)) or 'none'}",
            expected="a file with a barcode a line, or one of these modalities",
        )
    return np.concatenate(found)


class _Codes:
    """Numbers things in the order in which they are first seen."""

    def __init__(self) -> None:
        self.of: dict[Any, int] = {}

    def __call__(self, values: list[Any]) -> np.ndarray:
        return np.array([self.of.setdefault(value, len(self.of)) for value in values], np.int64)


def _count(task: _Count) -> None:
    """One file -> a folder of parts, barcodes.npy and bins.npy."""
    allowed = None if task.keep is None else set(decode_barcodes(np.load(task.keep)).tolist())
    cells, chromosomes, bins = _Codes(), _Codes(), _Codes()
    with make_whole_folder(task.out) as folder:
        for part, lines in enumerate(_chunks(task.given)):
            if allowed is not None:
                lines = lines[lines["barcode"].isin(allowed).to_numpy()]
                lines = lines.assign(barcode=lines["barcode"].cat.remove_unused_categories())
            rows = cells(lines["barcode"].cat.categories.tolist())[lines["barcode"].cat.codes]
            chromosome = chromosomes(lines["chromosome"].cat.categories.tolist())[
                lines["chromosome"].cat.codes
            ]
            start, end = lines["start"].to_numpy(), lines["end"].to_numpy()
            at = [start, end - 1] if task.given.cut_sites else [(start + end) // 2]
            keys = np.concatenate([(chromosome << _SHIFT) + where // task.width for where in at])
            unique, inverse = np.unique(keys, return_inverse=True)
            _write(folder / f"{part:06d}", np.tile(rows, len(at)), bins(unique.tolist())[inverse])
        if not cells.of:
            fix = "the list and the file must spell barcodes alike" if allowed is not None else None
            raise DataError(
                "no fragment is of a cell that is wanted", where=task.given.display_name, fix=fix
            )
        names = list(chromosomes.of)
        save_array(
            folder / "barcodes.npy", encode_barcodes(list(cells.of), task.given.display_name)
        )
        texts = [
            name_bin(names[key >> _SHIFT], key & (2**_SHIFT - 1), task.width) for key in bins.of
        ]
        save_array(folder / "bins.npy", encode_barcodes(texts, task.given.display_name))


def _write(folder: Path, rows: np.ndarray, columns: np.ndarray) -> None:
    """Add up what falls into the same cell and bin. rows, columns: (n,)"""
    pairs, times = np.unique((rows << _SHIFT) + columns, return_counts=True)
    sorted_entries.write_sorted_part(
        folder, pairs >> _SHIFT, pairs & (2**_SHIFT - 1), times.astype(np.int32)
    )


def _chunks(given: FragmentsInput) -> Iterator[pd.DataFrame]:
    """The fragments, some at a time; what is none becomes a DataError."""
    columns = {"chromosome": "category", "start": "int64", "end": "int64", "barcode": "category"}
    seen = 0
    try:
        with open_text(given.path) as file:
            skipped = 0
            while file.readline().startswith("#"):
                skipped += 1
        with open_text(given.path) as file:
            # low_memory would cut each piece into smaller ones, and take longer to bring their categories together
            reader = pd.read_csv(
                file, sep="\t", header=None, skiprows=skipped, usecols=range(4), names=list(columns), dtype=columns,
                chunksize=CHUNK_LINES, quoting=3, na_filter=False, low_memory=False,
            )  # fmt: skip
            for chunk in reader:
                wrong = (
                    (chunk["start"] < 0)
                    | (chunk["end"] <= chunk["start"])
                    | (chunk["end"] > 1 << _SHIFT)
                )
                wrong |= chunk["barcode"] == ""
                bad = np.flatnonzero(wrong.to_numpy())
                if len(bad):
                    line = " ".join(map(str, chunk.iloc[bad[0]]))
                    expected = "chromosome, 0 <= start < end <= 2^32, barcode"
                    where = f"{given.display_name}, fragment {seen + bad[0] + 1}"
                    raise DataError("not a fragment", where=where, got=line, expected=expected)
                seen += len(chunk)
                yield chunk
    except (
        pd.errors.ParserError,
        pd.errors.EmptyDataError,
        ValueError,
        OverflowError,
        *UNREADABLE,
    ) as error:
        raise DataError(
            "the fragments cannot be read to their end",
            where=f"{given.display_name}, after fragment {seen}",
            got=str(error).strip(),
            expected="lines of chromosome, start, end, barcode, with tabs between",
            fix="check that the file is complete",
        ) from None


def looks_like_fragments(path: Path) -> bool:
    """Whether the first line that is no comment reads as a fragment."""
    try:
        with open_text(path) as file:
            line = "#"
            while line.startswith("#"):
                line = file.readline(LINE)
    except UNREADABLE:
        return False
    parts = line.rstrip("\r\n").split("\t")
    return len(parts) >= 4 and parts[1].isdecimal() and parts[2].isdecimal()


ConversionInput: TypeAlias = Source | FragmentsInput
