"""The first pass of a conversion: read, validate and align all rows, and spool them by their keys.

WORK/prepared/000/          of a source: its entries, sorted, where its rows cannot be read directly
WORK/sources/000/           of a source: where its columns go, beside keys and batches of its rows
WORK/spools/rna/000-000000000000     one spool for each task
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from data_prep.conversion.counts import SourceReading
from data_prep.conversion.spool import write_spool
from data_prep.jobs.array_files import load_array
from data_prep.jobs.workers import WorkerPool, run_missing
from data_prep.readers.source import OpenedSource, Source

# Every shard looks into every spool, so that many spools take time; large ones take memory.
TASK_ENTRIES = 2**20  # stored values of a task where the inputs are small
MANY_TASKS = 50  # where there would be more of them, tasks grow up to sixfold
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
        scratch = find_scratch(work, i)
        for part in range(source.count_parts()):
            tasks[scratch / f"{part:06d}"] = _PrepareTask(source, part, scratch)
    if tasks:
        run_missing(pool, "sort entries", _prepare_part, tasks)


def find_scratch(work: Path, number: int) -> Path:
    """The folder of a job in which the entries of a source lie sorted, by its number."""
    return work / "prepared" / f"{number:03d}"


def _prepare_part(task: _PrepareTask) -> None:
    """Run one task of `prepare_sources`."""
    task.source.prepare_part(task.part, task.scratch)


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
