"""Spools: validated rows between the two passes, sorted by where the shuffle puts them.

One folder per task of the first pass, holding whole rows sorted by key (`cells.keys`). A shard's rows are then a
run in each spool, so the second pass reads what it needs and no more. A spool exists only once it is complete.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numba import njit

from clue_dist.store.kernels import compute_row_starts, copy_rows
from clue_dist.store.manifest import PackedModality
from clue_dist.store.rows import COUNT_BITS, CodedRows, recode_rows_as_binary
from data_prep.jobs.whole_files import load_array, make_whole_folder, save_array


def write_spool(folder: Path, keys: np.ndarray, rows: CodedRows | np.ndarray, largest: int) -> None:
    """Write rows sorted by key. keys: (n,) int64, unique, ascending; rows: coded, or dense (n, features); largest:
    count among them, 0 where they are measured floats, which keep their type whatever they are."""
    with make_whole_folder(folder) as spool:
        save_array(spool / "keys.npy", keys)
        if isinstance(rows, np.ndarray):
            nonzeros = np.count_nonzero(rows, axis=1)
            save_array(
                spool / "lengths.npy",
                np.column_stack([nonzeros, np.zeros((len(rows), 3), int)]).astype(np.uint32),
            )
            save_array(spool / "values.npy", rows)
            save_array(spool / "largest.npy", np.array([largest, 0], np.int64))
        else:
            binary = count_binary_gaps(rows.rest, rows.lengths, rows.compute_starts())
            save_array(spool / "lengths.npy", np.column_stack([rows.lengths, binary]))
            save_array(spool / "starts.npy", rows.compute_starts())
            save_array(spool / "codes.npy", rows.codes)
            save_array(spool / "rest.npy", rows.rest)
            save_array(
                spool / "largest.npy", np.array([largest, int(rows.rest.max(initial=0))], np.int64)
            )


@dataclass(frozen=True)
class SpoolSurvey:
    """What the second pass must know of a spool. keys: (n,); lengths: (n, 4), of each row its non-zeros, far gaps and
    high counts, and the far gaps it would have as a binary row; the largest count, and the largest number in rest."""

    keys: np.ndarray
    lengths: np.ndarray
    largest: int
    rest: int


def survey_spool(folder: Path) -> SpoolSurvey:
    """Read a spool's keys, what its rows take, and its largest numbers."""
    return SpoolSurvey(
        np.load(folder / "keys.npy"),
        np.load(folder / "lengths.npy"),
        *np.load(folder / "largest.npy").tolist(),
    )


def read_spool(
    folders: list[Path], wanted: np.ndarray, n_features: int, packed: PackedModality
) -> CodedRows | np.ndarray:
    """The rows with keys `wanted`, (n,), in that order, out of any spools; each key must be in exactly one.

    Returns them as `packed` says: coded, or (n, features) of its type.
    """
    order = np.argsort(wanted)
    ascending = wanted[order]
    groups = np.flatnonzero(np.diff(ascending >> GROUP_SHIFT, prepend=-1))
    ends = ascending[groups], ascending[np.append(groups[1:], len(wanted)) - 1]
    hits = [
        (folder, *_find(load_array(folder / "keys.npy"), ascending, ends)) for folder in folders
    ]
    hits = [(folder, rows, order[at]) for folder, rows, at in hits if len(rows)]
    if sum(len(rows) for _, rows, _ in hits) != len(wanted):
        raise AssertionError(
            f"{len(wanted)} rows wanted, spools hold {sum(len(r) for _, r, _ in hits)}"
        )
    if packed.values is not None:
        return _read_dense(hits, len(wanted), n_features, packed.values)
    got = _read_coded(hits, len(wanted), str(packed.rest_type))
    return got if packed.bits == got.bits else recode_rows_as_binary(got)


def _read_dense(
    hits: list[tuple[Path, np.ndarray, np.ndarray]], n: int, n_features: int, dtype: str
) -> np.ndarray:
    out = np.empty((n, n_features), dtype)
    for folder, rows, at in hits:
        out[at] = load_array(folder / "values.npy")[rows]
    return out


def _read_coded(
    hits: list[tuple[Path, np.ndarray, np.ndarray]], n: int, rest_type: str
) -> CodedRows:
    lengths = np.empty((n, 3), np.uint32)
    for folder, rows, at in hits:
        lengths[at] = load_array(folder / "lengths.npy")[rows, :3]
    starts = compute_row_starts(lengths[None])[0]
    codes, rest = np.empty(starts[-1, 0], np.uint8), np.empty(starts[-1, 1], rest_type)
    for folder, rows, at in hits:
        begins = load_array(folder / "starts.npy")
        for k, (name, out) in enumerate((("codes", codes), ("rest", rest))):
            source = load_array(folder / f"{name}.npy")
            copy_rows(begins[:, k], source, rows, at, starts[:, k], out)
    return CodedRows(codes, rest, lengths, COUNT_BITS)


def _find(
    keys: np.ndarray, wanted: np.ndarray, ends: tuple[np.ndarray, np.ndarray]
) -> tuple[np.ndarray, np.ndarray]:
    """Rows of a spool that are wanted, and their places in `wanted`. Both inputs sorted.

    The upper bits of a key are its planned stratum: one narrow run of the spool is searched for each. ends: first and
    last key of each that is wanted.
    """
    starts, stops = (
        np.searchsorted(keys, ends[0]).tolist(),
        np.searchsorted(keys, ends[1], side="right").tolist(),
    )
    candidates = np.concatenate(
        [np.arange(i, j) for i, j in zip(starts, stops, strict=True)] or [np.empty(0, np.int64)]
    )
    at = np.searchsorted(wanted, keys[candidates])
    hit = wanted[np.minimum(at, len(wanted) - 1)] == keys[candidates]
    return candidates[hit], at[hit]


GROUP_SHIFT = 40  # a key is (planned stratum << 40) + the cell's place in the shuffle of all cells


@njit(nogil=True, cache=True)
def count_binary_gaps(rest, lengths, starts):  # type: ignore[no-untyped-def]
    """How many gaps of each row are far if all of a code's bits are the gap's. (n,) uint32"""
    out = np.zeros(len(lengths), np.uint32)
    for row in range(len(lengths)):
        for k in range(starts[row, 1], starts[row, 1] + lengths[row, 1]):
            out[row] += rest[k] >= 255
    return out
