"""Builds the batches of one rank ahead of time: one thread plans them and has their blocks read, others gather rows."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import numpy as np

from clue_dist.allocator import keep_freed_memory
from clue_dist.data.batch import Batch, BatchPart, assemble_batch
from clue_dist.data.buffers import BufferPool
from clue_dist.data.plan import CellPlan
from clue_dist.data.timing import time_phase
from clue_dist.errors import ConfigError, ServerError, StoreError
from clue_dist.store.block_pool import BlockPool, BlockRead
from clue_dist.store.layout import count_blocks
from clue_dist.store.reader import SegmentReader, Store

READ_AHEAD = 20  # micro-batches, at least, whose blocks are being read while another is built
STRETCH_BATCHES = 8  # micro-batches that are planned, and whose blocks are asked for, together
GATHERERS = 2  # threads: one alone gathers rows more slowly than TensorStore decompresses them
GATHERING = 2 * GATHERERS  # micro-batches that are being built, or wait for a thread
# Stretches whose blocks are needed at a time: a new one, and those of all micro-batches planned or being built.
HELD_STRETCHES = 1 + -(-(READ_AHEAD - 1 + GATHERING) // STRETCH_BATCHES)


class BlockCache:
    """The blocks of one segment that are used now or soon, `slots` at most, in fixed memory."""

    def __init__(self, reader: SegmentReader, slots: int) -> None:
        self.slots = min(slots, reader.n_blocks)
        self.block_cells, self.modalities = reader.block_cells, reader.modalities
        self._pool = BlockPool(reader, self.slots)
        self._slot_of = np.full(reader.n_blocks, -1, np.int32)
        self._block_in = np.full(self.slots, -1, np.int64)
        self._asked = np.full(
            self.slots, -HELD_STRETCHES, np.int64
        )  # when a slot's block was asked for, in calls of `prefetch_blocks`
        self._calls = 0
        self._coming = deque[BlockRead]()
        self._is_coming = np.zeros(self.slots, bool)
        self._damaged: dict[int, StoreError] = {}  # by slot

    @time_phase("read and decode")
    def prefetch_blocks(self, positions: np.ndarray) -> None:
        """Begin to read the blocks of cells needed before HELD_STRETCHES - 1 more calls, in place of those not
        asked for longest."""
        self._calls += 1
        blocks = np.unique(positions // self.block_cells)
        slots = self._slot_of[blocks]
        self._asked[slots[slots >= 0]] = self._calls
        missing = blocks[slots < 0]
        if len(missing):
            slots = np.argsort(self._asked, kind="stable")[: len(missing)]
            if len(slots) < len(missing) or self._asked[slots[-1]] > self._calls - HELD_STRETCHES:
                raise RuntimeError(
                    f"a loader has {self.slots} slots, too few for the blocks of {HELD_STRETCHES} stretches"
                )
            left = self._block_in[slots]
            self._slot_of[left[left >= 0]] = -1
            self._slot_of[missing], self._block_in[slots], self._asked[slots] = (
                slots,
                missing,
                self._calls,
            )
            self._coming.append(self._pool.start_read(missing, slots))
            self._is_coming[slots] = True

    def locate_cells(self, positions: np.ndarray) -> BatchPart:
        """Raw counts and batch codes of cells that were expected, in the order asked for.

        Raises:
            StoreError: a block of theirs is missing or damaged.
        """
        slot, row = self._slot_of[positions // self.block_cells], positions % self.block_cells
        self._await(slot)
        if self._damaged and (bad := self._damaged.keys() & slot.tolist()):
            raise self._damaged[min(bad)]
        rows = {m: self._pool.get_rows(m, slot, row) for m in self.modalities}
        return BatchPart(rows, self._pool.get_batch_codes(slot, row))

    @time_phase("read and decode")
    def _await(self, slot: np.ndarray) -> None:
        while self._is_coming[slot].any():
            reading = self._coming[0]
            self._settle(reading)
            self._coming.popleft()  # only now: after an error, closing waits for the rest of it
            self._is_coming[reading.slots] = False

    def close(self) -> None:
        """Wait until nothing is on its way any more: TensorStore's threads must not outlive what they write to."""
        for reading in self._coming:
            self._pool.abandon_read(reading)
        self._coming.clear()

    def _settle(self, reading: BlockRead) -> None:
        """Wait for blocks; of many that were read together, find out which one is damaged."""
        try:
            self._pool.finish_read(reading)
        except StoreError as error:
            if isinstance(error, ServerError):
                raise
            if len(reading.blocks) == 1:
                self._damaged[int(reading.slots[0])] = error
                return
            for i in range(len(reading.blocks)):
                self._settle(
                    self._pool.start_read(reading.blocks[i : i + 1], reading.slots[i : i + 1])
                )


