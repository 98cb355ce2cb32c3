"""Features chosen from the cells (`--top rna=4000 atac=100000`), in one or two more passes.

Tasks add up integers for each batch and feature: the entries, their sum and the sum of their
squares. Integers add up to the same in any order, so that the choice depends on neither the
number of workers nor the sizes of tasks. A task needs 32 bytes for each feature and each batch of
its own rows, the process that combines the tasks about three times that for all batches; the
number of cells does not matter. Every task leaves its sums in a file, so that a killed conversion
goes on.

    WORK/select/rna/sums/000-000000000000.npz    sums of a range of rows
    WORK/select/rna/clip/000-000000000000.npz    sums of the counts above the limits
    WORK/select/rna/limits.npy                   the counts at which genes are clipped
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import scipy.sparse as sp

from clue_dist.errors import DataError, format_count
from clue_dist.files import replace_file
from clue_dist.kinds import KINDS
from clue_dist.store.kernel_cache import compile_kernel
from data_prep.conversion.cells import CellTable
from data_prep.conversion.counts import SourceReading
from data_prep.features import seurat_v3
from data_prep.features.plan import FeaturePlan
from data_prep.jobs.array_files import load_array
from data_prep.jobs.workers import WorkerPool, run_missing
from data_prep.options import FeatureChoice

MANY_TASKS = 256  # of a pass: each leaves a file of its sums


@dataclass(frozen=True)
class SelectedFeatures:
    """The features of a modality that are kept."""

    places: np.ndarray  # (kept,), ascending
    note: dict[str, Any]  # how they were chosen, for the provenance


@dataclass(frozen=True)
class _FeatureSums:
    """What one pass adds up over the entries of a modality; all int64."""

    cells: np.ndarray  # (batches,), the cells that have any counts
    entries: np.ndarray  # (batches, features), as the next two
    total: np.ndarray
    squares: np.ndarray


@dataclass(frozen=True)
class _SumTask:
    """Add up rows `start` to `stop` of a source."""

    reading: SourceReading
    start: int
    stop: int
    step_entries: int  # read at once
    batches: int  # 1: all cells are one batch
    limits: Path | None  # of (batches, features): only counts above these are added up
    out: Path


def select_variable_features(
    readings: Sequence[SourceReading],
    plan: FeaturePlan,
    cells: CellTable,
    choices: Mapping[str, FeatureChoice],
    work: Path,
    step_entries: int,
    pool: WorkerPool,
) -> dict[str, SelectedFeatures]:
    """Choose the features of every modality for which a number of them is asked.

    Args:
        readings: reading of each source.
        plan: the features to choose from.
        cells: for their batches.
        choices: by modality.
        work: the folder for the files of this step.
        step_entries: stored entries that a task reads at once.
        pool: the workers.

    Raises:
        DataError: rows hold no counts; there are too few cells to rank genes by, or none vary.
    """
    selected = {}
    for name, modality in plan.modalities.items():
        top = choices.get(name, FeatureChoice()).top_features
        if top is None:
            continue
        chosen = {
            i: reading for i, reading in enumerate(readings) if reading.source.modality == name
        }
        rows = _ModalityRows(chosen, modality.n_features, work / name, step_entries, pool)
        if KINDS[modality.kind].selection == "detection":
            selected[name] = _select_accessible(rows, top)
        else:
            selected[name] = _select_variable(rows, top, cells, name)
    return selected


def _select_accessible(rows: _ModalityRows, top: int) -> SelectedFeatures:
    """Select the features that are seen in most cells; of equal ones the first."""
    hits = rows.add_up("accessible", 1).entries[0]
    places = np.sort(np.argsort(-hits, kind="stable")[:top])
    return SelectedFeatures(places, {"by": "most accessible", "of": len(hits), "kept": len(places)})


def _select_variable(
    rows: _ModalityRows, top: int, cells: CellTable, modality: str
) -> SelectedFeatures:
    """Select the genes that vary most within batches; cells of unknown batch are one batch more."""
    batches = len(cells.names["batch"]) + 1
    sums = rows.add_up("sums", batches)
    trends = {}
    for batch, n_cells in enumerate(sums.cells.tolist()):
        trend = seurat_v3.fit_trend(n_cells, sums.total[batch], sums.squares[batch])
        if trend is not None:
            trends[batch] = trend
    if not trends:
        raise DataError(
            "no batch has enough cells to tell which features vary",
            where=f"--top {modality}={top}",
            fix=f"leave `--top {modality}=...` out, or check --batch-key: a batch needs two cells "
            "at least",
        )
    limits = np.full(sums.total.shape, np.inf)
    for batch, trend in trends.items():
        limits[batch] = trend.limits
    np.save(rows.folder / "limits.npy", limits)
    above = rows.add_up("clip", batches, rows.folder / "limits.npy")
    scores = []
    for batch, trend in trends.items():
        # Each count above its gene's limit is replaced by the limit.
        n_clipped = above.entries[batch]
        total = sums.total[batch] - above.total[batch] + n_clipped * trend.limits
        squares = sums.squares[batch] - above.squares[batch] + n_clipped * trend.limits**2
        scores.append(trend.score_genes(total, squares))
    places = seurat_v3.rank_genes(np.array(scores), top)
    note = {
        "by": f"most variable within {format_count(len(trends), 'batch', 'batches')}",
        "of": rows.n_features,
        "kept": len(places),
    }
    return SelectedFeatures(places, note)


@dataclass(frozen=True)
class _ModalityRows:
    """All rows of a modality, and how passes over them are made."""

    readings: dict[int, SourceReading]  # readings by the number of their source
    n_features: int
    folder: Path
    step_entries: int
    pool: WorkerPool

    def add_up(self, title: str, batches: int, limits: Path | None = None) -> _FeatureSums:
        """Add up the entries in one pass; its title names its folder and its progress."""
        folder, modality = self.folder / title, self.folder.name
        folder.mkdir(parents=True, exist_ok=True)
        nnz = sum(reading.nnz for reading in self.readings.values())
        tasks = {}
        for i, reading in self.readings.items():
            for start, stop in reading.split_rows(max(self.step_entries, nnz // MANY_TASKS)):
                out = folder / f"{i:03d}-{start:012d}.npz"
                tasks[out] = _SumTask(reading, start, stop, self.step_entries, batches, limits, out)
        run_missing(self.pool, f"select {modality} ({title})", _add_up_rows, tasks)
        sums = np.zeros((3, batches * self.n_features), np.int64)
        cells = np.zeros(batches, np.int64)
        for path in tasks:
            with np.load(path) as part:
                cells += part["cells"]
                sums[:, part["at"]] += part["sums"]
        return _FeatureSums(cells, *sums.reshape(3, batches, self.n_features))


def _add_up_rows(task: _SumTask) -> None:
    """Add up a task's rows, some at a time, and leave the sums that are not zero in a file."""
    reading, n_features = task.reading, task.reading.target.n_features
    batch = load_array(reading.row_folder / "batch.npy")[task.start : task.stop]
    unknown = task.batches - 1  # the batch of cells without one
    batch = np.where(batch < 0, unknown, batch) if task.batches > 1 else np.zeros_like(batch)
    # Only the batches of these rows take memory.
    found, local_batch = np.unique(batch, return_inverse=True)
    limits = np.zeros((len(found), n_features))
    if task.limits is not None:
        limits[:] = load_array(task.limits)[found]
    sums = np.zeros((3, len(found), n_features), np.int64)
    cells = np.zeros(task.batches, np.int64)
    for start, stop in reading.split_rows(task.step_entries, task.start, task.stop):
        rows = sp.csr_matrix(reading.read_rows(start, stop))
        row_batch = local_batch[start - task.start : stop - task.start]
        arrays = (a.astype(np.int64, copy=False) for a in (rows.indptr, rows.indices, rows.data))
        _add_entries(*arrays, row_batch, limits, sums)
        has_counts = np.diff(rows.indptr) > 0
        cells += np.bincount(found[row_batch[has_counts]], minlength=task.batches)
    places = np.flatnonzero(sums[0])
    local, feature = np.divmod(places, n_features)
    flat = found[local].astype(np.int64) * n_features + feature  # places among all batches
    # A worker that was given up for dead may still write the same file.
    with replace_file(task.out, unique=True) as temporary, temporary.open("wb") as file:
        np.savez(file, at=flat, sums=sums.reshape(3, -1)[:, places], cells=cells)


@compile_kernel
def _add_entries(indptr, indices, values, batch, limits, sums):  # type: ignore[no-untyped-def]
    """Add the entries above their limit to sums, (3, batches, features).

    The three are how many they are, their sum, and the sum of their squares.
    """
    for row in range(len(indptr) - 1):
        b = batch[row]
        for i in range(indptr[row], indptr[row + 1]):
            column, value = indices[i], values[i]
            if value > limits[b, column]:
                sums[0, b, column] += 1
                sums[1, b, column] += value
                sums[2, b, column] += value * value
