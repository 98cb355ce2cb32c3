"""From spooled rows to strata: which cells end up where, in which order, packed how.

What a cell takes is written to mapped files, at its place in the shuffle of all; one walk along that order then finds
the strata. Memory does not grow with the number of cells.
"""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from clue_dist.errors import DataError
from clue_dist.kinds import KINDS
from clue_dist.store import layout
from clue_dist.store.layout import Codec
from clue_dist.store.manifest import Manifest, Modality, PackedModality, Segment
from clue_dist.store.rows import COUNT_BITS
from data_prep.conversion import spool
from data_prep.conversion.cells import CellRange, CellTable, extract_places
from data_prep.jobs.whole_files import flush_arrays, map_array

PLACES = 2**20  # looked at together


@dataclass(frozen=True)
class PlacedStratum:
    """The cells of one stratum. barcode_width: bytes of the longest; tallies: per field, cells of each name."""

    n_cells: int
    packed: dict[str, PackedModality]
    barcode_width: int
    tallies: dict[str, np.ndarray]


@dataclass(frozen=True)
class FinalStrata:
    """mask: (n,) per cell, in shuffled order, bit m set where it keeps modality m, 0 = dropped; strata: by mask."""

    mask: np.ndarray
    strata: dict[int, PlacedStratum]

    @property
    def dropped(self) -> int:
        return len(self.mask) - sum(s.n_cells for s in self.strata.values())

    def lost(self, keys: np.ndarray, bit: int) -> int:
        """Of rows with these spool keys, those whose cell does not keep their modality."""
        pieces = (keys[lo : lo + PLACES] for lo in range(0, len(keys), PLACES))
        return sum(int((self.mask[extract_places(piece)] & bit == 0).sum()) for piece in pieces)


@dataclass(frozen=True)
class _Taken:
    """What the cells of a modality take, mapped, in shuffled order. lengths: (n, 4) as of
    `spool.survey_spool`; the largest
    count, and the largest number in rest."""

    lengths: np.ndarray
    largest: int
    rest: int

    @property
    def binary(self) -> bool:
        return self.largest <= 1


def settle_strata(
    cells: CellTable,
    modalities: dict[str, Modality],
    files: dict[str, str],
    spools: dict[str, list[Path]],
    block_cells: int,
    folder: Path,
) -> FinalStrata:
    """Decide every cell's final stratum and position; writes what the second pass needs of each stratum to `folder`.

    A cell loses a modality in which it has no counts. Strata keep the order of the shuffle of all cells. files: those
    of each modality, for messages.

    Raises:
        DataError: no cell has any counts in a modality.
    """
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    mask, taken = _survey(cells, modalities, files, spools, folder)
    walks = {}
    for bits, n in _sizes(mask).items():
        binary = {name: taken[name].binary for m, name in enumerate(modalities) if bits >> m & 1}
        arrays = _arrays(cells, n, folder / layout.name_segment(list(binary)))
        walks[bits] = _Walk(
            arrays,
            binary,
            {field: np.zeros(len(of), np.int64) for field, of in cells.names.items()},
        )
    for part in cells.parts():
        here = mask[part.first : part.first + len(part.planned)]
        for bits in np.unique(here[here > 0]).tolist():
            of = np.flatnonzero(here == bits)
            lengths = {name: taken[name].lengths[part.first + of] for name in walks[bits].binary}
            walks[bits].add(part, of, lengths, block_cells)
    flush_arrays(array for walk in walks.values() for array in walk.arrays.values())
    return FinalStrata(
        mask, {bits: _placed(walk, modalities, taken) for bits, walk in walks.items()}
    )


def _arrays(cells: CellTable, n: int, folder: Path) -> dict[str, np.ndarray]:
    """Of n cells of a stratum, mapped."""
    width = max(part.barcodes.dtype.itemsize for part in cells.parts())
    types: dict[str, Any] = {"keys": np.int64, "barcodes": f"S{width}"} | dict.fromkeys(
        cells.names, np.int32
    )
    return {name: map_array(folder / f"{name}.npy", dtype, (n,)) for name, dtype in types.items()}


def _placed(
    walk: _Walk, modalities: dict[str, Modality], taken: dict[str, _Taken]
) -> PlacedStratum:
    packed = {}
    for name, binary in walk.binary.items():
        modality, took = modalities[name], taken[name]
        if modality.storage == "dense":
            values: Any = (
                "float32"
                if KINDS[modality.kind].real_values
                else layout.choose_unsigned(took.largest)
            )
            packed[name] = PackedModality(values=values)
        else:
            packed[name] = PackedModality(
                capacity=walk.codes[name].largest(),
                bits=0 if binary else COUNT_BITS,
                rest=walk.rests[name].largest(),
                rest_type=layout.choose_unsigned(took.rest),  # type: ignore[arg-type]
            )
    return PlacedStratum(walk.done, packed, walk.barcode_width, walk.tallies)


