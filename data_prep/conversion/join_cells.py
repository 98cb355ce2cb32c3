"""Join rows into cells, by barcode across modalities, one range of hashes after another.

WORK/cells/rows/                     the rows, as `row_lists` describes them
WORK/cells/joined/, WORK/sources/    the cells, as `cells` describes them
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from clue_dist.errors import DataError, list_names
from clue_dist.store.batch_vocabulary import NO_BATCHES, UNKNOWN, BatchVocabulary
from clue_dist.store.feature_reference import FeatureReference
from data_prep.conversion.batch_levels import combine_covariates
from data_prep.conversion.cell_problems import (
    BARCODES_SHOWN,
    refuse_cell_problems,
    require_obs_columns,
)
from data_prep.conversion.cells import BarcodeHash, CellTable, divide_hashes
from data_prep.conversion.row_lists import list_all_rows
from data_prep.jobs.array_files import flush_arrays, load_array, map_array, save_array
from data_prep.jobs.whole_folders import make_whole_folder
from data_prep.jobs.workers import WorkerPool, run_missing
from data_prep.options import COVARIATE, ObsColumns
from data_prep.readers.barcode_cores import (
    count_ambiguous_cells,
    find_alike_cells,
    unite_masks,
)
from data_prep.readers.source import OpenedSource, SourceHead, decode_barcodes

RANGE_ROWS = 2**18  # rows of a range of hashes, on average; some 40 MB


@dataclass(frozen=True)
class _JoinTask:
    """Join the rows of all sources whose hashes are at least `low` and below `high`."""

    row_lists: list[list[Path]]  # of each source, see `list_all_rows`
    modality: list[int]  # of each source, the number of its modality
    fields: list[str]
    by_core: bool
    low: int
    high: int
    out: Path


def join_cells_by_barcode(
    sources: Sequence[OpenedSource],
    modalities: Sequence[str],
    reference: FeatureReference | None,
    obs_columns: ObsColumns,
    barcode_hash: BarcodeHash,
    work: Path,
    pool: WorkerPool,
) -> CellTable:
    """Join the rows of all sources into cells.

    Args:
        sources: the inputs, with their heads.
        modalities: their order decides which bit of a cell's mask is whose.
        reference: the store or model whose batches and labels keep their codes.
        obs_columns: where batch and label are found.
        barcode_hash: which shuffles the cells. Where it is that of cores, barcodes of different
            modalities that have the same core are one cell, too; see `find_alike_cells`.
        work: the folder for the files of this job.
        pool: the workers.

    Raises:
        DataError: a barcode stands twice in one modality of a data set; modalities disagree on the
            batch or label of a cell; no file has a column that was asked for; a covariate of
            batches has nearly as many levels as there are cells.
    """
    heads = [head for _, head in sources]
    n_rows = sum(head.n_rows for head in heads)
    if not n_rows:
        where = list_names(source.display_name for source, _ in sources)
        raise DataError("the inputs hold no cells", where=where)
    require_obs_columns(obs_columns, sources)
    known_batches = reference.batch_vocabulary if reference else NO_BATCHES
    known_labels = reference.labels if reference else []
    covariates: Mapping[str, Sequence[str]] = {name: [] for name in obs_columns.covariates}
    if known_batches.has_several:
        covariates = known_batches.covariates
    names = _name_codes(heads, covariates, known_batches, known_labels)
    rows_folder, joined_folder = work / "cells" / "rows", work / "cells" / "joined"
    row_lists = list_all_rows(sources, names, barcode_hash, rows_folder, pool)
    numbers = [list(modalities).index(source.modality) for source, _ in sources]
    folders = _join_all_ranges(
        row_lists, numbers, list(names), barcode_hash.by_core, n_rows, joined_folder, pool
    )
    reports = [json.loads((folder / "report.json").read_text()) for folder in folders]
    refuse_cell_problems(reports, sources, modalities, names)

    batches = known_batches
    if covariates:
        batches = combine_covariates(folders, names, covariates)
        names = {"batch": batches.names, "label": names["label"]}
    counts = [len(load_array(folder / "planned.npy")) for folder in folders]
    cells = CellTable(
        folders,
        range_starts=np.concatenate([[0], np.cumsum(counts)]),
        barcode_hash=barcode_hash,
        names=names,
        covariates=batches.list_covariates(),
        row_folders=[work / "sources" / f"{i:03d}" for i in range(len(sources))],
        n_merged=sum(report.get("merged", 0) for report in reports),
        n_ambiguous=sum(report.get("ambiguous", 0) for report in reports),
    )
    _write_row_keys(cells, [head.n_rows for head in heads])
    return cells


def _name_codes(
    heads: Sequence[SourceHead],
    covariates: Mapping[str, Sequence[str]],
    known_batches: BatchVocabulary,
    known_labels: list[str],
) -> dict[str, list[str]]:
    """List what codes stand for: of each covariate of batches, else of batches, and of labels."""
    known = {COVARIATE + name: _list_known(levels) for name, levels in covariates.items()}
    known = known or {"batch": known_batches.names}
    known["label"] = known_labels
    return {field: _merge_names(field, heads, names) for field, names in known.items()}


def _list_known(levels: Sequence[str]) -> list[str]:
    """The levels of known batches, each once."""
    return [level for level in dict.fromkeys(levels) if level != UNKNOWN]


def _merge_names(field: str, heads: Sequence[SourceHead], known: list[str]) -> list[str]:
    """List the batches or labels of all sources: those known first, as their codes are taken."""
    found = {name for head in heads if field in head.fields for name in head.fields[field].names}
    return known + sorted(found - set(known))


def _join_all_ranges(
    row_lists: list[list[Path]],
    modality: list[int],
    fields: list[str],
    by_core: bool,
    n_rows: int,
    folder: Path,
    pool: WorkerPool,
) -> list[Path]:
    """Join the rows into cells, one range of hashes after another; return a folder for each."""
    bounds = [*divide_hashes(-(-n_rows // RANGE_ROWS)).tolist(), 2**64]
    tasks: dict[Path, _JoinTask] = {}
    for i, (low, high) in enumerate(pairwise(bounds)):
        out = folder / f"{i:04d}"
        tasks[out] = _JoinTask(row_lists, modality, fields, by_core, low, high, out)
    run_missing(pool, "join cells", _join_range, tasks)
    return list(tasks)


@dataclass(frozen=True)
class _RangeRows:
    """The rows of all sources in one range of hashes."""

    spans: list[tuple[int, Path, slice]]  # number of a source, one of its lists, rows of that list

    @classmethod
    def find(cls, task: _JoinTask) -> _RangeRows:
        """Find the rows in the lists, which are sorted by hash."""
        spans = []
        for number, row_lists in enumerate(task.row_lists):
            for folder in row_lists:
                hashes = load_array(folder / "hashes.npy")
                start, stop = (
                    # 2^64 itself is no uint64
                    len(hashes) if bound == 2**64 else np.searchsorted(hashes, np.uint64(bound))
                    for bound in (task.low, task.high)
                )
                spans.append((number, folder, slice(int(start), int(stop))))
        return cls(spans)

    def load(self, name: str) -> np.ndarray:
        """Load what the lists hold of each row under a name, (rows,)."""
        arrays = (load_array(folder / f"{name}.npy") for _, folder, _ in self.spans)
        spans = (span for _, _, span in self.spans)
        return np.concatenate([array[span] for array, span in zip(arrays, spans, strict=True)])

    def group_by_source(self, n_sources: int) -> list[np.ndarray]:
        """List the rows of each source: places in what `load` returns."""
        lengths = [span.stop - span.start for _, _, span in self.spans]
        source = np.repeat([number for number, _, _ in self.spans], lengths)
        return [np.flatnonzero(source == number) for number in range(n_sources)]


def _join_range(task: _JoinTask) -> None:
    """Join the rows of one range of hashes into cells.

    What is wrong with them is written to a file: the error names the problems of all ranges.
    """
    rows = _RangeRows.find(task)
    hashes, barcodes = rows.load("hashes"), rows.load("barcodes")
    cell_of_row, first_rows = _group_equal_barcodes(hashes, barcodes)
    names, cell_hashes = barcodes[first_rows], hashes[first_rows]  # one for each cell

    by_source = rows.group_by_source(len(task.row_lists))
    planned, repeated = _plan_modalities(task.modality, by_source, cell_of_row, names)
    report: dict[str, Any] = {"twice": repeated}
    if task.by_core:
        n_barcodes = len(names)
        kept, merged = np.unique(find_alike_cells(names, planned), return_inverse=True)
        planned = unite_masks(planned, merged)
        names, cell_hashes, cell_of_row = names[kept], cell_hashes[kept], merged[cell_of_row]
        report["merged"] = n_barcodes - len(names)
        report["ambiguous"] = count_ambiguous_cells(names, planned)
    disputes = {}
    with make_whole_folder(task.out) as folder:
        for field in task.fields:
            codes, dispute = _settle_codes(rows.load(field), cell_of_row, by_source, names)
            save_array(folder / f"{field}.npy", codes)
            if dispute:
                disputes[field] = dispute
        save_array(folder / "hashes.npy", cell_hashes)
        save_array(folder / "barcodes.npy", names)
        save_array(folder / "planned.npy", planned)
        row_numbers = rows.load("rows")
        for i, part in enumerate(by_source):
            save_array(
                folder / f"rows-{i:03d}.npy", np.stack([row_numbers[part], cell_of_row[part]])
            )
        report["dispute"] = disputes
        (folder / "report.json").write_text(json.dumps(report))


def _group_equal_barcodes(
    hashes: np.ndarray, barcodes: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Number the cells of rows, in the order of their hashes.

    Returns:
        The cell of each row, (rows,), and one row of each cell, (cells,).
    """
    # Barcodes may share a hash: rows are of one cell if their barcodes are equal too.
    order = np.lexsort((barcodes, hashes))
    is_new = np.ones(len(order), bool)
    is_new[1:] = np.diff(hashes[order]) != 0
    is_new[1:] |= barcodes[order[1:]] != barcodes[order[:-1]]
    cell_of_row = np.empty(len(order), np.int64)
    cell_of_row[order] = np.cumsum(is_new) - 1
    return cell_of_row, order[is_new]


