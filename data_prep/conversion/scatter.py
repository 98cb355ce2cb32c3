"""The first pass of a conversion: read, validate and align all rows, and spool them by their keys.

WORK/prepared/000/          of a source: its entries, sorted, where its rows cannot be read directly
WORK/sources/000/           of a source: where its columns go, beside keys and batches of its rows
WORK/spools/rna/000-000000000000     one spool for each task
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from clue_dist.store.manifest_parts import Modality
from data_prep.conversion.cells import CellTable
from data_prep.conversion.counts import AlignmentTarget, SourceReading
from data_prep.conversion.spool import write_spool
from data_prep.jobs.array_files import load_array, save_array
from data_prep.jobs.workers import WorkerPool, run_missing
from data_prep.readers.source import OpenedSource, Source

# Every shard looks into every spool, so that many spools take time; large ones take memory.
TASK_ENTRIES = 2**20  # stored values of a task where the inputs are small
MANY_TASKS = 100  # where there would be more of them, tasks grow up to sixfold
MOST_TASKS = 1000  # where there would still be more, tasks grow up to LARGEST_TASK_ENTRIES
LARGEST_TASK_ENTRIES = 2**25  # 32 MB when coded


@dataclass(frozen=True)
class _PrepareTask:
    """Sort the entries of one part of a source."""

    source: Source
    part: int
    scratch: Path


@dataclass(frozen=True)
class _ScatterTask:
    """Spool rows `start` to `stop` of a source."""

    reading: SourceReading
    start: int
    stop: int
    out: Path


def prepare_sources(sources: Sequence[OpenedSource], work: Path, pool: WorkerPool) -> None:
    """Sort the inputs whose rows cannot be read directly."""
    tasks: dict[Path, _PrepareTask] = {}
    for i, (source, _) in enumerate(sources):
        scratch = work / "prepared" / f"{i:03d}"
        for part in range(source.count_parts()):
            tasks[scratch / f"{part:06d}"] = _PrepareTask(source, part, scratch)
    if tasks:
        run_missing(pool, "sort entries", _prepare_part, tasks)


def _prepare_part(task: _PrepareTask) -> None:
    """Run one task of `prepare_sources`."""
    task.source.prepare_part(task.part, task.scratch)


def plan_readings(
    sources: Sequence[OpenedSource],
    modalities: Mapping[str, Modality],
    columns: Sequence[np.ndarray | None],
    cells: CellTable,
    work: Path,
    round_counts: bool = False,
) -> list[SourceReading]:
    """Plan how tasks read each source's rows.

    Args:
        sources: the inputs, with their heads.
        modalities: modalities of the store, with their features.
        columns: for each source, where its columns go (-1 = dropped); None: all are in place. They
            are saved to files, which tasks read.
        cells: whose folders hold key and batch of each row.
        work: the folder for the files of this job.
        round_counts: whether counts may be fractions, which are rounded.
    """
    readings = []
    for i, (source, head) in enumerate(sources):
        folder = cells.row_folders[i]
        column_file = None
        if (places := columns[i]) is not None:
            column_file = folder / "columns.npy"
            save_array(column_file, places)
        modality = modalities[source.modality]
        target = AlignmentTarget(
            modality.kind, modality.n_features, column_file, round_counts, folder
        )
        scratch = work / "prepared" / f"{i:03d}"
        readings.append(SourceReading(source, target, head.n_rows, head.nnz, scratch, folder))
    return readings


def scatter_rows(
    readings: Sequence[SourceReading], folder: Path, pool: WorkerPool
) -> dict[str, list[Path]]:
    """Spool every row of every source; return the spools of each modality."""
    tasks: dict[Path, _ScatterTask] = {}
    spools: dict[str, list[Path]] = {reading.source.modality: [] for reading in readings}
    n_entries = choose_task_entries(sum(reading.nnz for reading in readings))
    for i, reading in enumerate(readings):
        modality = reading.source.modality
        for start, stop in reading.split_rows(n_entries):
            out = folder / modality / f"{i:03d}-{start:012d}"
            tasks[out] = _ScatterTask(reading, start, stop, out)
            spools[modality].append(out)
    run_missing(pool, "read", _scatter_rows, tasks)
    return spools


def choose_task_entries(nnz: int) -> int:
    """Choose how many stored values a task reads, where all inputs have `nnz`."""
    usual = min(max(nnz // MANY_TASKS, TASK_ENTRIES), 6 * TASK_ENTRIES)
    return max(usual, min(nnz // MOST_TASKS, LARGEST_TASK_ENTRIES))


def _scatter_rows(task: _ScatterTask) -> None:
    """Read rows, sort them by key, and spool them."""
    keys = load_array(task.reading.row_folder / "keys.npy")
    keys = np.asarray(keys[task.start : task.stop])
    order = np.argsort(keys)
    write_spool(task.out, keys[order], *task.reading.read_coded_rows(task.start, task.stop, order))