def _survey(
    cells: CellTable,
    modalities: dict[str, Modality],
    files: dict[str, str],
    spools: dict[str, list[Path]],
    folder: Path,
) -> tuple[np.ndarray, dict[str, _Taken]]:
    """Every cell's mask, (n,) int64, and what it takes in each modality."""
    mask = map_array(folder / "mask.npy", np.int64, (len(cells),))
    taken: dict[str, _Taken] = {}
    for m, (name, modality) in enumerate(modalities.items()):
        lengths = map_array(folder / f"lengths-{name}.npy", np.uint32, (len(cells), 4))
        largest, rest, any_left = 0, 0, False
        for path in spools[name]:
            seen = spool.survey_spool(path)
            at = extract_places(seen.keys)
            lengths[at] = seen.lengths
            kept = at[(seen.lengths[:, 0] > 0) | KINDS[modality.kind].real_values]
            mask[kept] |= 1 << m
            largest, rest, any_left = (
                max(largest, seen.largest),
                max(rest, seen.rest),
                any_left or len(kept) > 0,
            )
        if not any_left:
            fix = "check that the files hold raw counts, or leave the modality out"
            raise DataError(
                f"no cell has any counts in modality {name!r}", where=files[name], fix=fix
            )
        taken[name] = _Taken(lengths, largest, rest)
    return mask, taken


def _sizes(mask: np.ndarray) -> dict[int, int]:
    """Cells of each stratum, by mask, ascending."""
    sizes: dict[int, int] = {}
    for lo in range(0, len(mask), PLACES):
        found, times = np.unique(mask[lo : lo + PLACES], return_counts=True)
        for bits, n in zip(found.tolist(), times.tolist(), strict=True):
            sizes[bits] = sizes.get(bits, 0) + n
    return {bits: sizes[bits] for bits in sorted(sizes) if bits}


class _Walk:
    """A stratum as its cells come along. arrays: what tasks of the second pass map; binary: by modality."""

    def __init__(
        self, arrays: dict[str, np.ndarray], binary: dict[str, bool], tallies: dict[str, np.ndarray]
    ) -> None:
        self.arrays, self.binary, self.tallies = arrays, binary, tallies
        self.done, self.barcode_width = 0, 1
        self.codes, self.rests = ({name: _Largest() for name in binary} for _ in range(2))

    def add(
        self, part: CellRange, of: np.ndarray, lengths: dict[str, np.ndarray], block_cells: int
    ) -> None:
        """Cells `of` a part, and what they take in each modality, (n, 4)."""
        span = slice(self.done, self.done + len(of))
        self.done += len(of)
        self.arrays["keys"][span], self.arrays["barcodes"][span] = part.keys[of], part.barcodes[of]
        self.barcode_width = max(self.barcode_width, int(np.char.str_len(part.barcodes[of]).max()))
        for field, tally in self.tallies.items():
            codes = part.codes[field][of]
            self.arrays[field][span] = codes
            tally += np.bincount(codes[codes >= 0], minlength=len(tally))
        for name, own in lengths.items():
            own = own.astype(np.int64)
            self.codes[name].add(own[:, 0], block_cells)
            self.rests[name].add(
                own[:, 3] if self.binary[name] else own[:, 1] + 2 * own[:, 2], block_cells
            )


class _Largest:
    """The most of something in a block of cells, at least 1."""

    def __init__(self) -> None:
        self.most, self.left = 1, np.zeros(0, np.int64)

    def add(self, values: np.ndarray, block_cells: int) -> None:
        """What the next cells have, (n,) int64."""
        values = np.concatenate([self.left, values])
        whole = len(values) // block_cells * block_cells
        sums = values[:whole].reshape(-1, block_cells).sum(1)
        self.most, self.left = max(self.most, int(sums.max(initial=1))), values[whole:]

    def largest(self) -> int:
        return max(self.most, int(self.left.sum()))


def build_manifest(
    final: FinalStrata,
    cells: CellTable,
    modalities: dict[str, Modality],
    block_cells: int,
    codec: Codec,
    provenance: dict[str, Any],
) -> Manifest:
    """The manifest but for its shards."""
    strata = {}
    for placed in final.strata.values():
        packed = placed.packed
        raw = max(
            _cell_bytes(packed[name], modalities[name].n_features, block_cells) for name in packed
        )
        strata[layout.name_segment(list(packed))] = Segment(
            modalities=list(packed),
            n_cells=placed.n_cells,
            shard_blocks=layout.choose_shard_blocks(raw, placed.n_cells, block_cells),
            barcode_width=placed.barcode_width,
            packed=packed,
            batch_counts=_tally(cells, placed, "batch"),
            label_counts=_tally(cells, placed, "label"),
        )
    return Manifest(
        block_cells=block_cells,
        codec=codec,
        modalities=modalities,
        batches=cells.names["batch"],
        labels=cells.names["label"],
        strata=strata,
        shards={},
        provenance=provenance,
    )


def _cell_bytes(packed: PackedModality, n_features: int, block_cells: int) -> float:
    """Raw bytes of one cell in the store."""
    if packed.values is not None:
        return n_features * np.dtype(packed.values).itemsize
    return (packed.capacity + packed.rest * np.dtype(packed.rest_type).itemsize) / block_cells


def count_unknown(final: FinalStrata, cells: CellTable, field: str) -> int:
    """Cells whose batch, or label, nobody told."""
    return sum(
        placed.n_cells - sum(_tally(cells, placed, field).values())
        for placed in final.strata.values()
    )


def _tally(cells: CellTable, placed: PlacedStratum, field: str) -> dict[str, int]:
    return {
        name: int(n) for name, n in zip(cells.names[field], placed.tallies[field], strict=True) if n
    }
