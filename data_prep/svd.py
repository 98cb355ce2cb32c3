"""The leading singular vectors of a modality over all cells of a store that carry it, in a few passes over its blocks.

A randomised SVD by block Krylov iteration (Halko, Martinsson, Shkolnisky and Tygert, "An algorithm for the principal
component analysis of large data sets", 2011): with A the (cells, features) matrix of `clue_dist.normalise`, power
iterations Q_{i+1} = orthonormal part of A'A Q_i from a random (features, components + OVERSAMPLING) start, each
orthogonal to all before it (QR twice), and the best vectors in the span of all Q_i by Rayleigh-Ritz. A is never made.

One pass adds up what the normalisation needs, then each iteration is a pass. Blocks of cells are the tasks. Each leaves
its sum of (features, components + OVERSAMPLING) float64 in a file, at most MANY_TASKS or so at a time, and files are
added up in one order: the result depends on neither the number of workers nor on who was killed. A worker needs the
memory of about three such sums, the process that combines them of two for every pass.

    JOB/MODALITY/moments.npz               idf, mean, scale (JOB: the folder that `job` yields)
    JOB/MODALITY/basis-1.npz ...           the Q of each pass
    JOB/MODALITY/pass-1.npz ...            what it gave: the next Q, and its part of Q'A'AQ
    JOB/MODALITY/{moments,pass-1}/         sums of the tasks of the pass under way
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
from data_prep.jobs.job_folder import claim_job
from data_prep.jobs.whole_files import remove_leftovers
from data_prep.jobs.workers import WorkerPool, run_missing

OVERSAMPLING = 10
MANY_TASKS = 64  # of a pass: each leaves a file
STEP_ENTRIES = 2**21  # stored values that a task holds at once
RANK = 1e-6  # singular values below this share of the first are rounding


@dataclass(frozen=True)
class SvdOptions:
    """What decides the result, beside the store."""

    components: int = 50
    power: int = 7
    seed: int = 0


def compute_svd(
    where: str, modalities: Sequence[str], options: SvdOptions, pool: WorkerPool
) -> dict[str, SvdNote]:
    """Save the SVD of the modalities (none: of all) in the store; goes on where an interrupted run stopped.

    Raises:
        StoreError: no such modality; a store that is damaged or not a folder; another run is or was under way.
        DataError: cells were added to the store meanwhile.
    """
    root = parse_location(where)
    if not isinstance(root, Path):
        fix = "compute it where the store's folder is, then copy its folder `svd` too"
        raise StoreError("an SVD can only be saved in a folder", where=where, fix=fix)
    require_plain_files(root)
    manifest = Manifest.read(root)
    names = _chosen(manifest, modalities)
    version = [clue_dist.__version__, stored.VERSION]
    description = {
        "store": manifest.fingerprint,
        "modalities": names,
        "options": asdict(options),
        "version": version,
    }
    root = root.resolve()
    with claim_job(root.with_name(root.name + ".svd"), description, "SVD") as work:
        if (root / stored.FOLDER).is_dir():
            remove_leftovers(root / stored.FOLDER)
        return {name: _one(root, manifest, name, options, work / name, pool) for name in names}


def format_svds(notes: dict[str, SvdNote]) -> str:
    """What was saved, a line for each modality."""
    return "\n".join(
        f"  {m}: {n.components} components of {n.n_cells:,} cells, {n.normalise}"
        for m, n in notes.items()
    )


def _chosen(manifest: Manifest, modalities: Sequence[str]) -> list[str]:
    carried = [
        m for m in manifest.modalities if any(m in s.modalities for s in manifest.strata.values())
    ]
    if unknown := [m for m in modalities if m not in carried]:
        got = ", ".join(unknown)
        raise StoreError(
            "no cell carries this modality",
            where="--modality",
            got=got,
            expected=", ".join(carried),
        )
    return [m for m in carried if m in modalities or not modalities]


def _one(
    root: Path, manifest: Manifest, name: str, options: SvdOptions, folder: Path, pool: WorkerPool
) -> SvdNote:
    """The SVD of one modality, computed unless it is there."""
    how = KINDS[manifest.modalities[name].kind].normalise
    n_cells = sum(s.n_cells for s in manifest.strata.values() if name in s.modalities)
    n_features = manifest.modalities[name].n_features
    components = min(options.components, n_features)
    note = SvdNote(
        store=manifest.fingerprint,
        modality=name,
        normalise=how,
        n_cells=n_cells,
        n_features=n_features,
        components=components,
        power=options.power,
        seed=options.seed,
    )
    if (there := _there(root, manifest, note)) is not None:
        return there
    a = _Matrix(root, manifest, name, how, folder, pool)
    moments = a.moments(n_cells)
    width = min(components + OVERSAMPLING, n_features)
    start = np.linalg.qr(np.random.default_rng(options.seed).standard_normal((n_features, width)))[
        0
    ]
    singular, vectors = find_leading_vectors(
        a.multiply, start, options.power + 1, components, folder
    )
    if Manifest.read(root).fingerprint != manifest.fingerprint:
        raise DataError(
            "cells were added meanwhile",
            where=root,
            fix="run the same command again, for all of them",
        )
    return stored.write_svd(root, StoredSvd(note, vectors.astype(np.float32), singular, **moments))


def _there(root: Path, manifest: Manifest, wanted: SvdNote) -> SvdNote | None:
    """The note of an SVD that is in the store already, whole and as it is wanted."""
    try:
        found = stored.read_svd(root, manifest, wanted.modality)
    except StoreError:
        return None  # it will be replaced
    unsigned = {"arrays": wanted.arrays, "digest": ""}
    return found.note if found and found.note.model_copy(update=unsigned) == wanted else None


def find_leading_vectors(
    multiply: Callable[[Path, Path], np.ndarray],
    start: np.ndarray,
    passes: int,
    components: int,
    folder: Path,
) -> tuple[np.ndarray, np.ndarray]:
    """Singular values (components,) of A and right singular vectors (features, components), zero beyond its rank.

    multiply: a file of Q (features, width), and the file its result will go into -> A'A Q; start: the first Q,
    orthonormal; folder: what passes gave is kept there, and found again.
    """
    blocks, columns = [start], []
    for i in range(passes):
        done = folder / f"pass-{i + 1}.npz"
        if not done.exists():
            product = multiply(_save(folder / f"basis-{i + 1}.npz", q=blocks[-1]), done)
            basis = np.concatenate(blocks, 1)
            _save(done, next=_beyond(basis, product), column=basis.T @ product)
            _remove_sums(done)
        with np.load(done) as part:
            blocks.append(part["next"])
            columns.append(part["column"])
        if not blocks[-1].shape[1]:  # the blocks span all there is
            break
    basis = np.concatenate(blocks[: len(columns)], 1)
    gram = np.zeros(
        (basis.shape[1], basis.shape[1])
    )  # Q'A'AQ: its columns came block by block, down to the diagonal
    at = 0
    for column in columns:
        rows, width = column.shape
        gram[:rows, at : at + width], gram[at : at + width, :rows] = column, column.T
        at += width
    values, vectors = np.linalg.eigh((gram + gram.T) / 2)
    values, vectors = values[::-1][:components], basis @ vectors[:, ::-1][:, :components]
    singular = np.sqrt(np.maximum(values, 0))
    sign = np.sign(
        vectors[np.abs(vectors).argmax(0), np.arange(components)]
    )  # the largest loading is positive
    real = singular > RANK * singular[0]
    return np.where(real, singular, 0), vectors * np.where(real, sign, 0)


def _beyond(basis: np.ndarray, product: np.ndarray) -> np.ndarray:
    """An orthonormal basis of what `product` adds to the span of `basis`, both (features, ...); it may have no columns.

    What it adds can be less than its width; directions that rounding makes up for it do no harm, if orthogonal too.
    """
    residual = product - basis @ (basis.T @ product)
    left = min(product.shape[1], basis.shape[0] - basis.shape[1])
    if not left or np.linalg.norm(residual) <= 1e-10 * np.linalg.norm(product):
        return product[:, :0]
    q = np.linalg.svd(residual, full_matrices=False)[0][:, :left]
    for _ in range(2):  # twice is enough
        q = np.linalg.qr(q - basis @ (basis.T @ q))[0]
    return q


@dataclass(frozen=True)
class _Task:
    """Blocks lo to hi of a stratum, some at a time. basis: file of Q; none: the moments are wanted."""

    root: Path
    stratum: str
    modality: str
    how: str
    lo: int
    hi: int
    step: int
    moments: Path
    basis: Path | None
    out: Path


@dataclass(frozen=True)
class _Matrix:
    """The standardised cells of one modality, never in memory."""

    root: Path
    manifest: Manifest
    modality: str
    how: str
    folder: Path
    pool: WorkerPool

    def moments(self, n: int) -> dict[str, np.ndarray]:
        """idf, mean and scale, (features,) each; n: cells that carry the modality."""
        path = self.folder / "moments.npz"
        if not path.exists():
            detected, total, squares = self._add_up(path, None)
            mean = total / n
            mean, scale = compute_standardisation(
                self.how, mean, compute_deviation(mean, squares / n)
            )
            _save(path, idf=compute_inverse_frequency(n, detected), mean=mean, scale=scale)
            _remove_sums(path)
        with np.load(path) as part:
            return dict(part)

    def multiply(self, basis: Path, result: Path) -> np.ndarray:
        """A'A Q, (features, width), of the Q in a file."""
        return self._add_up(result, basis)

    def _add_up(self, result: Path, basis: Path | None) -> np.ndarray:
        """One pass: the sum of what all tasks leave."""
        sums = _sums_of(result)
        sums.mkdir(parents=True, exist_ok=True)
        tasks = {}
        for name, lo, hi, step in _ranges(self.manifest, self.modality):
            out = sums / f"{name}-{lo:012d}.npz"
            moments = self.folder / "moments.npz"
            tasks[out] = _Task(
                self.root, name, self.modality, self.how, lo, hi, step, moments, basis, out
            )
        run_missing(
            self.pool, f"svd {self.modality} ({sums.name})", _multiply if basis else _moments, tasks
        )
        total: Any = 0.0
        for path in tasks:  # in order: sums of floats depend on it
            with np.load(path) as part:
                total = total + part["sum"]
        return np.asarray(total)


