"""Builds the batches of one rank ahead of time: blocks read ahead, a thread that builds, a bounded ring."""

from __future__ import annotations

import queue
import threading
import time
from collections import OrderedDict, deque
from collections.abc import Iterator
from typing import Any

import numpy as np

from clue_dist.data.batch import Batch, Part, assemble
from clue_dist.data.phases import phase
from clue_dist.data.plan import Plan
from clue_dist.store.layout import group_of
from clue_dist.store.pool import Pool, Reading
from clue_dist.store.reader import Store, StratumReader

AHEAD = 4  # micro-batches between the one that is built and the one whose blocks are being read


class BlockCache:
    """The blocks of one segment that are used now or soon, `slots` at most, in fixed memory."""

    def __init__(self, reader: StratumReader, slots: int) -> None:
        self.slots = min(slots, reader.n_blocks)
        self.block_cells, self.modalities = reader.block_cells, reader.modalities
        self._pool = Pool(reader, self.slots)
        self._slot_of: OrderedDict[int, int] = OrderedDict()  # the block that was asked for longest ago comes first
        self._coming: dict[int, Reading] = {}

    @phase("read and decode")
    def expect(self, positions: np.ndarray) -> None:
        """Begin to read the blocks of cells that will be asked for, in place of those not used for longest."""
        blocks = np.unique(positions // self.block_cells).tolist()
        missing = [b for b in blocks if b not in self._slot_of]
        for b in blocks:
            if b in self._slot_of:
                self._slot_of.move_to_end(b)
        if missing:
            for b in missing:
                full = len(self._slot_of) == self.slots
                self._slot_of[b] = self._slot_of.popitem(last=False)[1] if full else len(self._slot_of)
            reading = self._pool.start(np.array(missing), np.array([self._slot_of[b] for b in missing]))
            self._coming |= dict.fromkeys(missing, reading)

    def rows(self, positions: np.ndarray) -> Part:
        """Raw counts and batch codes of cells that were expected, in the order asked for."""
        blocks, which = np.unique(positions // self.block_cells, return_inverse=True)
        self._await(blocks.tolist())
        slot, row = np.array([self._slot_of[b] for b in blocks.tolist()])[which], positions % self.block_cells
        rows = {m: self._pool.rows(m, slot, row) for m in self.modalities}
        return Part(rows, self._pool.batch_codes(slot, row))

    @phase("read and decode")
    def _await(self, blocks: list[int]) -> None:
        for b in blocks:
            if (reading := self._coming.get(b)) is not None:
                self._pool.finish(reading)
                for done in reading.blocks.tolist():
                    del self._coming[done]


def slots_for(plan: Plan, segment: str, world: int, steps: int) -> int:
    """Blocks of a segment that one of `world` ranks may need for any `steps` micro-batches in a row."""
    lot = plan.lanes * plan.window_blocks  # blocks of one span, of which a rank reads its lanes' windows
    spans = steps * plan.share[group_of(segment)] // (lot * plan.block_cells) + 2
    # What is left at the end of a pass is no lane's own: a rank may need all of it.
    return spans * lot // world + lot + 1


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
        steps = AHEAD + 1
        self._caches = {s: BlockCache(store.strata[s], slots_for(plan, s, world, steps)) for s in plan.segments}
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

    def _run(self, step: int) -> None:
        planned: deque[dict[str, np.ndarray]] = deque()
        try:
            while not self._stop.is_set():
                while len(planned) <= AHEAD:
                    planned.append(self._expect(step))
                    step += 1
                self._offer(self._build(planned.popleft()))
        except BaseException as error:  # noqa: BLE001  raised again where the batch was expected
            self._offer(error)

    def _expect(self, step: int) -> dict[str, np.ndarray]:
        """This rank's cells of micro-batch `step`, whose blocks begin to be read."""
        cells = {s: self.plan.cells(step, s)[self.rank :: self.world] for s in self._caches}
        for s, positions in cells.items():
            self._caches[s].expect(positions)
        return cells

    def _build(self, cells: dict[str, np.ndarray]) -> Batch:
        parts = [self._caches[s].rows(positions) for s, positions in cells.items() if len(positions)]
        batch = assemble(self.modalities, parts)
        return batch.pin_memory() if self.pin else batch

    def _offer(self, item: Batch | BaseException) -> None:
        while not self._stop.is_set():
            try:
                return self._ring.put(item, timeout=0.1)
            except queue.Full:
                continue
