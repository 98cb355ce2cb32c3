"""Builds the batches of one rank ahead of time: a thread, a cache of decoded blocks, a bounded ring."""

from __future__ import annotations

import queue
import threading
import time
from collections import OrderedDict
from collections.abc import Iterator
from typing import Any

import numpy as np

from clue_dist.data.batch import Batch, Part, assemble
from clue_dist.data.phases import phase
from clue_dist.data.plan import Plan
from clue_dist.store.reader import SparseBlocks, Store, StratumReader, gather_rows
from clue_dist.store.rows import Csr, row_starts


class BlockCache:
    """The decoded blocks of one stratum that were used last, `slots` of them at most, in fixed memory."""

    def __init__(self, reader: StratumReader, slots: int) -> None:
        self.reader = reader
        self.slots = min(slots, reader.n_blocks)
        self._slot_of: OrderedDict[int, int] = OrderedDict()
        self._pools: dict[str, dict[str, np.ndarray]] = {}

    def rows(self, positions: np.ndarray) -> Part:
        """Raw counts and batch codes of any cells, in the order asked for."""
        blocks, which = np.unique(positions // self.reader.block_cells, return_inverse=True)
        row = positions % self.reader.block_cells
        slot = self._load(blocks)[which]
        rows = {m: self._gather(m, slot, row) for m in self.reader.modalities}
        return Part(rows, self._pools["obs"]["batch"][slot, row])

    @phase("gather")
    def _gather(self, modality: str, slot: np.ndarray, row: np.ndarray) -> Csr | np.ndarray:
        pool = self._pools[modality]
        if "values" in pool:
            return pool["values"][slot, row]
        n_features = self.reader.manifest.modalities[modality].n_features
        return gather_rows(pool["deltas"], pool["counts"], pool["starts"], slot, row, n_features)

    def _load(self, blocks: np.ndarray) -> np.ndarray:
        """Slots of `blocks`, reading those that are not here in place of the ones not used for longest."""
        missing = [int(b) for b in blocks if int(b) not in self._slot_of]
        for b in blocks:
            if int(b) in self._slot_of:
                self._slot_of.move_to_end(int(b))
        if missing:
            free = len(self._slot_of)
            slots = []
            for b in missing:
                slot = free if free < self.slots else self._slot_of.popitem(last=False)[1]
                free += 1
                self._slot_of[b] = slot
                slots.append(slot)
            self._fill(np.array(slots), np.array(missing))
        return np.array([self._slot_of[int(b)] for b in blocks])

    @phase("read and decode")
    def _fill(self, slots: np.ndarray, blocks: np.ndarray) -> None:
        self._put("obs", slots, {"batch": self.reader.read_codes("batch", blocks)})
        for m in self.reader.modalities:
            got = self.reader.read_blocks(m, blocks)
            if isinstance(got, SparseBlocks):
                self._put(m, slots, {"deltas": got.deltas, "counts": got.counts, "starts": row_starts(got.lengths)})
            else:
                self._put(m, slots, {"values": got})

    def _put(self, name: str, slots: np.ndarray, arrays: dict[str, np.ndarray]) -> None:
        pool = self._pools.setdefault(
            name, {k: np.empty((self.slots, *a.shape[1:]), a.dtype) for k, a in arrays.items()}
        )
        for k, a in arrays.items():
            pool[k][slots] = a


class Loader:
    """Micro-batches `first`, `first` + 1, ... of the plan, the cells of rank `rank` of `world`.

    Use as a context manager; `next()` gives a `Batch`. `waited` counts the seconds `next()` had to wait.
    An error in the thread (a damaged chunk, say) is raised by the `next()` that would have given its batch.
    """

    def __init__(
        self,
        store: Store,
        plan: Plan,
        *,
        rank: int = 0,
        world: int = 1,
        first: int = 0,
        prefetch: int = 4,
        pin: bool = False,
    ) -> None:
        self.plan, self.rank, self.world, self.pin = plan, rank, world, pin
        self.modalities = store.modalities
        self.waited = 0.0
        # The rest of a pass may lie in every lane's window; this rank's windows of the next pass follow at once.
        lot = plan.lanes * plan.window_blocks
        lot += lot // world
        self._caches = {s: BlockCache(store.strata[s], lot + n // world) for s, n in plan.share.items()}
        self._ring: queue.Queue[Batch | BaseException] = queue.Queue(maxsize=prefetch)
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, args=(first,), name="loader", daemon=True)
        self._thread.start()

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        started = time.perf_counter()
        got = self._ring.get()
        self.waited += time.perf_counter() - started
        if isinstance(got, BaseException):
            raise got
        return got

    def __enter__(self) -> Loader:
        return self

    def __exit__(self, *_: Any) -> None:
        self.close()

    def close(self) -> None:
        """Stop the thread; returns when it is gone."""
        self._stop.set()
        while self._thread.is_alive():
            try:
                self._ring.get_nowait()
            except queue.Empty:
                self._thread.join(0.01)

    def _build(self, step: int) -> Batch:
        """This rank's part of micro-batch `step`."""
        parts = [cache.rows(self.plan.cells(step, s)[self.rank :: self.world]) for s, cache in self._caches.items()]
        batch = assemble(self.modalities, parts)
        return batch.pin_memory() if self.pin else batch

    def _run(self, step: int) -> None:
        try:
            while not self._stop.is_set():
                self._offer(self._build(step))
                step += 1
        except BaseException as error:  # noqa: BLE001  raised again where the batch was expected
            self._offer(error)

    def _offer(self, item: Batch | BaseException) -> None:
        while not self._stop.is_set():
            try:
                return self._ring.put(item, timeout=0.1)
            except queue.Full:
                continue
