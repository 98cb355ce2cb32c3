"""Blocks of one segment in fixed memory. TensorStore fills some while others are in use."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import numpy as np
import tensorstore as ts

from clue_dist.store.reader import SegmentReader
from clue_dist.store.rows import CodedBlocks, LocatedRows


@dataclass(frozen=True)
class BlockRead:
    """Blocks that are being read into slots of a pool."""

    blocks: np.ndarray  # (n,) numbers of the blocks
    slots: np.ndarray  # (n,) where each goes
    futures: dict[str, Any]  # reads by name of the array


class BlockPool:
    """Memory for some blocks of all that training reads of a segment: counts and batch codes.

    Args:
        reader: the reader of the segment.
        slots: how many blocks there is memory for; each has a slot.
    """

    def __init__(self, reader: SegmentReader, slots: int) -> None:
        self.reader = reader
        # Memory by name of the array ("rna/codes"), (slots, ...); and the same for TensorStore.
        self._memory = {
            name: np.empty((slots, *spec.shape[1:]), spec.dtype)
            for name, spec in reader.arrays.specs.items()
            if spec.feeds_training
        }
        self._targets = {
            name: ts.array(memory, copy=False, write=True) for name, memory in self._memory.items()
        }
        # Where the rows of each block start, by sparse modality; see `CodedBlocks`.
        self._starts = {
            modality: np.empty((slots, reader.block_cells + 1, 2), np.int64)
            for modality in reader.modalities
            if self._is_sparse(modality)
        }

    def start_read(self, blocks: np.ndarray, slots: np.ndarray) -> BlockRead:
        """Begin to fill slots with blocks.

        Args:
            blocks: numbers of the blocks, (n,).
            slots: where each goes, (n,). What these slots hold must not be needed any more.

        Raises:
            StoreError: a shard is no file, or too large.
        """
        # All checks come first: after an error nothing may be on its way into the slots.
        for name in self._targets:
            self.reader.arrays.require_plain_shards(name, blocks)
        futures = {
            name: self.reader.arrays.start_read(name, blocks, target[slots])
            for name, target in self._targets.items()
        }
        return BlockRead(blocks, slots, futures)

    def finish_read(self, reading: BlockRead) -> None:
        """Wait until the slots are filled.

        Raises:
            StoreError: part of the store is missing or damaged.
        """
        for name, future in reading.futures.items():
            self.reader.arrays.finish_read(name, reading.blocks, future)
        for modality, starts in self._starts.items():
            lengths = self._memory[f"{modality}/lengths"][reading.slots]
            starts[reading.slots] = self.reader.compute_starts(modality, lengths)

    def abandon_read(self, reading: BlockRead) -> None:
        """Wait until nothing is written to the slots any more, and ignore errors.

        TensorStore cannot cancel a read that has begun.
        """
        for future in reading.futures.values():
            with suppress(ValueError, OSError):
                future.result()

    def get_rows(
        self, modality: str, slot: np.ndarray, row: np.ndarray
    ) -> LocatedRows | np.ndarray:
        """Return rows of blocks in the pool.

        Args:
            modality: the modality's name.
            slot: which slot holds the block of each row, (n,).
            row: which row of its block each is, (n,).

        Returns:
            The rows, still coded and inside the pool's memory; (n, features) where the modality is
            stored dense.
        """
        if not self._is_sparse(modality):
            return self._memory[f"{modality}/values"][slot, row]
        codes, rest, lengths = (
            self._memory[f"{modality}/{array}"] for array in ("codes", "rest", "lengths")
        )
        blocks = CodedBlocks(codes, rest, lengths, self._starts[modality])
        return self.reader.locate_rows(modality, blocks, slot, row)

    def get_batch_codes(self, slot: np.ndarray, row: np.ndarray) -> np.ndarray:
        """Return the batch codes of rows of blocks in the pool, (n,) int32, -1 = unknown."""
        return self.reader.require_known_codes("batch", self._memory["obs/batch"][slot, row])

    def _is_sparse(self, modality: str) -> bool:
        """Whether a modality is stored sparse."""
        return self.reader.manifest.modalities[modality].storage == "sparse"
