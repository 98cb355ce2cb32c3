"""The cells of an input that a list, or another modality, names; the others are left out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import scipy.sparse as sp

from clue_dist.errors import DataError, list_names
from clue_dist.files import parse_path
from data_prep.jobs.array_files import load_array, save_array
from data_prep.readers.barcode_cores import extract_cores
from data_prep.readers.source import (
    ChosenObsValues,
    Source,
    SourceHead,
    SourceRows,
    decode_barcodes,
    encode_barcodes,
    identify_file,
)
from data_prep.readers.text_files import read_lines

SPAN = 16  # rows of the file that are read at once, for each row that is asked for
LEAST_SPAN = 256
STEP_BARCODES = 2**18  # looked up at once


class CellList:
    """Barcodes of cells that are wanted."""

    def __init__(self, barcodes: np.ndarray, by_core: bool) -> None:
        """Take the barcodes, (n,) bytes, and whether those with the same core are wanted, too."""
        self.barcodes, self.by_core = barcodes, by_core
        self.keys = set(self._make_keys(barcodes))
        self.texts = set() if by_core else set(decode_barcodes(barcodes).tolist())

    def _make_keys(self, barcodes: np.ndarray) -> list[bytes]:
        return (extract_cores(barcodes) if self.by_core else barcodes).tolist()

    def find_wanted(self, barcodes: np.ndarray) -> np.ndarray:
        """Find which of the barcodes, (n,) bytes, are wanted, (n,) bool."""
        return np.array([key in self.keys for key in self._make_keys(barcodes)], bool)

    def find_wanted_texts(self, texts: pd.Index) -> np.ndarray:
        """Find which of the barcodes, (n,) of str, are wanted, (n,) bool."""
        if self.by_core:
            return self.find_wanted(encode_barcodes(texts.tolist(), "barcodes"))
        # Encoding would take longer than the rest: a fragments file has millions of barcodes.
        return texts.isin(self.texts)

    def make_absence_error(self, where: str, barcodes: np.ndarray) -> DataError:
        """Make the error for a file none of whose barcodes, (n,) bytes, is wanted."""
        n_alike = int(CellList(self.barcodes, by_core=True).find_wanted(barcodes).sum())
        advice = "the list and the file must spell barcodes alike"
        if n_alike:
            advice = f"`--pair-barcodes core`: without prefix and suffix {n_alike:,} of them agree"
        shown, wanted = (
            list_names(decode_barcodes(each[:3]).tolist()) for each in (barcodes, self.barcodes)
        )
        return DataError(
            "no barcode of the file is among those that are wanted",
            where=where,
            got=f"{shown} ...",
            expected=f"{wanted} ...",
            fix=advice,
        )


@dataclass(frozen=True)
class ListedCellsSource:
    """Some of the rows of another source."""

    source: Source
    rows_file: Path  # numbers of the rows that are kept, (n,) int64, ascending

    @property
    def path(self) -> Any:
        """The file, where the source has one."""
        return getattr(self.source, "path", self.display_name)

    @property
    def modality(self) -> str:
        return self.source.modality

    @property
    def dataset(self) -> str:
        return self.source.dataset

    @property
    def display_name(self) -> str:
        return self.source.display_name

    @property
    def id_columns(self) -> str | None:
        return self.source.id_columns

    def describe_identity(self) -> dict[str, Any]:
        return self.source.describe_identity()

    def read_head(self) -> SourceHead:
        head, rows = self.source.read_head(), load_array(self.rows_file)
        fields = {name: codes.take_rows(rows) for name, codes in head.fields.items()}
        kept = {name: ChosenObsValues(column, rows) for name, column in head.kept_columns.items()}
        return replace(head, barcodes=head.barcodes[:][rows], fields=fields, kept_columns=kept)

    def count_parts(self) -> int:
        return self.source.count_parts()

    def prepare_part(self, part: int, scratch: Path) -> None:
        self.source.prepare_part(part, scratch)

    def read_rows(self, start: int, stop: int, scratch: Path) -> SourceRows:
        rows = load_array(self.rows_file)[start:stop]
        # Few of the rows between the first and the last may be wanted: memory must not grow.
        span = max(SPAN * len(rows), LEAST_SPAN)
        pieces, i = [], 0
        while i < len(rows):
            k = int(np.searchsorted(rows, rows[i] + span))
            block = self.source.read_rows(int(rows[i]), int(rows[k - 1]) + 1, scratch)
            pieces.append(block[rows[i:k] - rows[i]])
            i = k
        if not pieces:
            return self.source.read_rows(0, 0, scratch)
        is_dense = isinstance(pieces[0], np.ndarray)
        return np.concatenate(pieces) if is_dense else sp.vstack(pieces, format="csr")

    def list_other_counts(self) -> list[str]:
        return self.source.list_other_counts()

    def probe_counts(self) -> bool:
        return self.source.probe_counts()


def keep_listed_cells(
    sources: Sequence[Source], allowed: Mapping[str, str], by_core: bool, folder: Path
) -> list[Source]:
    """Leave out the cells that no list names.

    Args:
        sources: the inputs.
        allowed: for some modalities, a list of barcodes or another modality, whose cells are kept.
        by_core: whether barcodes are compared by their cores.
        folder: gets a file for each source, with the numbers of the rows that are kept.

    Raises:
        DataError: the list cannot be read, or names no cell of a file.
    """
    kept = list(sources)
    for i, source in enumerate(sources):
        name = allowed.get(source.modality)
        if name is None:
            continue
        others = [other for other in sources if other.modality != source.modality]
        listed = list_allowed_barcodes(source.modality, source.dataset, name, others)
        barcodes, cell_list = source.read_head().barcodes, CellList(listed, by_core)
        found = []
        for start in range(0, len(barcodes), STEP_BARCODES):  # a raw file has millions
            wanted = cell_list.find_wanted(barcodes[start : start + STEP_BARCODES])
            found.append(np.flatnonzero(wanted) + start)
        rows = np.concatenate(found) if found else np.zeros(0, np.int64)
        if not len(rows):
            raise cell_list.make_absence_error(source.display_name, barcodes[:STEP_BARCODES])
        folder.mkdir(parents=True, exist_ok=True)
        rows_file = folder / f"{i:03d}.npy"
        save_array(rows_file, rows)
        kept[i] = ListedCellsSource(source, rows_file)
    return kept


def list_allowed_barcodes(
    modality: str, dataset: str, allowed: str, sources: Sequence[Source]
) -> np.ndarray:
    """The barcodes of a list, or of another modality in the same data set, as bytes, (n,).

    Args:
        modality: the one whose cells are chosen.
        dataset: its data set.
        allowed: path of a list, or the other modality.
        sources: where the other modality is looked for.

    Raises:
        DataError: there is no such list, and no such modality.
    """
    if parse_path(allowed).is_file():
        texts = [line.split("\t")[0] for line in read_lines(parse_path(allowed))]
        barcodes = encode_barcodes(texts, allowed)
        if not dataset:
            return barcodes
        # A list may spell barcodes as the store does, with the data set before them.
        prefix = f"{dataset}:".encode()
        return np.array([barcode.removeprefix(prefix) for barcode in barcodes.tolist()], "S")
    found = [
        source.read_head().barcodes[:]
        for source in sources
        if (source.modality, source.dataset) == (allowed, dataset)
    ]
    if not found:
        others = list_names(dict.fromkeys(source.modality for source in sources))
        raise DataError(
            "neither a list of barcodes nor another modality of this data set",
            where=f"--barcodes {modality}={allowed}",
            got=f"modalities with cells: {others or 'none'}",
            expected="a file with a barcode a line, or one of these modalities",
        )
    return np.concatenate(found)


def identify_lists(allowed: Mapping[str, str]) -> dict[str, Any]:
    """What must be unchanged of the lists for an interrupted conversion to go on."""
    return {
        modality: identify_file(parse_path(name)) if parse_path(name).is_file() else name
        for modality, name in allowed.items()
    }
