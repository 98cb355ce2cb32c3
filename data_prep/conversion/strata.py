"""From spooled rows to strata: which cells end up where, in which order, packed how.

What a cell takes in each modality is written to mapped files, at its place in the shuffle of all
cells. One walk along that order then finds the strata. Memory does not grow with the number of
cells.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from clue_dist.errors import DataError
from clue_dist.kinds import KINDS
from clue_dist.store import layout
from clue_dist.store.batch_vocabulary import UNKNOWN
from clue_dist.store.layout import Codec
from clue_dist.store.manifest import Manifest
from clue_dist.store.manifest_parts import Modality, PackedModality, Segment
from clue_dist.store.rows import COUNT_BITS
from data_prep.conversion.cells import CellRange, CellTable
from data_prep.conversion.spool import extract_places, load_spool
from data_prep.jobs.array_files import flush_arrays, map_array
from data_prep.options import COVARIATE

STEP_PLACES = 2**20  # places that are looked at together


@dataclass(frozen=True)
class PlacedStratum:
    """The cells of one stratum, all in their places."""

    n_cells: int
    packed: dict[str, PackedModality]
    barcode_width: int  # bytes of the longest barcode
    tallies: dict[str, np.ndarray]  # of each field, how many cells have each name, (names,) int64


@dataclass(frozen=True)
class FinalStrata:
    """The strata that all cells end up in."""

    masks: np.ndarray  # (n,) int64 in shuffled order, bit m: the cell keeps modality m; 0: dropped
    strata: dict[int, PlacedStratum]  # by mask

    @property
    def n_dropped(self) -> int:
        """The number of cells that have no counts at all."""
        return len(self.masks) - sum(stratum.n_cells for stratum in self.strata.values())

    def count_lost_rows(self, keys: np.ndarray, modality: int) -> int:
        """Count the rows with these spool keys whose cell does not keep a modality, by number."""
        n_lost = 0
        for start in range(0, len(keys), STEP_PLACES):
            masks = self.masks[extract_places(keys[start : start + STEP_PLACES])]
            n_lost += int((masks >> modality & 1 == 0).sum())
        return n_lost


@dataclass(frozen=True)
class _Usage:
    """What the cells take in one modality."""

    lengths: np.ndarray  # (cells, 4) uint32, as of `Spool`, mapped, in shuffled order
    largest_count: int
    largest_rest: int

    @property
    def is_binary(self) -> bool:
        """Whether no count is above 1, so that codes need no room for counts."""
        return self.largest_count <= 1


def settle_strata(
    cells: CellTable,
    modalities: Mapping[str, Modality],
    file_names: Mapping[str, str],
    spools: Mapping[str, Sequence[Path]],
    block_cells: int,
    folder: Path,
) -> FinalStrata:
    """Decide the final stratum and position of every cell.

    A cell loses a modality in which it has no counts. A stratum keeps the order of the shuffle of
    all cells.

    Args:
        cells: cells of the inputs.
        modalities: modalities of the store.
        file_names: the files of each modality, for messages.
        spools: the spools of each modality.
        block_cells: cells of a block.
        folder: gets a folder for each stratum, with what the second pass needs of its cells.

    Raises:
        DataError: no cell has any counts in a modality.
    """
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    masks, usages = _survey_spools(cells, modalities, file_names, spools, folder)
    walks = {}
    for mask, n_cells in _count_cells(masks).items():
        is_binary = {
            name: usages[name].is_binary for m, name in enumerate(modalities) if mask >> m & 1
        }
        arrays = _map_cell_arrays(cells, n_cells, folder / layout.name_segment(list(is_binary)))
        tallies = {field: np.zeros(len(names), np.int64) for field, names in cells.names.items()}
        walks[mask] = _StratumWalk(arrays, is_binary, tallies, block_cells)
    for part in cells.iterate_ranges():
        part_masks = masks[part.first_place : part.first_place + len(part)]
        for mask in np.unique(part_masks[part_masks > 0]).tolist():
            chosen = np.flatnonzero(part_masks == mask)
            places = part.first_place + chosen
            lengths = {name: usages[name].lengths[places] for name in walks[mask].is_binary}
            walks[mask].add_cells(part, chosen, lengths)
    flush_arrays(array for walk in walks.values() for array in walk.arrays.values())
    strata = {mask: _pack_stratum(walk, modalities, usages) for mask, walk in walks.items()}
    return FinalStrata(masks, strata)


def _survey_spools(
    cells: CellTable,
    modalities: Mapping[str, Modality],
    file_names: Mapping[str, str],
    spools: Mapping[str, Sequence[Path]],
    folder: Path,
) -> tuple[np.ndarray, dict[str, _Usage]]:
    """Find every cell's mask, (cells,) int64, and what it takes in each modality."""
    masks = map_array(folder / "mask.npy", np.int64, (len(cells),))
    usages: dict[str, _Usage] = {}
    for m, (name, modality) in enumerate(modalities.items()):
        lengths = map_array(folder / f"lengths-{name}.npy", np.uint32, (len(cells), 4))
        largest_count, largest_rest, n_kept = 0, 0, 0
        for path in spools[name]:
            spool = load_spool(path)
            places = extract_places(spool.keys)
            lengths[places] = spool.lengths
            # A cell whose measured values are all zero has been measured all the same.
            kept = places[(spool.lengths[:, 0] > 0) | KINDS[modality.kind].real_values]
            masks[kept] |= 1 << m
            n_kept += len(kept)
            largest_count = max(largest_count, spool.largest_count)
            largest_rest = max(largest_rest, spool.largest_rest)
        if not n_kept:
            raise DataError(
                f"no cell has any counts in modality {name!r}",
                where=file_names[name],
                fix="check that the files hold raw counts, or leave the modality out",
            )
        usages[name] = _Usage(lengths, largest_count, largest_rest)
    return masks, usages


