"""What pairs, said before anything is written: cells by the modalities that the inputs list."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from clue_dist.errors import DataError, format_count, list_names
from clue_dist.store.shuffle import derive_key, hash_barcodes
from data_prep.readers.barcode_cores import extract_cores, find_alike_cells
from data_prep.readers.source import OpenedSource, decode_barcodes

SAMPLE_BARCODES = 2**20  # compared by their cores, some 100 MB; of more barcodes, a share is
HEAD_BARCODES = 1000  # of a file, by which row numbers are recognised
PATTERNS_SHOWN = 12
ALIKE_SHARE = 0.1  # see `PairingSurvey.alike_share`: so many more pairs are no accident
APART_SHARE = 0.2  # of all cells: so many of different data sets do not agree by accident
MANY_TIMES = 5  # as many cells of one modality as of another: one file may hold every droplet

_ROW_NUMBER = re.compile(rb"[0-9]+(-[0-9]+)?")  # anndata's concat puts `-0` behind the name


@dataclass(frozen=True)
class PairingSurvey:
    """Cells by the modalities that they have, and what would pair more of them."""

    n_cells: dict[int, int]  # by mask; bit m is set where a cell has modality m
    first_barcode: dict[int, str]  # one cell of each mask
    n_alike: int  # cells that would pair if barcodes did by their core, a sample scaled up
    alike: tuple[str, ...]  # the barcodes of one of them, by modality
    is_estimate: bool  # whether `n_alike` comes from a sample
    n_apart: int = 0  # cells that would pair by their core if all were of one data set
    apart: tuple[str, ...] = ()  # the barcodes of one of them

    @property
    def alike_share(self) -> float:
        """Share of the cells without the most frequent modality that would pair by their core."""
        if not self.n_alike:
            return 0.0
        n_modalities = max(self.n_cells).bit_length()
        n_most = max(self.count_having(1 << m) for m in range(n_modalities))
        return self.n_alike / (sum(self.n_cells.values()) - n_most)

    def count_having(self, mask: int) -> int:
        """Count the cells that have all modalities of a mask."""
        return sum(n for other, n in self.n_cells.items() if other & mask == mask)


def survey_pairing(parts: Iterable[tuple[np.ndarray, np.ndarray]], n_cells: int) -> PairingSurvey:
    """Count cells by their modalities, and those that the cores of their barcodes would pair.

    Memory does not grow with the number of cells.

    Args:
        parts: barcodes, (n,) bytes, and masks, (n,) int64, of some cells at a time.
        n_cells: number of cells in all parts.
    """
    key = derive_key(0, "cores")
    # Cells are sampled by the hash of their core, so that alike ones come together.
    share = min(1.0, SAMPLE_BARCODES / max(n_cells, 1))
    counts: dict[int, int] = {}
    first: dict[int, str] = {}
    sample_barcodes, sample_masks = [np.empty(0, "S1")], [np.empty(0, np.int64)]
    for barcodes, masks in parts:
        found, places, times = np.unique(masks, return_index=True, return_counts=True)
        for mask, place, n in zip(found.tolist(), places.tolist(), times.tolist(), strict=True):
            counts[mask] = counts.get(mask, 0) + n
            first.setdefault(mask, str(decode_barcodes(barcodes[place : place + 1])[0]))
        if share < 1:
            limit = np.uint64(int(share * 2**64))
            cores = extract_cores(barcodes, with_dataset=False)
            chosen = hash_barcodes(cores, key) < limit
            barcodes, masks = barcodes[chosen], masks[chosen]
        sample_barcodes.append(barcodes)
        sample_masks.append(masks)
    found_alike: list[tuple[int, tuple[str, ...]]] = [(0, ()), (0, ())]
    if any(a & b == 0 for a in counts for b in counts):  # else nothing more can pair
        barcodes, masks = np.concatenate(sample_barcodes), np.concatenate(sample_masks)
        found_alike = [_find_alike(barcodes, masks, with_dataset) for with_dataset in (True, False)]
    (n_alike, alike), (n_apart, apart) = ((round(n / share), names) for n, names in found_alike)
    return PairingSurvey(counts, first, n_alike, alike, share < 1, n_apart, apart)


def _find_alike(
    barcodes: np.ndarray, masks: np.ndarray, with_dataset: bool
) -> tuple[int, tuple[str, ...]]:
    """Count the cells that further barcodes would join; also return the barcodes of one of them."""
    cells = find_alike_cells(barcodes, masks, with_dataset)
    others = np.flatnonzero(cells != np.arange(len(cells)))
    if not len(others):
        return 0, ()
    members = np.flatnonzero(cells == cells[others[0]])
    members = members[np.argsort(masks[members] & -masks[members])]
    return len(np.unique(cells[others])), tuple(decode_barcodes(barcodes[members]).tolist())


def format_pairing(
    survey: PairingSurvey, modalities: Sequence[str], files: Mapping[str, str]
) -> list[str]:
    """Say what pairs, one barcode of what does not, and what would help.

    Args:
        survey: the cells.
        modalities: names of the modalities, in the order of the bits.
        files: the files of each modality.
    """
    everything = (1 << len(modalities)) - 1
    by_size = sorted(survey.n_cells.items(), key=lambda item: -item[1])
    lines = []
    for mask, n_cells in by_size[:PATTERNS_SHOWN]:
        example = "" if mask == everything else f", such as {survey.first_barcode[mask]}"
        lines.append(f"  {_name_mask(mask, modalities)}: {format_count(n_cells, 'cell')}{example}")
    if len(by_size) > PATTERNS_SHOWN:
        more = format_count(len(by_size) - PATTERNS_SHOWN, "more set")
        lines.append(f"  ... and {more} of modalities")
    about = "about " if survey.is_estimate else ""
    if survey.alike_share > ALIKE_SHARE:
        lines.append(
            f"  {about}{format_count(survey.n_alike, 'more cell')} would pair, "
            f"{survey.alike_share:.0%} of those that could, without what stands before and "
            f"behind the sequence of their barcodes ({list_names(survey.alike)}): "
            "`--pair-barcodes core`"
        )
    # Of data sets that have nothing in common, some barcodes agree by accident.
    elif survey.n_apart > APART_SHARE * sum(survey.n_cells.values()):
        lines.append(
            f"  {about}{format_count(survey.n_apart, 'more cell')} would pair if they were of "
            f"one data set ({list_names(survey.apart)}): name it before all of its files, "
            "`lane1:rna=FILE lane1:adt=FILE`"
        )
    return lines + _warn_of_droplets(survey, modalities, files)


def _name_mask(mask: int, modalities: Sequence[str]) -> str:
    names = [name for m, name in enumerate(modalities) if mask >> m & 1]
    return "+".join(names) if len(names) > 1 else f"{names[0]} alone"


def _warn_of_droplets(
    survey: PairingSurvey, modalities: Sequence[str], files: Mapping[str, str]
) -> list[str]:
    """Warn of modalities whose files may hold every droplet."""
    lines = []
    for large, small, times in find_droplets(survey, modalities):
        lines.append(
            f"  warning: {large} has {times:,} times the cells of {small}: does {files[large]} "
            f"hold every droplet? `--barcodes {large}={small}` keeps the cells of {small}"
        )
    return lines


def find_droplets(survey: PairingSurvey, modalities: Sequence[str]) -> list[tuple[str, str, int]]:
    """Find the modalities that have many times the cells of another one, most of which they share.

    Returns:
        Names of the larger and of the smaller one, and how many times more cells the first has.
    """
    found = []
    for m, large in enumerate(modalities):
        for k, small in enumerate(modalities):
            n_large, n_small = survey.count_having(1 << m), survey.count_having(1 << k)
            n_both = survey.count_having(1 << m | 1 << k) + survey.n_alike
            # Cells of several experiments may differ as much in number, but then few are shared.
            if n_small and n_large >= MANY_TIMES * n_small and 2 * n_both >= n_small:
                found.append((large, small, n_large // n_small))
    return found


def refuse_row_numbers(sources: Sequence[OpenedSource]) -> None:
    """Refuse to pair cells of several files that are called by their row numbers.

    Raises:
        DataError: two files of one data set, with different modalities, number their cells.
    """
    numbered: dict[str, list[OpenedSource]] = {}
    for opened in sources:
        barcodes = opened.head.barcodes[:HEAD_BARCODES].tolist()
        if barcodes and all(_ROW_NUMBER.fullmatch(barcode) for barcode in barcodes):
            numbered.setdefault(opened.source.dataset, []).append(opened)
    for found in numbered.values():
        # The modalities of one file have the same cells, whatever they are called.
        files = {getattr(source, "path", source.display_name) for source, _ in found}
        if len(files) > 1 and len({source.modality for source, _ in found}) > 1:
            shown = [
                f"{source.display_name}: "
                f"{list_names(decode_barcodes(head.barcodes[:3]).tolist())} ..."
                for source, head in found
            ]
            raise DataError(
                "cells are called by numbers of rows, which may be other cells in another file",
                where=list_names(source.display_name for source, _ in found),
                got="; ".join(shown[:4]),
                expected="barcodes, by which the cells of one file are found in the other",
                fix="give the files their barcodes (`adata.obs_names = ...`); where equal numbers "
                "are the same cell, add `--pair-barcodes exact`; where they are not, name the "
                "data sets: `a:rna=FILE b:adt=FILE`",
            )
