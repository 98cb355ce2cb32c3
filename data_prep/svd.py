"""The leading singular vectors of a modality over all cells of a store, in a few passes.

A randomised SVD by block Krylov iteration (Halko, Martinsson, Shkolnisky and Tygert, "An
algorithm for the principal component analysis of large data sets", 2011). A is the (cells,
features) matrix of `clue_dist.normalise`, which is never made. Power iterations start from a
random Q_1 of shape (features, components + OVERSAMPLING). Q_{i+1} is an orthonormal basis of A'A
Q_i, orthogonal to all before it (by QR, twice). The result is the best vectors in the span of all
Q_i, by Rayleigh-Ritz.

One pass adds up what the normalisation needs, then each iteration is a pass. Blocks of cells are
the tasks, at most about MANY_TASKS of them. Each leaves its sum of (features, components +
OVERSAMPLING) float64 in a file. Files are added up in one order, so that the result depends on
neither the number of workers nor on which of them was killed. A worker needs the memory of about
three such sums, the process that combines them of two for every pass.

    JOB/MODALITY/moments.npz             idf, mean, scale (JOB: the folder that `claim_job` yields)
    JOB/MODALITY/basis-1.npz ...         the Q of each pass
    JOB/MODALITY/pass-1.npz ...          its result: the next Q, and its part of Q'A'AQ
    JOB/MODALITY/{moments,pass-1}/       sums of the tasks of the pass that is under way
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

import clue_dist
from clue_dist.errors import DataError, StoreError
from clue_dist.files import replace_file
from clue_dist.kinds import KINDS
from clue_dist.normalise import (
    Rows,
    compute_deviation,
    compute_inverse_frequency,
    compute_standardisation,
    normalise_rows,
    sum_columns,
)
from clue_dist.store import layout
from clue_dist.store import svd as stored
from clue_dist.store.location import parse_location, require_plain_files
from clue_dist.store.manifest import Manifest
from clue_dist.store.reader import SegmentReader
from clue_dist.store.rows import CsrRows
from clue_dist.store.svd import StoredSvd, SvdNote
from data_prep.jobs.array_files import load_arrays
from data_prep.jobs.job_folder import claim_job
from data_prep.jobs.whole_folders import remove_leftovers
from data_prep.jobs.workers import WorkerPool, run_missing

OVERSAMPLING = 10
MANY_TASKS = 64  # of a pass: each leaves a file
STEP_ENTRIES = 2**21  # stored values that a task holds at once
SMALLEST_SHARE = 1e-6  # singular values below this share of the first one are rounding
SMALLEST_RESIDUAL = 1e-10  # a product whose residual has a smaller share of its norm adds nothing


@dataclass(frozen=True)
class SvdOptions:
    """What decides the result, beside the store."""

    components: int = 50
    power: int = 7  # iterations
    seed: int = 0  # seed of the start


def compute_svd(
    store_location: str, modalities: Sequence[str], options: SvdOptions, pool: WorkerPool
) -> dict[str, SvdNote]:
    """Compute the SVD of modalities and save it in the store.

    A run of the same job that was interrupted goes on where it stopped.

    Args:
        store_location: the store, a folder.
        modalities: by name; none means all.
        options: what decides the result, beside the store.
        pool: the workers.

    Returns:
        By modality, the note of what was saved.

    Raises:
        StoreError: there is no such modality; the store is damaged or not in a folder; another job
            is or was under way.
        DataError: cells were added to the store meanwhile.
    """
    root = parse_location(store_location)
    if not isinstance(root, Path):
        raise StoreError(
            "an SVD can only be saved in a folder",
            where=store_location,
            fix="compute it where the store's folder is, then copy its folder `svd` too",
        )
    require_plain_files(root)
    manifest = Manifest.read(root)
    names = _choose_modalities(manifest, modalities)
    description = {
        "store": manifest.fingerprint,
        "modalities": names,
        "options": asdict(options),
        "version": [clue_dist.__version__, stored.VERSION],
    }
    root = root.resolve()
    with claim_job(root.with_name(root.name + ".svd"), description, "SVD") as job:
        if (root / stored.FOLDER).is_dir():
            remove_leftovers(root / stored.FOLDER)
        return {
            name: _compute_modality(root, manifest, name, options, job / name, pool)
            for name in names
        }


def format_svds(notes: dict[str, SvdNote]) -> str:
    """Say what was saved, a line for each modality."""
    return "\n".join(
        f"  {name}: {note.components} components of {note.n_cells:,} cells, {note.normalise}"
        for name, note in notes.items()
    )


def _choose_modalities(manifest: Manifest, modalities: Sequence[str]) -> list[str]:
    """List the modalities that are asked for, or all that any cell carries."""
    carried = {name for segment in manifest.strata.values() for name in segment.modalities}
    names = [name for name in manifest.modalities if name in carried]
    if unknown := [name for name in modalities if name not in names]:
        raise StoreError(
            "no cell carries this modality",
            where="--modality",
            got=", ".join(unknown),
            expected=", ".join(names),
        )
    return [name for name in names if name in modalities or not modalities]


def _compute_modality(
    root: Path, manifest: Manifest, name: str, options: SvdOptions, folder: Path, pool: WorkerPool
) -> SvdNote:
    """Compute and save the SVD of one modality, unless the store has it already."""
    modality = manifest.modalities[name]
    segments = [each for each in manifest.strata.values() if name in each.modalities]
    note = SvdNote(
        store=manifest.fingerprint,
        modality=name,
        normalise=KINDS[modality.kind].normalise,
        n_cells=sum(segment.n_cells for segment in segments),
        n_features=modality.n_features,
        components=min(options.components, modality.n_features),
        power=options.power,
        seed=options.seed,
    )
    if (stored_note := _find_stored(root, manifest, note)) is not None:
        return stored_note
    matrix = _StandardisedMatrix(root, manifest, name, note.normalise, folder, pool)
    moments = matrix.compute_moments(note.n_cells)
    width = min(note.components + OVERSAMPLING, note.n_features)
    random = np.random.default_rng(options.seed).standard_normal((note.n_features, width))
    start = np.linalg.qr(random)[0]
    singular, vectors = find_leading_vectors(
        matrix.multiply, start, options.power + 1, note.components, folder
    )
    if Manifest.read(root).fingerprint != manifest.fingerprint:
        raise DataError(
            "cells were added meanwhile",
            where=root,
            fix="run the same command again, for all of them",
        )
    return stored.write_svd(root, StoredSvd(note, vectors.astype(np.float32), singular, **moments))


def _find_stored(root: Path, manifest: Manifest, wanted: SvdNote) -> SvdNote | None:
    """Find the note of an SVD that is in the store already, undamaged and as it is wanted."""
    try:
        found = stored.read_svd(root, manifest, wanted.modality)
    except StoreError:
        return None  # what is damaged will be replaced
    unsigned = {"arrays": wanted.arrays, "digest": ""}
    return found.note if found and found.note.model_copy(update=unsigned) == wanted else None


def find_leading_vectors(
    multiply: Callable[[Path, Path], np.ndarray],
    start: np.ndarray,
    passes: int,
    components: int,
    folder: Path,
) -> tuple[np.ndarray, np.ndarray]:
    """Find the leading singular values of A and its right singular vectors.

    Args:
        multiply: called with a file of Q, (features, width), and the file that the result of the
            pass will go into; returns A'A Q.
        start: the first Q, orthonormal.
        passes: how often to multiply.
        components: how many singular values to find.
        folder: the result of each pass is kept here, and found again.

    Returns:
        (components,) and (features, components), both zero beyond the rank of A. The largest
        loading of each vector is positive.
    """
    blocks, columns = [start], []
    for i in range(1, passes + 1):
        result = folder / f"pass-{i}.npz"
        if not result.exists():
            product = multiply(_save_arrays(folder / f"basis-{i}.npz", q=blocks[-1]), result)
            basis = np.concatenate(blocks, 1)
            new_block = _orthonormalise(basis, product)
            _save_arrays(result, next=new_block, column=basis.T @ product)
            _remove_sums(result)
        with np.load(result) as part:
            blocks.append(part["next"])
            columns.append(part["column"])
        if not blocks[-1].shape[1]:  # the blocks span all that there is
            break
    basis = np.concatenate(blocks[: len(columns)], 1)
    values, vectors = np.linalg.eigh(_assemble_gram(columns))
    values, vectors = values[::-1][:components], basis @ vectors[:, ::-1][:, :components]
    singular = np.sqrt(np.maximum(values, 0))
    largest = np.abs(vectors).argmax(0)
    sign = np.sign(vectors[largest, np.arange(components)])
    is_real = singular > SMALLEST_SHARE * singular[0]
    return np.where(is_real, singular, 0), vectors * np.where(is_real, sign, 0)


def _assemble_gram(columns: Sequence[np.ndarray]) -> np.ndarray:
    """Assemble the symmetric Q'A'AQ from its blocks of columns, each down to the diagonal."""
    size = columns[-1].shape[0]
    gram = np.zeros((size, size))
    place = 0
    for column in columns:
        rows, width = column.shape
        gram[:rows, place : place + width] = column
        gram[place : place + width, :rows] = column.T
        place += width
    return (gram + gram.T) / 2


def _orthonormalise(basis: np.ndarray, product: np.ndarray) -> np.ndarray:
    """Return an orthonormal basis of what `product` adds to the span of `basis`.

    Both are (features, ...). The result may have fewer columns than the product, or none.
    Directions that rounding makes up do no harm, if they are orthogonal too.
    """
    residual = product - basis @ (basis.T @ product)
    width = min(product.shape[1], basis.shape[0] - basis.shape[1])
    if not width or np.linalg.norm(residual) <= SMALLEST_RESIDUAL * np.linalg.norm(product):
        return product[:, :0]
    q = np.linalg.svd(residual, full_matrices=False)[0][:, :width]
    for _ in range(2):  # rounding leaves something of the basis; a second time is enough
        q = np.linalg.qr(q - basis @ (basis.T @ q))[0]
    return q


@dataclass(frozen=True)
class _PassTask:
    """The part that some blocks of a segment have in one pass."""

    root: Path
    segment: str
    modality: str
    how: str  # the normalisation
    first_block: int
    stop_block: int
    step_blocks: int  # read at once
    moments: Path
    basis: Path | None  # the file of Q; None: the moments are wanted
    out: Path


@dataclass(frozen=True)
class _StandardisedMatrix:
    """The matrix A of one modality: its standardised cells, never in memory."""

    root: Path
    manifest: Manifest
    modality: str
    how: str  # the normalisation
    folder: Path
    pool: WorkerPool

    def compute_moments(self, n_cells: int) -> dict[str, np.ndarray]:
        """Compute idf, mean and scale of the cells that carry the modality, (features,) each."""
        path = self.folder / "moments.npz"
        if not path.exists():
            detected, total, squares = self._add_up_tasks(path, None)
            mean = total / n_cells
            deviation = compute_deviation(mean, squares / n_cells)
            mean, scale = compute_standardisation(self.how, mean, deviation)
            idf = compute_inverse_frequency(n_cells, detected)
            _save_arrays(path, idf=idf, mean=mean, scale=scale)
            _remove_sums(path)
        with np.load(path) as part:
            return dict(part)

    def multiply(self, basis: Path, result: Path) -> np.ndarray:
        """Compute A'A Q, (features, width), of the Q in a file."""
        return self._add_up_tasks(result, basis)

    def _add_up_tasks(self, result: Path, basis: Path | None) -> np.ndarray:
        """Make one pass: add up what all tasks leave."""
        sums = _name_sums_folder(result)
        sums.mkdir(parents=True, exist_ok=True)
        moments = self.folder / "moments.npz"
        tasks = {}
        for segment, first, stop, step in _cut_blocks(self.manifest, self.modality):
            out = sums / f"{segment}-{first:012d}.npz"
            tasks[out] = _PassTask(
                self.root, segment, self.modality, self.how, first, stop, step, moments, basis, out
            )
        function = _add_up_moments if basis is None else _multiply_blocks
        run_missing(self.pool, f"svd {self.modality} ({sums.name})", function, tasks)
        total: Any = 0.0
        for path in tasks:  # in their order, which sums of floats depend on
            with np.load(path) as part:
                total = total + part["sum"]
        return np.asarray(total)


