"""Spools: validated rows between the two passes of a conversion, sorted by their keys.

A task of the first pass leaves one folder of whole rows. A key says where the shuffle puts a row,
so that the rows of a shard are a few runs in every spool: the second pass reads these and no
more. A spool exists only once it is complete.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from clue_dist.store.kernel_cache import compile_kernel
from clue_dist.store.kernels import compute_row_starts, copy_rows
from clue_dist.store.manifest_parts import PackedModality
from clue_dist.store.rows import COUNT_BITS, CodedRows, recode_rows_as_binary
from data_prep.jobs.array_files import load_array, save_array
from data_prep.jobs.whole_folders import make_whole_folder

PLACE_BITS = (
    40  # a key is (planned modalities << 40) + the cell's place in the shuffle of all cells
)
FAR_BINARY_GAP = 255  # the codes of binary rows have room for gaps below this one

# What a spool has of the rows that are wanted: its folder, their numbers in it, and their places
# in the answer.
_Hit = tuple[Path, np.ndarray, np.ndarray]


def make_spool_keys(planned: np.ndarray, first_place: int) -> np.ndarray:
    """Make the keys of cells that follow each other in the shuffle.

    Args:
        planned: of each cell, (n,) int64, bit m is set where the inputs list modality m.
        first_place: the place of the first cell.

    Returns:
        (n,) int64. Cells of the same planned modalities have neighbouring keys.
    """
    keys: np.ndarray = (planned << PLACE_BITS) + np.arange(first_place, first_place + len(planned))
    return keys


def extract_places(keys: np.ndarray) -> np.ndarray:
    """Extract the places in the shuffle of all cells from spool keys, (n,) int64."""
    places: np.ndarray = keys & ((1 << PLACE_BITS) - 1)
    return places


def write_spool(
    folder: Path, keys: np.ndarray, rows: CodedRows | np.ndarray, largest_count: int
) -> None:
    """Write rows that are sorted by key.

    Args:
        folder: the spool.
        keys: (n,) int64, unique and ascending.
        rows: coded, or dense of shape (n, features).
        largest_count: among the rows. 0 says that they are measured floats, which keep their type.
    """
    with make_whole_folder(folder) as spool:
        save_array(spool / "keys.npy", keys)
        if isinstance(rows, np.ndarray):
            lengths = np.zeros((len(rows), 4), np.uint32)  # dense rows have no gaps
            lengths[:, 0] = np.count_nonzero(rows, axis=1)
            save_array(spool / "values.npy", rows)
            largest_rest = 0
        else:
            starts = rows.compute_starts()
            binary_gaps = count_binary_gaps(rows.rest, rows.lengths, starts)
            lengths = np.column_stack([rows.lengths, binary_gaps])
            save_array(spool / "starts.npy", starts)
            save_array(spool / "codes.npy", rows.codes)
            save_array(spool / "rest.npy", rows.rest)
            largest_rest = int(rows.rest.max(initial=0))
        save_array(spool / "lengths.npy", lengths)
        save_array(spool / "largest.npy", np.array([largest_count, largest_rest], np.int64))


@dataclass(frozen=True)
class SpoolSurvey:
    """What must be known of a spool before strata can be settled."""

    keys: np.ndarray  # (n,) int64, ascending
    # (n, 4) uint32, of each row: its non-zeros, far gaps and high counts, and the far gaps that it
    # would have as a binary row
    lengths: np.ndarray
    largest_count: int
    largest_rest: int  # the largest number in `rest` of the coded rows


def survey_spool(folder: Path) -> SpoolSurvey:
    """Read what a spool holds, but for its rows."""
    return SpoolSurvey(
        load_array(folder / "keys.npy"),
        load_array(folder / "lengths.npy"),
        *load_array(folder / "largest.npy").tolist(),
    )


def read_spool(
    folders: list[Path], wanted: np.ndarray, n_features: int, packed: PackedModality
) -> CodedRows | np.ndarray:
    """Read rows from the spools of a modality.

    Args:
        folders: the spools. Each key must be in exactly one of them.
        wanted: keys, (n,) int64, in any order.
        n_features: columns of a dense modality.
        packed: how the store packs these rows.

    Returns:
        The rows in the order of `wanted`, as `packed` says: coded, or (n, features) of its type.
    """
    order = np.argsort(wanted)
    ascending = wanted[order]
    group_starts = np.flatnonzero(np.diff(ascending >> PLACE_BITS, prepend=-1))
    group_ends = np.append(group_starts[1:], len(wanted)) - 1
    bounds = ascending[group_starts], ascending[group_ends]
    hits: list[_Hit] = []
    for folder in folders:
        rows, places = _find_keys(load_array(folder / "keys.npy"), ascending, bounds)
        if len(rows):
            hits.append((folder, rows, order[places]))
    n_found = sum(len(rows) for _, rows, _ in hits)
    if n_found != len(wanted):
        raise AssertionError(f"{len(wanted)} rows wanted, spools hold {n_found}")
    if packed.values is not None:
        return _read_dense_rows(hits, len(wanted), n_features, packed.values)
    coded = _read_coded_rows(hits, len(wanted), str(packed.rest_type))
    return coded if packed.bits == coded.bits else recode_rows_as_binary(coded)


def _find_keys(
    keys: np.ndarray, wanted: np.ndarray, bounds: tuple[np.ndarray, np.ndarray]
) -> tuple[np.ndarray, np.ndarray]:
    """Find the rows of a spool whose keys are wanted, and their places in `wanted`.

    Both lists of keys ascend. The upper bits of a key are the cell's planned modalities, and the
    wanted keys with the same upper bits lie close together: one run of the spool is searched for
    each group. bounds: the first and the last wanted key of each group.
    """
    starts = np.searchsorted(keys, bounds[0]).tolist()
    stops = np.searchsorted(keys, bounds[1], side="right").tolist()
    runs = [np.arange(start, stop) for start, stop in zip(starts, stops, strict=True)]
    candidates = np.concatenate(runs or [np.empty(0, np.int64)])
    places = np.searchsorted(wanted, keys[candidates])
    is_wanted = wanted[np.minimum(places, len(wanted) - 1)] == keys[candidates]
    return candidates[is_wanted], places[is_wanted]


def _read_dense_rows(hits: list[_Hit], n_rows: int, n_features: int, dtype: str) -> np.ndarray:
    """Read rows of a dense modality, (n_rows, n_features)."""
    values = np.empty((n_rows, n_features), dtype)
    for folder, rows, places in hits:
        values[places] = load_array(folder / "values.npy")[rows]
    return values


def _read_coded_rows(hits: list[_Hit], n_rows: int, rest_type: str) -> CodedRows:
    """Read coded rows: their lengths first, which say where each row goes."""
    lengths = np.empty((n_rows, 3), np.uint32)
    for folder, rows, places in hits:
        lengths[places] = load_array(folder / "lengths.npy")[rows, :3]
    starts = compute_row_starts(lengths[None])[0]
    codes, rest = np.empty(starts[-1, 0], np.uint8), np.empty(starts[-1, 1], rest_type)
    for folder, rows, places in hits:
        spool_starts = load_array(folder / "starts.npy")
        for k, (name, target) in enumerate((("codes", codes), ("rest", rest))):
            values = load_array(folder / f"{name}.npy")
            copy_rows(spool_starts[:, k], values, rows, places, starts[:, k], target)
    return CodedRows(codes, rest, lengths, COUNT_BITS)


@compile_kernel
def count_binary_gaps(rest, lengths, starts):  # type: ignore[no-untyped-def]
    """Count the gaps of each row that would be far in a binary row, (n,) uint32."""
    far_gaps = np.zeros(len(lengths), np.uint32)
    for row in range(len(lengths)):
        for k in range(starts[row, 1], starts[row, 1] + lengths[row, 1]):
            far_gaps[row] += rest[k] >= FAR_BINARY_GAP
    return far_gaps
