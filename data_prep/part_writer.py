"""Writes cells that were read from a store into another one, coded as they are."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from clue_dist.store.manifest import Manifest
from clue_dist.store.manifest_parts import FileDigest
from clue_dist.store.reader import SegmentReader
from clue_dist.store.rows import CodedRows, join_rows
from clue_dist.store.writer import ShardCells, write_shard


def take_cells(
    reader: SegmentReader, read: Mapping[str, Any], first: int, rows: np.ndarray
) -> ShardCells:
    """Take some cells of blocks that were read.

    Args:
        reader: of the segment.
        read: the blocks, by modality.
        first: position of the first cell of these blocks.
        rows: which cells, counted from that one on, (n,).
    """
    modalities: dict[str, CodedRows | np.ndarray] = {}
    for name, blocks in read.items():
        if isinstance(blocks, np.ndarray):
            modalities[name] = blocks.reshape(-1, blocks.shape[-1])[rows]
        else:
            modalities[name] = blocks.take_rows(rows, reader.segment.packed[name].bits)
    positions = first + rows
    return ShardCells(
        modalities,
        reader.read_codes("batch", positions),
        reader.read_codes("label", positions),
        reader.read_barcodes(positions),
        [reader.read_kept_column(name, positions) for name in reader.manifest.obs_columns],
    )


class SegmentWriter:
    """Collects the cells of a segment of a part, and writes each shard that is full."""

    def __init__(self, before: Manifest, part: Manifest, folder: Path, name: str) -> None:
        self.part, self.folder, self.name = part, folder, name
        self.shard_cells = part.strata[name].shard_blocks * part.block_cells
        self.waiting: list[ShardCells] = []
        self.n_waiting, self.n_written = 0, 0
        self.digests: dict[str, FileDigest] = {}
        # What each code of the whole is in the part; the last one is for -1.
        self.codes = {
            "batch": _map_codes(before.batches, part.batches),
            "label": _map_codes(before.labels, part.labels),
        }

    def add_cells(self, cells: ShardCells) -> None:
        """Add the next cells."""
        self.waiting.append(cells)
        self.n_waiting += len(cells.barcodes)
        while self.n_waiting >= self.shard_cells:
            self._write_waiting(self.shard_cells)

    def finish(self) -> dict[str, FileDigest]:
        """Write what is left; return size and hash of each file."""
        if self.n_waiting:
            self._write_waiting(self.n_waiting)
        return self.digests

    def _write_waiting(self, n_cells: int) -> None:
        """Write the first of the waiting cells as a shard."""
        cells = _join_cells(self.waiting)
        shard, rest = _slice_cells(cells, slice(0, n_cells)), slice(n_cells, None)
        self.waiting = [_slice_cells(cells, rest)] if n_cells < self.n_waiting else []
        self.n_waiting -= n_cells
        shard = ShardCells(
            shard.modalities,
            self.codes["batch"][shard.batch],
            self.codes["label"][shard.label],
            shard.barcodes,
            shard.kept,
        )
        self.digests |= write_shard(self.folder, self.part, self.name, self.n_written, shard)
        self.n_written += 1


def _map_codes(names: list[str], part_names: list[str]) -> np.ndarray:
    """Map the codes of the whole to those of a part, (names + 1,) int32; -1 stays."""
    places = {name: code for code, name in enumerate(part_names)}
    return np.array([*(places.get(name, -1) for name in names), -1], np.int32)


def _join_cells(parts: list[ShardCells]) -> ShardCells:
    """Put the cells of several parts behind each other."""
    if len(parts) == 1:
        return parts[0]
    modalities: dict[str, CodedRows | np.ndarray] = {}
    for name in parts[0].modalities:
        rows: list[Any] = [part.modalities[name] for part in parts]
        if isinstance(rows[0], np.ndarray):
            modalities[name] = np.concatenate(rows)
        else:
            modalities[name] = join_rows(rows, np.arange(sum(part.n_rows for part in rows)))
    batch, label, barcodes = (
        np.concatenate([getattr(part, name) for part in parts])
        for name in ("batch", "label", "barcodes")
    )
    kept = [np.concatenate(columns) for columns in zip(*(part.kept for part in parts), strict=True)]
    return ShardCells(modalities, batch, label, barcodes, kept)


def _slice_cells(cells: ShardCells, part: slice) -> ShardCells:
    """Take a range of cells."""
    modalities = {
        name: rows[part] if isinstance(rows, np.ndarray) else rows.slice_rows(part)
        for name, rows in cells.modalities.items()
    }
    kept = [column[part] for column in cells.kept]
    return ShardCells(modalities, cells.batch[part], cells.label[part], cells.barcodes[part], kept)