def _count_cells(masks: np.ndarray) -> dict[int, int]:
    """Count the cells of each stratum, by mask, ascending; dropped cells have none."""
    counts: dict[int, int] = {}
    for start in range(0, len(masks), STEP_PLACES):
        found, times = np.unique(masks[start : start + STEP_PLACES], return_counts=True)
        for mask, n_cells in zip(found.tolist(), times.tolist(), strict=True):
            counts[mask] = counts.get(mask, 0) + n_cells
    return {mask: counts[mask] for mask in sorted(counts) if mask}


def _map_cell_arrays(cells: CellTable, n_cells: int, folder: Path) -> dict[str, np.ndarray]:
    """Map what the second pass needs of the cells of one stratum."""
    width = max(part.barcodes.dtype.itemsize for part in cells.iterate_ranges())
    types: dict[str, Any] = {"keys": np.int64, "barcodes": f"S{width}"}
    types |= dict.fromkeys(cells.names, np.int32)
    return {
        name: map_array(folder / f"{name}.npy", dtype, (n_cells,)) for name, dtype in types.items()
    }


class _StratumWalk:
    """One stratum while its cells come along in shuffled order."""

    def __init__(
        self,
        arrays: dict[str, np.ndarray],
        is_binary: dict[str, bool],
        tallies: dict[str, np.ndarray],
        block_cells: int,
    ) -> None:
        self.arrays = arrays  # mapped for the second pass, (cells,)
        self.is_binary = is_binary  # by modality
        self.tallies = tallies
        self.n_cells, self.barcode_width = 0, 1
        self.codes, self.rests = (
            {name: LargestBlock(block_cells) for name in is_binary} for _ in range(2)
        )

    def add_cells(
        self, part: CellRange, chosen: np.ndarray, lengths: dict[str, np.ndarray]
    ) -> None:
        """Add some cells of a range, and what they take in each modality, (n, 4)."""
        span = slice(self.n_cells, self.n_cells + len(chosen))
        self.n_cells += len(chosen)
        barcodes = part.barcodes[chosen]
        self.arrays["keys"][span] = part.spool_keys[chosen]
        self.arrays["barcodes"][span] = barcodes
        self.barcode_width = max(self.barcode_width, int(np.char.str_len(barcodes).max()))
        for field, tally in self.tallies.items():
            codes = part.codes[field][chosen]
            self.arrays[field][span] = codes
            tally += np.bincount(codes[codes >= 0], minlength=len(tally))
        for name, cell_lengths in lengths.items():
            nonzeros, far_gaps, high_counts, binary_gaps = cell_lengths.astype(np.int64).T
            self.codes[name].add_cells(nonzeros)
            # A high count takes two numbers of `rest`: the non-zeros before it, and itself.
            rest = binary_gaps if self.is_binary[name] else far_gaps + 2 * high_counts
            self.rests[name].add_cells(rest)


