"""Spools: validated rows between the two passes, sorted by where the shuffle puts them.

One folder per task of the first pass, holding whole rows sorted by key (`cells.keys`). A shard's rows are then a
run in each spool, so the second pass reads what it needs and no more. A spool exists only once it is complete.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import scipy.sparse as sp
from numba import njit

from clue_dist.store.layout import unsigned
from clue_dist.store.rows import Csr
from data_prep.files import whole_folder
from data_prep.sources import Rows


def write(folder: Path, keys: np.ndarray, rows: Rows) -> None:
    """Write rows sorted by key. keys: (n,) int64, unique; rows: (n, features), CSR of integers, or dense."""
    order = np.argsort(keys)
    with whole_folder(folder) as spool:
        np.save(spool / "keys.npy", keys[order])
        extremes = (
            _write_dense(spool, order, rows) if isinstance(rows, np.ndarray) else _write_sparse(spool, order, rows)
        )
        np.save(spool / "extremes.npy", np.array(extremes, np.int64))


def _write_dense(spool: Path, order: np.ndarray, rows: np.ndarray) -> tuple[int, int]:
    """Returns the largest count (0 for measured floats, whose type does not depend on them) and 0."""
    np.save(spool / "lengths.npy", np.count_nonzero(rows, axis=1)[order].astype(np.uint32))
    np.save(spool / "values.npy", rows[order])
    return 0 if rows.dtype.kind == "f" else int(rows.max(initial=0)), 0


def _write_sparse(spool: Path, order: np.ndarray, rows: sp.csr_matrix) -> tuple[int, int]:
    """Returns the largest count and the largest gap between columns."""
    largest, lengths = int(rows.data.max(initial=0)), np.diff(rows.indptr)[order]
    indptr = _indptr(lengths)
    indices, values = np.empty(indptr[-1], _index_type(rows.shape[1])), np.empty(indptr[-1], unsigned(largest))
    gap = copy_rows(rows.indptr, rows.indices, rows.data, order, np.arange(len(order)), indptr, indices, values)
    np.save(spool / "lengths.npy", lengths.astype(np.uint32))
    np.save(spool / "indptr.npy", indptr)
    np.save(spool / "indices.npy", indices)
    np.save(spool / "values.npy", values)
    return largest, int(gap)


@dataclass(frozen=True)
class Survey:
    """What the second pass must know of a spool. keys, lengths: (n,); the largest count and gap between columns."""

    keys: np.ndarray
    lengths: np.ndarray
    largest: int
    gap: int


def survey(folder: Path) -> Survey:
    """Read a spool's keys, row lengths and extremes."""
    largest, gap = np.load(folder / "extremes.npy").tolist()
    return Survey(np.load(folder / "keys.npy"), np.load(folder / "lengths.npy"), largest, gap)


def read(folders: list[Path], wanted: np.ndarray, n_features: int, dtype: str) -> Csr | np.ndarray:
    """The rows with keys `wanted`, (n,), in that order, out of any spools; each key must be in exactly one.

    Returns a Csr with integer values for sparse spools, or (n, features) of `dtype` for dense ones.
    """
    order = np.argsort(wanted)
    hits = [(folder, *_find(np.load(folder / "keys.npy", mmap_mode="r"), wanted[order])) for folder in folders]
    hits = [(folder, rows, order[at]) for folder, rows, at in hits if len(rows)]
    if sum(len(rows) for _, rows, _ in hits) != len(wanted):
        raise AssertionError(f"{len(wanted)} rows wanted, spools hold {sum(len(r) for _, r, _ in hits)}")
    if not hits or not (hits[0][0] / "indptr.npy").exists():
        return _read_dense(hits, len(wanted), n_features, dtype)
    lengths = np.empty(len(wanted), np.int64)
    for folder, rows, at in hits:
        lengths[at] = np.load(folder / "lengths.npy", mmap_mode="r")[rows]
    indptr = _indptr(lengths)
    indices, values = np.empty(indptr[-1], _index_type(n_features)), np.empty(indptr[-1], dtype)
    for folder, rows, at in hits:
        parts = (
            np.load(folder / f"{name}.npy", mmap_mode="r").view(np.ndarray) for name in ("indptr", "indices", "values")
        )
        copy_rows(*parts, rows, at, indptr, indices, values)
    return Csr(indptr, indices, values, n_features)


def _read_dense(hits: list[tuple[Path, np.ndarray, np.ndarray]], n: int, n_features: int, dtype: str) -> np.ndarray:
    out = np.empty((n, n_features), dtype)
    for folder, rows, at in hits:
        out[at] = np.load(folder / "values.npy", mmap_mode="r")[rows]
    return out


def _find(keys: np.ndarray, wanted: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Rows of a spool that are wanted, and their places in `wanted`. Both inputs sorted.

    The upper bits of a key are its planned stratum: one narrow run of the spool is searched for each.
    """
    groups = np.flatnonzero(np.diff(wanted >> GROUP_SHIFT, prepend=-1))
    starts = np.searchsorted(keys, wanted[groups])
    stops = np.searchsorted(keys, wanted[np.append(groups[1:], len(wanted)) - 1], side="right")
    candidates = np.concatenate(
        [np.arange(i, j) for i, j in zip(starts, stops, strict=True)] or [np.empty(0, np.int64)]
    )
    at = np.searchsorted(wanted, keys[candidates])
    hit = wanted[np.minimum(at, len(wanted) - 1)] == keys[candidates]
    return candidates[hit], at[hit]


GROUP_SHIFT = 40  # a key is (planned stratum << 40) + the cell's place in the shuffle of all cells


def _index_type(n_features: int) -> type:
    return np.uint16 if n_features <= 2**16 else np.int32


def _indptr(lengths: np.ndarray) -> np.ndarray:
    return np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)])


@njit(nogil=True, cache=True)
def copy_rows(indptr, indices, values, rows, at, out_indptr, out_indices, out_values):  # type: ignore[no-untyped-def]
    """Copy row rows[i] to row at[i] of the output; returns the largest gap between columns of a row."""
    widest = np.int64(0)
    for i in range(len(rows)):
        source, target = indptr[rows[i]], out_indptr[at[i]]
        before = np.int64(0)
        for k in range(out_indptr[at[i] + 1] - target):
            column = np.int64(indices[source + k])
            widest = max(widest, column - before)
            before = column
            out_indices[target + k] = column
            out_values[target + k] = values[source + k]
    return widest