def count_cache_slots(plan: CellPlan, segment: str, world: int) -> int:
    """Blocks of a segment that one of `world` ranks may need for HELD_STRETCHES stretches of micro-batches."""
    n, cells = (
        plan.segment_sizes[segment],
        plan.bound_dealt_cells(segment, HELD_STRETCHES * STRETCH_BATCHES),
    )
    lot = plan.lanes * plan.count_window_blocks(
        segment
    )  # blocks of one span, of which a rank reads its lanes' windows
    span = lot * plan.block_cells
    spanned = n // span * span  # cells of a pass that are dealt in spans
    whole = (
        (cells // span + 2) * lot // world if spanned else 0
    )  # two spans may be touched at one end only
    # What is left at the end of a pass is no lane's own: a rank may need all of it. Between two such ends lies a pass.
    ends = 1 if cells <= spanned else 2 + (cells - spanned - 1) // n
    return min(whole + ends * count_blocks(n - spanned, plan.block_cells), cells // world)


class _Ring:
    """Batches on their way to training, at most `size`. Who fills it sleeps until half of them are gone: to be woken
    for each would take the interpreter's lock from training each time."""

    def __init__(self, size: int) -> None:
        self._size, self._items = size, deque[Future[Batch]]()
        self._changed = threading.Condition()
        self._open = True

    def put(self, item: Future[Batch]) -> None:
        """Waits for room; does nothing once closed."""
        with self._changed:
            if len(self._items) == self._size:
                self._changed.wait_for(
                    lambda: len(self._items) <= self._size // 2 or not self._open
                )
            if self._open:
                self._items.append(item)
                self._changed.notify()

    def get(self) -> Future[Batch]:
        """Waits for a batch; StopIteration once closed."""
        with self._changed:
            self._changed.wait_for(lambda: self._items or not self._open)
            if not self._open:
                raise StopIteration
            item = self._items.popleft()
            if len(self._items) == self._size // 2:
                self._changed.notify()
            return item

    def close(self) -> None:
        with self._changed:
            self._open = False
            self._changed.notify_all()


class Loader:
    """Micro-batches `first`, `first` + 1, ... of the plan, the cells of rank `rank` of `world`.

    Use as a context manager; `next()` gives a `Batch`, its counts sparse as they are stored, or all of them `dense`.
    `waited_seconds` counts the seconds `next()` had to wait.
    An error in a thread (a damaged chunk, say) is raised by the `next()` that would have given its batch, and by all
    after it; one that was interrupted can be called again.

    Raises:
        ConfigError: `world` does not divide the plan's lanes.
    """

    def __init__(
        self,
        store: Store,
        plan: CellPlan,
        *,
        rank: int = 0,
        world: int = 1,
        first: int = 0,
        prefetch: int = 4,
        pin: bool = False,
        dense: bool = False,
    ) -> None:
        if plan.lanes % world:
            raise ConfigError(
                "the number of ranks does not divide the lanes",
                where="data.lanes",
                got=f"{plan.lanes} % {world} = {plan.lanes % world}",
                expected="a multiple of the number of ranks",
            )
        self.plan, self.rank, self.world, self.pin, self.dense = plan, rank, world, pin, dense
        self.modalities = store.modalities
        self.waited_seconds = 0.0
        self._due: Future[Batch] | None = None  # what next() waits for
        self._caches = {
            s: BlockCache(store.segments[s], count_cache_slots(plan, s, world))
            for s in plan.segments
        }
        self._buffers = BufferPool()
        keep_freed_memory()
        self._ring = _Ring(prefetch)
        self._stop = threading.Event()
        self._gatherers = ThreadPoolExecutor(GATHERERS, thread_name_prefix="gather")
        self._thread = threading.Thread(target=self._run, args=(first,), name="loader", daemon=True)
        self._thread.start()

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        started = time.perf_counter()
        try:
            if self._due is None:
                self._due = self._ring.get()
            batch = self._due.result()
            self._due = None  # only now: after an error or an interrupt, no batch is left out
            return batch
        finally:
            self.waited_seconds += time.perf_counter() - started

    def __enter__(self) -> Loader:
        return self

    def __exit__(self, *_: Any) -> None:
        self.close()

    def close(self) -> None:
        """Stop the threads; returns when they are gone, and nothing is being read any more."""
        self._stop.set()
        self._ring.close()
        self._thread.join()
        self._gatherers.shutdown(cancel_futures=True)
        for cache in self._caches.values():
            cache.close()

    def _run(self, step: int) -> None:
        planned: deque[dict[str, np.ndarray]] = deque()
        gathering: deque[Future[Batch]] = deque()
        try:
            while not self._stop.is_set():
                if len(planned) < READ_AHEAD:
                    planned += self._expect(step)
                    step += STRETCH_BATCHES
                if len(gathering) == GATHERING:
                    gathering.popleft().result()  # what it reads from must not be overwritten before
                gathering.append(self._gathered(planned.popleft()))
                self._ring.put(gathering[-1])
        except BaseException as error:  # noqa: BLE001  raised again where the batch was expected
            failed: Future[Batch] = Future()
            failed.set_exception(error)
            self._ring.put(failed)

    def _expect(self, step: int) -> list[dict[str, np.ndarray]]:
        """This rank's cells of micro-batches from `step` on, whose blocks begin to be read."""
        stretch: list[dict[str, np.ndarray]] = [{} for _ in range(STRETCH_BATCHES)]
        for s, cache in self._caches.items():
            positions = self.plan.select_cells(step, s, STRETCH_BATCHES)
            ends = [
                self.plan.count_dealt_cells(step + i, s) - self.plan.count_dealt_cells(step, s)
                for i in range(1, STRETCH_BATCHES)
            ]
            for cells, of in zip(stretch, np.split(positions, ends), strict=True):
                cells[s] = of[self.rank :: self.world]
            cache.prefetch_blocks(np.concatenate([cells[s] for cells in stretch]))
        return stretch

    def _gathered(self, cells: dict[str, np.ndarray]) -> Future[Batch]:
        parts = [
            self._caches[s].locate_cells(positions)
            for s, positions in cells.items()
            if len(positions)
        ]
        return self._gatherers.submit(self._build, parts)

    def _build(self, parts: list[BatchPart]) -> Batch:
        batch = assemble_batch(self.modalities, parts, self._buffers, self.dense)
        return batch.pin_memory() if self.pin else batch