def _plan_modalities(
    modality: Sequence[int],
    by_source: Sequence[np.ndarray],
    cell_of_row: np.ndarray,
    names: np.ndarray,
) -> tuple[np.ndarray, dict[int, Any]]:
    """Find the modalities in which the inputs list each cell, and the cells listed twice in one.

    Returns:
        The masks of the cells, (n,) int64, and by modality the number of barcodes that are repeated
        in it, the first of them, and the numbers of the sources that repeat one by themselves.
    """
    planned = np.zeros(len(names), np.int64)
    repeated: dict[int, Any] = {}
    for m in sorted(set(modality)):
        parts = [part for number, part in zip(modality, by_source, strict=True) if number == m]
        times = np.bincount(cell_of_row[np.concatenate(parts)], minlength=len(names))
        planned |= (times > 0).astype(np.int64) << m
        if len(barcodes := np.sort(names[times > 1])):
            first = decode_barcodes(barcodes[:BARCODES_SHOWN]).tolist()
            within = [
                number
                for number, part in enumerate(by_source)
                if modality[number] == m and len(np.unique(cell_of_row[part])) < len(part)
            ]
            repeated[m] = {"number": len(barcodes), "first": first, "within": within}
    return planned, repeated


def _settle_codes(
    codes: np.ndarray,
    cell_of_row: np.ndarray,
    by_source: Sequence[np.ndarray],
    names: np.ndarray,
) -> tuple[np.ndarray, dict[str, Any] | None]:
    """Settle on one code for each cell.

    Returns:
        The codes, (n,) int32, and the cells whose sources disagree: their number, and of the first
        ones barcode, both codes and the source of the second.
    """
    settled = np.full(len(names), -1, np.int32)
    number, first = 0, []
    for i, part in enumerate(by_source):
        cells, new = cell_of_row[part], codes[part]
        old = settled[cells]
        wrong = np.flatnonzero((new >= 0) & (old >= 0) & (new != old))
        number += len(wrong)
        shown = wrong[np.argsort(names[cells[wrong]])][:BARCODES_SHOWN]
        barcodes = decode_barcodes(names[cells[shown]]).tolist()
        first += [
            [barcode, int(old[row]), int(new[row]), i]
            for barcode, row in zip(barcodes, shown.tolist(), strict=True)
        ]
        settled[cells] = np.where(new >= 0, new, old)  # a source may know nothing of a cell
    return settled, {"number": number, "first": first} if number else None


def _write_row_keys(cells: CellTable, n_rows: Sequence[int]) -> None:
    """Write spool key and batch of every row of every source.

    This process does it alone: the rows of one range of hashes lie anywhere in a source.
    """
    arrays = []
    for folder, n in zip(cells.row_folders, n_rows, strict=True):
        keys = map_array(folder / "keys.npy", np.int64, (n,))
        arrays.append((keys, map_array(folder / "batch.npy", np.int32, (n,))))
    for part, folder in zip(cells.iterate_ranges(), cells.folders, strict=True):
        spool_keys = part.spool_keys
        for i, (keys, batch) in enumerate(arrays):
            rows, cell = load_array(folder / f"rows-{i:03d}.npy")
            if len(rows):
                keys[rows], batch[rows] = spool_keys[cell], part.codes["batch"][cell]
    flush_arrays(array for pair in arrays for array in pair)