class LargestBlock:
    """The most that any block of cells takes of something, 1 at least."""

    def __init__(self, block_cells: int) -> None:
        self.block_cells = block_cells
        self.most, self.unfinished = 1, np.zeros(0, np.int64)

    def add_cells(self, sizes: np.ndarray) -> None:
        """Add what the next cells take, (n,) int64."""
        sizes = np.concatenate([self.unfinished, sizes])
        n_whole = len(sizes) // self.block_cells * self.block_cells
        sums = sizes[:n_whole].reshape(-1, self.block_cells).sum(1)
        self.most, self.unfinished = max(self.most, int(sums.max(initial=1))), sizes[n_whole:]

    def find_largest(self) -> int:
        """Find the largest block, with what the last one has so far."""
        return max(self.most, int(self.unfinished.sum()))


def _pack_stratum(
    walk: _StratumWalk, modalities: Mapping[str, Modality], usages: Mapping[str, _Usage]
) -> PlacedStratum:
    """Choose how the store packs a stratum whose cells have all come along."""
    packed = {}
    for name, is_binary in walk.is_binary.items():
        modality, usage = modalities[name], usages[name]
        if modality.storage == "dense":
            values: Any = layout.choose_unsigned(usage.largest_count)
            if KINDS[modality.kind].real_values:
                values = "float32"
            packed[name] = PackedModality(values=values)
        else:
            packed[name] = PackedModality(
                capacity=walk.codes[name].find_largest(),
                bits=0 if is_binary else COUNT_BITS,
                rest=walk.rests[name].find_largest(),
                rest_type=layout.choose_unsigned(usage.largest_rest),  # type: ignore[arg-type]
            )
    return PlacedStratum(walk.n_cells, packed, walk.barcode_width, walk.tallies)


def build_manifest(
    final: FinalStrata,
    cells: CellTable,
    modalities: dict[str, Modality],
    block_cells: int,
    codec: Codec,
    provenance: dict[str, Any],
) -> Manifest:
    """Build the manifest of the store, which lacks its shards yet."""
    strata = {}
    for placed in final.strata.values():
        packed = placed.packed
        cell_bytes = max(
            measure_cell_bytes(packed[name], modalities[name].n_features, block_cells)
            for name in packed
        )
        strata[layout.name_segment(list(packed))] = Segment(
            modalities=list(packed),
            n_cells=placed.n_cells,
            shard_blocks=layout.choose_shard_blocks(cell_bytes, placed.n_cells, block_cells),
            barcode_width=placed.barcode_width,
            packed=packed,
            batch_counts=_name_tally(cells, placed, "batch"),
            label_counts=_name_tally(cells, placed, "label"),
        )
    return Manifest(
        block_cells=block_cells,
        codec=codec,
        modalities=modalities,
        batches=cells.names["batch"],
        batch_covariates=cells.covariates,
        labels=cells.names["label"],
        strata=strata,
        shards={},
        provenance=provenance,
    )


def measure_cell_bytes(packed: PackedModality, n_features: int, block_cells: int) -> float:
    """Return the bytes that one cell takes before compression."""
    if packed.values is not None:
        return n_features * np.dtype(packed.values).itemsize
    return (packed.capacity + packed.rest * np.dtype(packed.rest_type).itemsize) / block_cells


def count_unknown(final: FinalStrata, cells: CellTable, field: str) -> int:
    """Count the cells whose batch, or label, or level of a covariate is unknown."""
    tallied, names = field, cells.names.get(field, [])
    if field.startswith(COVARIATE):
        tallied, names = "batch", cells.covariates[field.removeprefix(COVARIATE)]
    is_known = np.array([name != UNKNOWN for name in names], bool)
    return sum(
        placed.n_cells - int(placed.tallies[tallied][is_known].sum())
        for placed in final.strata.values()
    )


def _name_tally(cells: CellTable, placed: PlacedStratum, field: str) -> dict[str, int]:
    """Count the cells of each batch, or label, that a stratum has."""
    tally = placed.tallies[field].tolist()
    return {name: n for name, n in zip(cells.names[field], tally, strict=True) if n}