def _sums_of(result: Path) -> Path:
    """The folder of what tasks leave for a result: needed until that is saved."""
    return result.with_suffix("")


def _remove_sums(result: Path) -> None:
    shutil.rmtree(_sums_of(result), ignore_errors=True)


def _ranges(manifest: Manifest, modality: str) -> Iterator[tuple[str, int, int, int]]:
    """Stratum, first block, last block + 1 and blocks at once of every task."""
    size, n_features = manifest.block_cells, manifest.modalities[modality].n_features
    having = {name: s for name, s in manifest.strata.items() if modality in s.modalities}
    blocks = {name: layout.count_blocks(s.n_cells, size) for name, s in having.items()}
    for name, s in having.items():
        entries = s.packed[modality].capacity or size * n_features  # of a block
        step = max(1, STEP_ENTRIES // entries)
        task = max(step, -(-sum(blocks.values()) // MANY_TASKS))
        for lo in range(0, blocks[name], task):
            yield name, lo, min(lo + task, blocks[name]), step


def _rows(task: _Task, idf: np.ndarray | None) -> Iterator[tuple[Rows, Rows]]:
    """The task's cells, some at a time: raw counts and normalised values, (n, features)."""
    reader = SegmentReader(task.root, Manifest.read(task.root), task.stratum)
    size = reader.block_cells
    for lo in range(task.lo, task.hi, task.step):
        hi = min(lo + task.step, task.hi)
        rows = reader.read_rows(task.modality, np.arange(lo * size, min(hi * size, reader.n_cells)))
        counts = rows.to_scipy() if isinstance(rows, CsrRows) else rows
        yield counts, normalise_rows(counts, task.how, idf)


def _moments(task: _Task) -> None:
    """Cells with the feature, and the sums of its normalised values and of their squares: (3, features)."""
    total: Any = 0.0
    for counts, x in _rows(task, None):
        total += np.stack(
            [sum_columns(counts, lambda v: v > 0), sum_columns(x), sum_columns(x, np.square)]
        )
    _save(task.out, sum=total)


def _multiply(task: _Task) -> None:
    """The task's part of A'A Q, (features, width), with A = (x - mean) / scale and x kept sparse."""
    with np.load(task.moments) as part:
        idf, mean, scale = part["idf"], part["mean"], part["scale"]
    with np.load(_basis_of(task)) as part:
        weight = part["q"] / scale[:, None]  # (features, width)
    out, total = np.zeros_like(weight), np.zeros(weight.shape[1])
    for _, x in _rows(task, idf):
        projected = x @ weight - mean @ weight  # (n, width)
        out += x.T @ projected
        total += projected.sum(0)
    _save(task.out, sum=(out - np.outer(mean, total)) / scale[:, None])


def _basis_of(task: _Task) -> Path:
    assert task.basis is not None
    return task.basis


def _save(path: Path, **arrays: np.ndarray) -> Path:
    """Under a name of its own first: a worker given up for dead may still be at it."""
    with replace_file(path, unique=True) as temporary, temporary.open("wb") as file:
        np.savez(file, allow_pickle=False, **arrays)
    return path
