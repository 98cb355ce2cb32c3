"""Lists of the rows of all sources, sorted by hash, from which cells are joined.

WORK/cells/rows/000-000000000000/    rows of a source: hash, barcode, number, codes
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from data_prep.conversion.cells import BarcodeHash
from data_prep.jobs.array_files import save_array
from data_prep.jobs.whole_folders import make_whole_folder
from data_prep.jobs.workers import WorkerPool, run_missing
from data_prep.options import DATASET
from data_prep.readers.source import CategoryCodes, OpenedSource, Source, SourceHead

TASK_ROWS = 2**18  # rows of a source that one task lists


@dataclass(frozen=True)
class _ListTask:
    """List rows `start` to `stop` of a source, sorted by the hash of their barcodes."""

    source: Source
    barcode_hash: BarcodeHash
    codes: dict[str, np.ndarray]  # of each field, the code of each of the source's names, then -1
    start: int
    stop: int
    out: Path


def list_all_rows(
    sources: Sequence[OpenedSource],
    names: Mapping[str, list[str]],
    barcode_hash: BarcodeHash,
    folder: Path,
    pool: WorkerPool,
) -> list[list[Path]]:
    """List the rows of all sources, in folders that hold an array of each thing known of a row.

    Args:
        sources: the inputs, with their heads.
        names: of each field, the names that codes stand for.
        barcode_hash: the hash that lists are sorted by.
        folder: for the lists.
        pool: the workers.

    Returns:
        The folders of each source.
    """
    row_lists: list[list[Path]] = []
    tasks: dict[Path, _ListTask] = {}
    for i, (source, head) in enumerate(sources):
        codes = {field: _renumber_names(head, field, names[field]) for field in names}
        row_lists.append([])
        for start in range(0, head.n_rows, TASK_ROWS):
            out = folder / f"{i:03d}-{start:012d}"
            stop = min(start + TASK_ROWS, head.n_rows)
            tasks[out] = _ListTask(source, barcode_hash, codes, start, stop, out)
            row_lists[-1].append(out)
    run_missing(pool, "list cells", _list_rows, tasks)
    return row_lists


def _renumber_names(head: SourceHead, field: str, names: list[str]) -> np.ndarray:
    """Give each of a source's names its code; the last entry, which -1 means, stays unknown."""
    codes = {name: code for code, name in enumerate(names)}
    source_names = head.fields[field].names if field in head.fields else []
    return np.array([codes[name] for name in source_names] + [-1], np.int32)


def _list_rows(task: _ListTask) -> None:
    """Leave hash, barcode, number and codes of each row in a folder."""
    head, dataset = task.source.read_head(), task.source.dataset
    barcodes = head.barcodes[task.start : task.stop]
    # Cells of different data sets never join: their barcodes differ.
    if DATASET in head.fields:
        barcodes = _prefix_datasets(barcodes, head.fields[DATASET], slice(task.start, task.stop))
    if dataset:
        barcodes = np.char.add(f"{dataset}:".encode(), barcodes)
    hashes = task.barcode_hash.hash_all(barcodes)
    order = np.argsort(hashes)
    with make_whole_folder(task.out) as folder:
        save_array(folder / "hashes.npy", hashes[order])
        save_array(folder / "barcodes.npy", barcodes[order])
        save_array(folder / "rows.npy", order + task.start)
        for field, codes in task.codes.items():
            if field in head.fields:
                source_codes = head.fields[field].codes[task.start : task.stop]
            else:
                source_codes = np.full(len(order), -1)
            save_array(folder / f"{field}.npy", codes[source_codes][order])


def _prefix_datasets(barcodes: np.ndarray, datasets: CategoryCodes, rows: slice) -> np.ndarray:
    """Write before each barcode the data set that a column of obs names, where it names one."""
    names = [f"{name}:".encode() for name in datasets.names]
    prefixes = np.array([*names, b""])  # the last one is for the code -1
    return np.char.add(prefixes[datasets.codes[rows]], barcodes)
