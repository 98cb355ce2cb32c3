"""Blocks of one stratum in fixed memory, which TensorStore fills while others are being used."""

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
    """Blocks on their way into slots of a pool. futures: by name of the array."""

    blocks: np.ndarray
    slots: np.ndarray
    futures: dict[str, Any]


class BlockPool:
    """`slots` blocks of all that training reads of a stratum: counts of its modalities, and batch codes."""

    def __init__(self, reader: SegmentReader, slots: int) -> None:
        self.reader = reader
        specs = {
            spec.path.split("/", 2)[2]: spec for spec in reader.manifest.specify_arrays(reader.name)
        }
        unread = ("obs/label", "obs/barcode")
        self._arrays = {
            n: np.empty((slots, *s.shape[1:]), s.dtype) for n, s in specs.items() if n not in unread
        }
        self._targets = {
            n: ts.array(array, copy=False, write=True) for n, array in self._arrays.items()
        }
        size = reader.block_cells
        self._starts = {
            m: np.empty((slots, size + 1, 2), np.int64)
            for m in reader.modalities
            if self._is_sparse(m)
        }

    def start_read(self, blocks: np.ndarray, slots: np.ndarray) -> BlockRead:
        """Begin to fill slots with blocks, (n,) each; what they held must not be needed any more."""
        for name in self._targets:  # before any is begun: nobody would wait for it after an error
            self.reader.require_plain_shards(name, blocks)
        futures = {
            n: self.reader.start_read(n, blocks, target[slots])
            for n, target in self._targets.items()
        }
        return BlockRead(blocks, slots, futures)

    def finish_read(self, reading: BlockRead) -> None:
        """Wait until the slots are filled.

        Raises:
            StoreError: part of the store is missing or damaged.
        """
        for name, future in reading.futures.items():
            self.reader.finish_read(name, reading.blocks, future)
        for modality, starts in self._starts.items():
            starts[reading.slots] = self.reader.compute_starts(
                modality, self._arrays[f"{modality}/lengths"][reading.slots]
            )

    def abandon_read(self, reading: BlockRead) -> None:
        """Wait until nothing is written to the slots any more; to cancel would not stop what has begun."""
        for future in reading.futures.values():
            with suppress(ValueError, OSError):  # a damage that nobody will see
                future.result()

    def get_rows(
        self, modality: str, slot: np.ndarray, row: np.ndarray
    ) -> LocatedRows | np.ndarray:
        """Rows `row` of what lies in `slot`, both (n,): still coded, or (n, features) where stored dense."""
        if not self._is_sparse(modality):
            return self._arrays[f"{modality}/values"][slot, row]
        codes, rest, lengths = (
            self._arrays[f"{modality}/{part}"] for part in ("codes", "rest", "lengths")
        )
        return self.reader.locate_rows(
            modality, CodedBlocks(codes, rest, lengths, self._starts[modality]), slot, row
        )

    def get_batch_codes(self, slot: np.ndarray, row: np.ndarray) -> np.ndarray:
        """(n,) int32, -1 = unknown."""
        return self.reader.require_known_codes("batch", self._arrays["obs/batch"][slot, row])

    def _is_sparse(self, modality: str) -> bool:
        return self.reader.manifest.modalities[modality].storage == "sparse"
