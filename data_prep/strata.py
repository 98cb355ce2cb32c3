"""From spooled rows to strata: which cells end up where, in which order, packed how."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from clue_dist.errors import DataError
from clue_dist.store import layout
from clue_dist.store.manifest import Manifest, Modality, Packed, Stratum, largest_block
from clue_dist.store.rows import COUNT_BITS
from data_prep import spool
from data_prep.cells import Cells


@dataclass(frozen=True)
class Final:
    """mask: (n,) int64 per cell, bit m set where it keeps modality m, 0 = dropped; order: cells of each mask, shuffled;
    packed: how each modality lies in each stratum, keyed by mask.
    """

    mask: np.ndarray
    order: dict[int, np.ndarray]
    packed: dict[int, dict[str, Packed]]


def settle(
    cells: Cells,
    modalities: dict[str, Modality],
    files: dict[str, str],
    spools: dict[str, list[Path]],
    block_cells: int,
    folder: Path,
) -> Final:
    """Decide every cell's final stratum and position; writes what the second pass needs of each stratum to `folder`.

    A cell loses a modality in which it has no counts. Strata keep the order of the shuffle of all cells. files: those
    of each modality, for messages.

    Raises:
        DataError: no cell has any counts in a modality.
    """
    mask, lengths, largest = _survey(cells, modalities, files, spools)
    shuffled = np.argsort(cells.place)
    order = {int(bits): shuffled[mask[shuffled] == bits] for bits in np.unique(mask[mask > 0])}
    packed = {
        bits: {
            name: _pack(modality, lengths[name][of], largest[name], block_cells)
            for m, (name, modality) in enumerate(modalities.items())
            if bits >> m & 1
        }
        for bits, of in order.items()
    }
    _write(cells, order, modalities, folder)
    return Final(mask, order, packed)


def _survey(
    cells: Cells, modalities: dict[str, Modality], files: dict[str, str], spools: dict[str, list[Path]]
) -> tuple[np.ndarray, dict[str, np.ndarray], dict[str, list[int]]]:
    """Every cell's mask, (n,) int64; per modality what every cell takes, (n, 4), and its largest count and rest."""
    by_key = np.argsort(cells.keys(np.arange(len(cells.barcodes))))
    sorted_keys = cells.keys(by_key)
    mask = np.zeros(len(cells.barcodes), np.int64)
    lengths: dict[str, np.ndarray] = {}
    largest: dict[str, list[int]] = {}
    for m, (name, modality) in enumerate(modalities.items()):
        lengths[name] = np.zeros((len(mask), 4), np.uint32)
        largest[name] = [0, 0]
        for path in spools[name]:
            seen = spool.survey(path)
            of = by_key[np.searchsorted(sorted_keys, seen.keys)]
            lengths[name][of] = seen.lengths
            mask[of[(seen.lengths[:, 0] > 0) | (modality.kind == "dense")]] |= 1 << m
            largest[name] = [max(a, b) for a, b in zip(largest[name], (seen.largest, seen.rest), strict=True)]
        if not (mask >> m & 1).any():
            fix = "check that the files hold raw counts, or leave the modality out"
            raise DataError(f"no cell has any counts in modality {name!r}", where=files[name], fix=fix)
    return mask, lengths, largest


def manifest(
    final: Final,
    cells: Cells,
    modalities: dict[str, Modality],
    block_cells: int,
    codec: Literal["fast", "small"],
    provenance: dict[str, Any],
) -> Manifest:
    """The manifest but for its shards."""
    strata = {}
    for bits, of in final.order.items():
        packed = final.packed[bits]
        raw = max(_cell_bytes(packed[name], modalities[name].n_features, block_cells) for name in packed)
        strata[layout.stratum_name(list(packed))] = Stratum(
            modalities=list(packed),
            n_cells=len(of),
            shard_blocks=layout.shard_blocks(raw, len(of), block_cells),
            barcode_width=max(1, int(np.char.str_len(cells.barcodes[of]).max())),
            packed=packed,
            batch_counts=_tally(cells, "batch", of),
            label_counts=_tally(cells, "label", of),
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


def _pack(modality: Modality, lengths: np.ndarray, largest: list[int], block_cells: int) -> Packed:
    """lengths: (n, 4) of the stratum's cells, in order; largest: count and rest, over the whole modality."""
    count, rest = largest
    if modality.storage == "dense":
        return Packed(values="float32" if modality.kind == "dense" else layout.unsigned(count))  # type: ignore[arg-type]
    binary = count <= 1
    rests = lengths[:, 3] if binary else lengths[:, 1] + 2 * lengths[:, 2]
    return Packed(
        capacity=largest_block(lengths[:, 0], block_cells),
        bits=0 if binary else COUNT_BITS,
        rest=largest_block(rests, block_cells),
        rest_type=layout.unsigned(rest),  # type: ignore[arg-type]
    )


def _cell_bytes(packed: Packed, n_features: int, block_cells: int) -> float:
    """Raw bytes of one cell in the store."""
    if packed.values is not None:
        return n_features * np.dtype(packed.values).itemsize
    return (packed.capacity + packed.rest * np.dtype(packed.rest_type).itemsize) / block_cells


def _tally(cells: Cells, field: str, of: np.ndarray) -> dict[str, int]:
    codes = cells.codes[field][of]
    times = np.bincount(codes[codes >= 0], minlength=len(cells.names[field]))
    return {name: int(n) for name, n in zip(cells.names[field], times, strict=True) if n}


def _write(cells: Cells, order: dict[int, np.ndarray], modalities: dict[str, Modality], folder: Path) -> None:
    """Per stratum: spool keys, codes and barcodes of its cells, in store order, as arrays the tasks can map."""
    shutil.rmtree(folder, ignore_errors=True)
    for bits, of in order.items():
        target = folder / layout.stratum_name([name for m, name in enumerate(modalities) if bits >> m & 1])
        target.mkdir(parents=True)
        np.save(target / "keys.npy", cells.keys(of))
        np.save(target / "batch.npy", cells.codes["batch"][of])
        np.save(target / "label.npy", cells.codes["label"][of])
        np.save(target / "barcodes.npy", cells.barcodes[of])
