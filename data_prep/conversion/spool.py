"""Spools: validated rows between the two passes of a conversion, sorted by their keys.

A task of the first pass leaves one file of whole rows. A key says where the shuffle puts a row,
so that the rows of a shard are a few runs in every spool: the second pass reads these and no
more. A spool exists only once it is complete. Its rows have bits for counts only if one of them
has a count above 1.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from clue_dist.files import replace_file
from clue_dist.store.kernel_cache import compile_kernel
from clue_dist.store.kernels import compute_row_starts, copy_rows
from clue_dist.store.manifest_parts import PackedModality
from clue_dist.store.rows import COUNT_BITS, CodedBlocks, CodedRows, recode_rows_with_counts
from data_prep.jobs.array_files import append_array, load_appended

PLACE_BITS = (
    40  # a key is (planned modalities << 40) + the cell's place in the shuffle of all cells
)
# Gaps from these on do not fit into the codes of rows with counts, and of binary rows.
FAR_GAP, FAR_BINARY_GAP = (256 >> COUNT_BITS) - 1, 255

# Which rows of a spool are wanted: the spool, their numbers in it, and their places in the answer.
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


@dataclass(frozen=True)
class Spool:
    """Rows of a modality, sorted by key, mapped from their file."""

    keys: np.ndarray  # (n,) int64, unique and ascending
    # (n, 4) uint32, of each row: its non-zeros; its far gaps and high counts as a row with counts;
    # its far gaps as a binary row
    lengths: np.ndarray
    largest_count: int  # 0 says that they are measured floats, which keep their type
    largest_rest: int  # the largest number in the rest of the coded rows
    # Coded rows: codes, rest, and where each row starts in both, (n + 1, 2). Dense rows: their
    # values, (n, features).
    arrays: list[np.ndarray]

    @property
    def bits(self) -> int:
        """Bits of a code that hold the count."""
        return COUNT_BITS if self.largest_count > 1 else 0

    def take_rows_with_counts(self, rows: np.ndarray) -> CodedRows:
        """Take some of the binary rows, (n,), coded as rows with counts are."""
        codes, rest, starts = self.arrays
        lengths = choose_lengths(self.lengths, 0)
        blocks = CodedBlocks(codes[None], rest[None], lengths[None], starts[None])
        return recode_rows_with_counts(blocks.take_rows(rows, 0))


def choose_lengths(lengths: np.ndarray, bits: int) -> np.ndarray:
    """Choose the lengths of rows that are coded with these bits, (n, 3), from those of a spool."""
    return np.take(lengths, [0, 1, 2] if bits else [0, 3, 2], axis=1)  # binary rows: 2 is 0


def write_spool(
    path: Path, keys: np.ndarray, rows: CodedRows | np.ndarray, largest_count: int
) -> None:
    """Write a `Spool`.

    Args:
        path: the spool.
        keys: (n,) int64, unique and ascending.
        rows: coded, without bits for counts where none is above 1; or dense.
        largest_count: among the rows.
    """
    if isinstance(rows, np.ndarray):
        lengths = np.zeros((len(rows), 4), np.uint32)  # dense rows have no gaps
        lengths[:, 0] = np.count_nonzero(rows, axis=1)
        arrays, largest_rest = [rows], 0
    else:
        starts = rows.compute_starts()
        lengths = measure_rows(rows.codes, rows.rest, rows.lengths, starts, rows.bits)
        arrays, largest_rest = [rows.codes, rows.rest, starts], int(rows.rest.max(initial=0))
    largest = np.array([largest_count, largest_rest], np.int64)
    path.parent.mkdir(parents=True, exist_ok=True)
    # A worker that was given up for dead may still write the same spool.
    with replace_file(path, unique=True) as temporary, temporary.open("wb") as file:
        for values in (keys, lengths, largest, *arrays):
            append_array(file, values)


def load_spool(path: Path) -> Spool:
    """Map what `write_spool` has written."""
    keys, lengths, largest, *arrays = load_appended(path)
    return Spool(keys, lengths, int(largest[0]), int(largest[1]), arrays)


def read_spools(
    paths: list[Path], wanted: np.ndarray, n_features: int, packed: PackedModality
) -> CodedRows | np.ndarray:
    """Read rows from the spools of a modality.

    Args:
        paths: the spools. Each key must be in exactly one of them.
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
    lengths = np.empty((len(wanted), 4), np.uint32)
    hits: list[_Hit] = []
    for path in paths:
        spool = load_spool(path)
        rows, found = _find_keys(spool.keys, ascending, bounds)
        if len(rows):
            hits.append((path, rows, order[found]))
            lengths[order[found]] = spool.lengths[rows]
    n_found = sum(len(rows) for _, rows, _ in hits)
    if n_found != len(wanted):
        raise AssertionError(f"{len(wanted)} rows wanted, spools hold {n_found}")
    if packed.values is not None:
        return _read_dense_rows(hits, len(wanted), n_features, packed.values)
    lengths = choose_lengths(lengths, packed.bits)
    return _read_coded_rows(hits, lengths, packed.bits, str(packed.rest_type))


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
    for path, rows, places in hits:
        values[places] = load_spool(path).arrays[0][rows]
    return values


def _read_coded_rows(hits: list[_Hit], lengths: np.ndarray, bits: int, rest_type: str) -> CodedRows:
    """Read coded rows, whose lengths say where each of them goes."""
    starts = compute_row_starts(lengths[None])[0]
    codes, rest = np.empty(starts[-1, 0], np.uint8), np.empty(starts[-1, 1], rest_type)
    for path, rows, places in hits:
        spool = load_spool(path)
        spool_codes, spool_rest, spool_starts = spool.arrays
        if spool.bits != bits:  # another spool has counts
            taken = spool.take_rows_with_counts(rows)
            spool_codes, spool_rest, spool_starts = taken.codes, taken.rest, taken.compute_starts()
            rows = np.arange(taken.n_rows)
        copy_rows(spool_starts[:, 0], spool_codes, rows, places, starts[:, 0], codes)
        copy_rows(spool_starts[:, 1], spool_rest, rows, places, starts[:, 1], rest)
    return CodedRows(codes, rest, lengths, bits)


@compile_kernel
def measure_rows(codes, rest, lengths, starts, bits):  # type: ignore[no-untyped-def]
    """Find what `Spool.lengths` are, of rows that are coded with these bits, (n, 4) uint32."""
    measured = np.zeros((len(lengths), 4), np.uint32)
    for row in range(len(lengths)):
        measured[row, 0], measured[row, 2] = lengths[row, 0], lengths[row, 2]
        n_other = 0  # far gaps of the code that the row does not have
        if bits:
            for k in range(starts[row, 1], starts[row, 1] + lengths[row, 1]):
                n_other += rest[k] >= FAR_BINARY_GAP
            measured[row, 1], measured[row, 3] = lengths[row, 1], n_other
        else:
            row_codes = codes[starts[row, 0] : starts[row + 1, 0]]
            for k in range(len(row_codes)):
                n_other += row_codes[k] >= FAR_GAP
            measured[row, 1], measured[row, 3] = n_other, lengths[row, 1]
    return measured