def _name_sums_folder(result: Path) -> Path:
    """Name the folder of what tasks leave; it is needed until the result is saved."""
    return result.with_suffix("")


def _remove_sums(result: Path) -> None:
    """Remove what tasks left for a result, once that is saved."""
    shutil.rmtree(_name_sums_folder(result), ignore_errors=True)


def _cut_blocks(manifest: Manifest, modality: str) -> Iterator[tuple[str, int, int, int]]:
    """Yield segment, first block, last block + 1 and blocks read at once of every task."""
    block_cells, n_features = manifest.block_cells, manifest.modalities[modality].n_features
    segments = {name: s for name, s in manifest.strata.items() if modality in s.modalities}
    n_blocks = {name: layout.count_blocks(s.n_cells, block_cells) for name, s in segments.items()}
    for name, segment in segments.items():
        block_entries = segment.packed[modality].capacity or block_cells * n_features
        step_blocks = max(1, STEP_ENTRIES // block_entries)
        task_blocks = max(step_blocks, -(-sum(n_blocks.values()) // MANY_TASKS))
        for first in range(0, n_blocks[name], task_blocks):
            yield name, first, min(first + task_blocks, n_blocks[name]), step_blocks


def _read_cells(task: _PassTask, idf: np.ndarray | None) -> Iterator[tuple[Rows, Rows]]:
    """Read the task's cells, some at a time: counts and normalised values, (n, features)."""
    reader = SegmentReader(task.root, Manifest.read(task.root), task.segment)
    for first in range(task.first_block, task.stop_block, task.step_blocks):
        stop = min(first + task.step_blocks, task.stop_block)
        stop_cell = min(stop * reader.block_cells, reader.n_cells)
        rows = reader.read_rows(task.modality, np.arange(first * reader.block_cells, stop_cell))
        counts = rows.to_scipy() if isinstance(rows, CsrRows) else rows
        yield counts, normalise_rows(counts, task.how, idf)


def _add_up_moments(task: _PassTask) -> None:
    """Leave (3, features): cells that have a feature, sum of its values, and of their squares."""
    total: Any = 0.0
    for counts, values in _read_cells(task, None):
        detected = sum_columns(counts, lambda v: v > 0)
        total += np.stack([detected, sum_columns(values), sum_columns(values, np.square)])
    _save_arrays(task.out, sum=total)


def _multiply_blocks(task: _PassTask) -> None:
    """Leave the task's part of A'A Q, (features, width).

    A = (x - mean) / scale is dense where x is sparse, so that mean and scale go to the other side.
    """
    assert task.basis is not None
    moments = load_arrays(task.moments)
    idf, mean, scale = moments["idf"], moments["mean"], moments["scale"]
    weight = load_arrays(task.basis)["q"] / scale[:, None]  # (features, width)
    product, total = np.zeros_like(weight), np.zeros(weight.shape[1])
    for _, x in _read_cells(task, idf):
        projected = x @ weight - mean @ weight  # (n, width)
        product += x.T @ projected
        total += projected.sum(0)
    _save_arrays(task.out, sum=(product - np.outer(mean, total)) / scale[:, None])


def _save_arrays(path: Path, **arrays: np.ndarray) -> Path:
    """Save arrays in a whole file: a worker that was given up for dead may still write it."""
    with replace_file(path, unique=True) as temporary, temporary.open("wb") as file:
        np.savez(file, allow_pickle=False, **arrays)
    return path
