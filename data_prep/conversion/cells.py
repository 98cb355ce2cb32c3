"""The cells of a conversion, in shuffled order: barcode, modalities, batch and label of each.

The seed keys a hash of barcodes, and the hash of its barcode gives a cell its place in the
shuffle of all cells; where barcodes pair by their core, the hash of the core does. Cells lie in
folders, one for each range of hashes, so that memory does not grow with their number.

    WORK/cells/joined/0003/     the cells of one range of hashes, and the rows that they have
    WORK/sources/000/           of each row of a source: its spool key, its batch
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from clue_dist.store.shuffle import hash_barcodes
from data_prep.conversion.spool import make_spool_keys
from data_prep.jobs.array_files import load_array
from data_prep.readers.barcode_cores import extract_cores


@dataclass(frozen=True)
class BarcodeHash:
    """The hash that gives each barcode its place in the shuffle."""

    key: int
    by_core: bool = False  # whether it is that of the barcode's core

    def hash_all(self, barcodes: np.ndarray) -> np.ndarray:
        """Hash barcodes, (n,) bytes: (n,) uint64."""
        return hash_barcodes(extract_cores(barcodes) if self.by_core else barcodes, self.key)


@dataclass(frozen=True)
class CellRange:
    """The cells whose hashes lie in one range, in shuffled order."""

    first_place: int  # place of the first cell in the shuffle of all cells
    hashes: np.ndarray  # (n,) uint64, ascending
    barcodes: np.ndarray  # (n,) bytes, `dataset:barcode`
    planned: np.ndarray  # (n,) int64, bit m is set where the inputs list modality m
    # One array per field (batch, label): codes into `CellTable.names`, (n,) int32; -1 = unknown.
    codes: dict[str, np.ndarray]

    def __len__(self) -> int:
        return len(self.planned)

    @property
    def spool_keys(self) -> np.ndarray:
        """The keys of these cells' rows, (n,) int64."""
        return make_spool_keys(self.planned, self.first_place)


@dataclass(frozen=True)
class CellTable:
    """All cells of the inputs, in folders: one for each range of hashes."""

    folders: list[Path]
    range_starts: np.ndarray  # (ranges + 1,), place of the first cell of each; the number of cells
    barcode_hash: BarcodeHash
    names: dict[str, list[str]]  # of each field, the batches or labels that codes are indices of
    # Of several covariates of batches: by name, the level of each batch, or "".
    covariates: dict[str, list[str]]
    row_folders: list[Path]  # of each source: keys.npy and batch.npy hold a number for each row
    n_merged: int = 0  # barcodes that joined a cell with another barcode, of the same core
    n_ambiguous: int = 0  # cells whose core does not say which of several cells completes them

    def __len__(self) -> int:
        return int(self.range_starts[-1])

    def iterate_ranges(self) -> Iterator[CellRange]:
        """Read one range of hashes after another, in shuffled order."""
        for folder, first_place in zip(self.folders, self.range_starts.tolist(), strict=False):
            hashes, barcodes, planned = (
                load_array(folder / f"{name}.npy") for name in ("hashes", "barcodes", "planned")
            )
            codes = {field: load_array(folder / f"{field}.npy") for field in self.names}
            yield CellRange(first_place, hashes, barcodes, planned, codes)

    def find_known_barcodes(self, barcodes: np.ndarray) -> np.ndarray:
        """Find those of `barcodes`, (n,) bytes, that are the barcode of a cell."""
        hashes = self.barcode_hash.hash_all(barcodes)
        bounds = divide_hashes(len(self.folders))
        range_numbers = np.searchsorted(bounds, hashes, side="right") - 1
        known = []
        for number in np.unique(range_numbers).tolist():
            cell_hashes = load_array(self.folders[number] / "hashes.npy")
            cell_barcodes = load_array(self.folders[number] / "barcodes.npy")
            candidates = np.flatnonzero(range_numbers == number)
            starts = np.searchsorted(cell_hashes, hashes[candidates])
            stops = np.searchsorted(cell_hashes, hashes[candidates], side="right")
            for i in np.flatnonzero(stops > starts).tolist():
                # Barcodes may share a hash: only equal barcodes are the same cell.
                barcode = barcodes[candidates[i]]
                if barcode in cell_barcodes[starts[i] : stops[i]]:
                    known.append(barcode)
        return np.array(known, barcodes.dtype)


def divide_hashes(n_ranges: int) -> np.ndarray:
    """Divide all 64-bit hashes into ranges of equal size; return the first hash of each, uint64."""
    return np.array([(number << 64) // n_ranges for number in range(n_ranges)], np.uint64)
