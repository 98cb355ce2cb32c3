"""Features chosen from the cells, `--top rna=4000 atac=100000`, in one or two more passes over the rows.

Tasks add up integers (entries, their sum, the sum of their squares, per batch and feature), and integers add up to
the same in any order: the choice depends on neither the number of workers nor the sizes of tasks. Memory is 32 bytes
per batch and feature in a task (for the batches of its own rows), about three times that in the process that combines
them; the number of cells does not matter. Every task leaves its sums in a file, so that a killed conversion goes on.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import scipy.sparse as sp
from numba import njit

from clue_dist.errors import DataError
from clue_dist.files import replace_file
from clue_dist.kinds import KINDS
from data_prep.conversion.cells import CellTable
from data_prep.conversion.counts import SourceReading
from data_prep.features import seurat_v3
from data_prep.features.plan import FeaturePlan
from data_prep.jobs.workers import WorkerPool, run_missing
from data_prep.options import FeatureChoice

MANY_TASKS = 256  # each leaves a file of its sums


@dataclass(frozen=True)
class SelectedFeatures:
    """places: of the features kept, ascending; note: how they were chosen, for the provenance."""

    places: np.ndarray
    note: dict[str, Any]


@dataclass(frozen=True)
class _Sums:
    """cells: (batches,), those with any counts; entries, total, squares: (batches, features). All int64."""

    cells: np.ndarray
    entries: np.ndarray
    total: np.ndarray
    squares: np.ndarray


@dataclass(frozen=True)
class _Task:
    reading: SourceReading
    lo: int
    hi: int
    step: int
    batches: int  # 1: all cells are one batch
    limits: Path | None  # (batches, features): only counts above these are added up
    out: Path


def select_variable_features(
    reading: Sequence[SourceReading],
    plan: FeaturePlan,
    cells: CellTable,
    choices: Mapping[str, FeatureChoice],
    work: Path,
    step_entries: int,
    pool: WorkerPool,
) -> dict[str, SelectedFeatures]:
    """Choose the features of every modality that has a `top`; step_entries: how many a task reads at once.

    Raises:
        DataError: rows that are no counts; cells too few or too alike to rank genes by.
    """
    chosen = {}
    for name, modality in plan.modalities.items():
        top = choices.get(name, FeatureChoice()).top_features
        if top is None:
            continue
        mine = {i: r for i, r in enumerate(reading) if r.source.modality == name}
        add_up = _Pass(mine, modality.n_features, work / name, step_entries, pool)
        chosen[name] = (
            _accessible(add_up, top)
            if KINDS[modality.kind].selection == "detection"
            else _variable(add_up, top, cells, name)
        )
    return chosen


def _accessible(add_up: _Pass, top: int) -> SelectedFeatures:
    """The features seen in most cells; ties in order."""
    hits = add_up("accessible", 1).entries[0]
    places = np.sort(np.argsort(-hits, kind="stable")[:top])
    return SelectedFeatures(places, {"by": "most accessible", "of": len(hits), "kept": len(places)})


def _variable(add_up: _Pass, top: int, cells: CellTable, name: str) -> SelectedFeatures:
    """The genes that vary most within batches; cells without a batch are one of their own."""
    batches = len(cells.names["batch"]) + 1
    sums = add_up("sums", batches)
    trends = {
        b: seurat_v3.fit_trend(int(n), sums.total[b], sums.squares[b])
        for b, n in enumerate(sums.cells)
    }
    found = {b: trend for b, trend in trends.items() if trend is not None}
    if not found:
        fix = (
            f"leave `--top {name}=...` out, or check --batch-key: a batch needs two cells at least"
        )
        raise DataError(
            "no batch has cells enough to tell which features vary",
            where=f"--top {name}={top}",
            fix=fix,
        )
    limits = np.full(sums.total.shape, np.inf)
    for b, trend in found.items():
        limits[b] = trend.limits
    np.save(add_up.folder / "limits.npy", limits)
    above = add_up("clip", batches, add_up.folder / "limits.npy")
    scores = []
    for b, trend in found.items():
        total = sums.total[b] - above.total[b] + above.entries[b] * trend.limits
        squares = sums.squares[b] - above.squares[b] + above.entries[b] * trend.limits**2
        scores.append(trend.scores(total, squares))
    places = seurat_v3.rank_genes(np.array(scores), top)
    note = {
        "by": f"most variable within {len(found)} batches",
        "of": add_up.n_features,
        "kept": len(places),
    }
    return SelectedFeatures(places, note)


@dataclass(frozen=True)
class _Pass:
    """One pass over all rows of a modality. readings: by number of their source."""

    readings: dict[int, SourceReading]
    n_features: int
    folder: Path
    step_entries: int
    pool: WorkerPool

    def __call__(self, title: str, batches: int, limits: Path | None = None) -> _Sums:
        folder, modality = self.folder / title, self.folder.name
        folder.mkdir(parents=True, exist_ok=True)
        entries = max(self.step_entries, sum(r.nnz for r in self.readings.values()) // MANY_TASKS)
        tasks = {}
        for i, reading in self.readings.items():
            step = reading.ranges(self.step_entries)[0][1] if reading.n_rows else 1
            for lo, hi in reading.ranges(entries):
                out = folder / f"{i:03d}-{lo:012d}.npz"
                tasks[out] = _Task(reading, lo, hi, step, batches, limits, out)
        run_missing(self.pool, f"select {modality} ({title})", _add_rows, tasks)
        sums = np.zeros((3, batches * self.n_features), np.int64)
        cells = np.zeros(batches, np.int64)
        for path in tasks:
            with np.load(path) as part:
                cells += part["cells"]
                sums[:, part["at"]] += part["sums"]
        return _Sums(cells, *sums.reshape(3, batches, self.n_features))


def _add_rows(task: _Task) -> None:
    """Add up a task's rows, some at a time, and leave what is not zero in a file."""
    n_features = task.reading.target.n_features
    batch = np.load(task.reading.folder / "batch.npy", mmap_mode="r")[task.lo : task.hi]
    batch = (
        np.where(batch < 0, task.batches - 1, batch)
        if task.batches > 1
        else np.zeros(len(batch), np.int32)
    )
    there, local = np.unique(
        batch, return_inverse=True
    )  # only the batches of these rows need memory
    limits = np.zeros((len(there), n_features))
    if task.limits is not None:
        limits[:] = np.load(task.limits, mmap_mode="r")[there]
    sums = np.zeros((3, len(there), n_features), np.int64)
    cells = np.zeros(task.batches, np.int64)
    for lo in range(task.lo, task.hi, task.step):
        hi = min(lo + task.step, task.hi)
        rows = sp.csr_matrix(task.reading.rows(lo, hi))
        of = local[lo - task.lo : hi - task.lo]
        parts = (a.astype(np.int64, copy=False) for a in (rows.indptr, rows.indices, rows.data))
        _add(*parts, of, limits, sums)
        cells += np.bincount(there[of[np.diff(rows.indptr) > 0]], minlength=task.batches)
    at = np.flatnonzero(sums[0])
    flat = there[at // n_features].astype(np.int64) * n_features + at % n_features
    with replace_file(task.out, unique=True) as temporary, temporary.open("wb") as file:
        np.savez(file, at=flat, sums=sums.reshape(3, -1)[:, at], cells=cells)


@njit(nogil=True, cache=True)
def _add(indptr, indices, values, batch, limits, sums):  # type: ignore[no-untyped-def]
    """Add the entries above their limit to sums (3, batches, features): how many, their sum, and that of squares."""
    for row in range(len(indptr) - 1):
        b = batch[row]
        for i in range(indptr[row], indptr[row + 1]):
            column, value = indices[i], values[i]
            if value > limits[b, column]:
                sums[0, b, column] += 1
                sums[1, b, column] += value
                sums[2, b, column] += value * value
