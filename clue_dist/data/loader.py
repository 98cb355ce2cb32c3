"""Build the batches of one rank ahead of time.

One thread plans the batches and has their blocks read; others gather rows out of the blocks.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import numpy as np

from clue_dist.allocator import keep_freed_memory
from clue_dist.data.assembly import BatchPart, CountsForm, assemble_batch
from clue_dist.data.batch import Batch
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
# Stretches whose blocks are needed at a time: a new one, and those of all micro-batches that are
# planned or being built.
HELD_STRETCHES = 1 + -(-(READ_AHEAD - 1 + GATHERING) // STRETCH_BATCHES)


class BlockCache:
    """The blocks of one segment that are used now or soon, in fixed memory.

    Args:
        reader: the segment.
        slots: how many blocks fit, at most; a segment with fewer blocks takes as many slots.
    """

    def __init__(self, reader: SegmentReader, slots: int) -> None:
        self.slots = min(slots, reader.n_blocks)
        self.block_cells, self.modalities = reader.block_cells, reader.modalities
        self._pool = BlockPool(reader, self.slots)
        self._slot_of_block = np.full(reader.n_blocks, -1, np.int32)  # -1: not here
        self._block_in_slot = np.full(self.slots, -1, np.int64)  # -1: empty
        # When a slot's block was last asked for, in calls of `prefetch_blocks`.
        self._last_call = np.full(self.slots, -HELD_STRETCHES, np.int64)
        self._calls = 0
        self._reads = deque[BlockRead]()  # under way, in the order in which they began
        self._is_read = np.ones(self.slots, bool)  # False: its block is still under way
        self._damage: dict[int, StoreError] = {}  # damage found, by slot

    @time_phase("read and decode")
    def prefetch_blocks(self, positions: np.ndarray) -> None:
        """Begin to read the blocks of cells that are needed soon.

        The cells may be located until HELD_STRETCHES - 1 more calls have been made. New blocks take
        the place of those that were not asked for longest.

        Args:
            positions: (n,), the cells in the segment.
        """
        self._calls += 1
        blocks = np.unique(positions // self.block_cells)
        slots = self._slot_of_block[blocks]
        self._last_call[slots[slots >= 0]] = self._calls
        missing = blocks[slots < 0]
        if len(missing):
            self._start_read(missing)

    def _start_read(self, blocks: np.ndarray) -> None:
        """Begin to read blocks that are in no slot."""
        slots = np.argsort(self._last_call, kind="stable")[: len(blocks)]
        last_free_call = self._calls - HELD_STRETCHES  # blocks asked for later are still needed
        if len(slots) < len(blocks) or self._last_call[slots[-1]] > last_free_call:
            raise RuntimeError(
                f"a loader has {self.slots} slots, too few for the blocks of {HELD_STRETCHES} "
                "stretches"
            )
        replaced = self._block_in_slot[slots]
        self._slot_of_block[replaced[replaced >= 0]] = -1
        self._slot_of_block[blocks] = slots
        self._block_in_slot[slots] = blocks
        self._last_call[slots] = self._calls
        self._reads.append(self._pool.start_read(blocks, slots))
        self._is_read[slots] = False

    def locate_cells(self, positions: np.ndarray) -> BatchPart:
        """Raw counts and batch codes of prefetched cells, in the order asked for.

        Args:
            positions: (n,), the cells in the segment.

        Raises:
            StoreError: one of their blocks is missing or damaged.
        """
        slot = self._slot_of_block[positions // self.block_cells]
        row = positions % self.block_cells
        self._await_blocks(slot)
        if self._damage and (damaged := self._damage.keys() & slot.tolist()):
            raise self._damage[min(damaged)]
        rows = {m: self._pool.get_rows(m, slot, row) for m in self.modalities}
        return BatchPart(rows, self._pool.get_batch_codes(slot, row))

    @time_phase("read and decode")
    def _await_blocks(self, slots: np.ndarray) -> None:
        """Wait until the blocks in these slots have been read."""
        while not self._is_read[slots].all():
            read = self._reads[0]
            self._finish_read(read)
            self._reads.popleft()  # only now: after an error, `close` waits for the rest of it
            self._is_read[read.slots] = True

    def close(self) -> None:
        """Wait until no read is under way: TensorStore must not write to memory that is gone."""
        for read in self._reads:
            self._pool.abandon_read(read)
        self._reads.clear()

    def _finish_read(self, read: BlockRead) -> None:
        """Wait for blocks; of blocks that were read together, find out which one is damaged."""
        try:
            self._pool.finish_read(read)
        except StoreError as error:
            if isinstance(error, ServerError):  # says nothing about a single block
                raise
            if len(read.blocks) == 1:
                self._damage[int(read.slots[0])] = error
                return
            for i in range(len(read.blocks)):
                one = slice(i, i + 1)
                self._finish_read(self._pool.start_read(read.blocks[one], read.slots[one]))


def count_cache_slots(plan: CellPlan, segment: str, world: int) -> int:
    """Count the blocks of a segment that a rank may need for HELD_STRETCHES stretches.

    Args:
        plan: the plan that the rank follows.
        segment: one of its segments.
        world: number of ranks.
    """
    size = plan.segment_sizes[segment]
    cells = plan.bound_dealt_cells(segment, HELD_STRETCHES * STRETCH_BATCHES)
    # Blocks of one span; a rank reads those of its lanes' windows.
    span_blocks = plan.lanes * plan.count_window_blocks(segment)
    span = span_blocks * plan.block_cells
    spanned = size // span * span  # cells of a pass that are dealt in spans
    # Of two spans the rank may need one end only.
    whole = (cells // span + 2) * span_blocks // world if spanned else 0
    # What is left at the end of a pass belongs to no lane: a rank may need all of it. A pass lies
    # between two such ends.
    ends = 1 if cells <= spanned else 2 + (cells - spanned - 1) // size
    rest_blocks = count_blocks(size - spanned, plan.block_cells)
    return min(whole + ends * rest_blocks, cells // world)


class _Ring:
    """Batches on their way to training, a limited number.

    The thread that fills the ring sleeps until half of the batches are gone: to be woken for each
    would take the interpreter's lock from training each time.
    """

    def __init__(self, size: int) -> None:
        self._size, self._items = size, deque[Future[Batch]]()
        self._changed = threading.Condition()
        self._open = True

    def put(self, item: Future[Batch]) -> None:
        """Add a batch once there is room; do nothing once closed."""
        with self._changed:
            if len(self._items) == self._size:
                self._changed.wait_for(
                    lambda: len(self._items) <= self._size // 2 or not self._open
                )
            if self._open:
                self._items.append(item)
                self._changed.notify()

    def get(self) -> Future[Batch]:
        """Take a batch once there is one; raise StopIteration once closed."""
        with self._changed:
            self._changed.wait_for(lambda: self._items or not self._open)
            if not self._open:
                raise StopIteration
            item = self._items.popleft()
            if len(self._items) == self._size // 2:
                self._changed.notify()
            return item

    def close(self) -> None:
        """Wake all threads that wait, with nothing for them."""
        with self._changed:
            self._open = False
            self._changed.notify_all()


class Loader:
    """An iterator over the micro-batches of a plan: this rank's cells of each.

    Use it as a context manager. An error in a thread (a damaged chunk, say) is raised by the
    `next()` that would have given its batch, and by all after it. A `next()` that was interrupted
    can be called again.

    Args:
        store: an open store.
        plan: which cells each micro-batch holds.
        rank: number of this rank.
        world: number of ranks.
        first: the micro-batch to begin with.
        prefetch: batches kept ready.
        form: what counts that are stored sparse become; coded ones are for `DeviceBatches`, which
            expands them.

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
        form: CountsForm = "sparse",
    ) -> None:
        if plan.lanes % world:
            raise ConfigError(
                "the number of ranks does not divide the lanes",
                where="data.lanes",
                got=f"{plan.lanes} % {world} = {plan.lanes % world}",
                expected="a multiple of the number of ranks",
            )
        self.plan, self.rank, self.world = plan, rank, world
        self.form: CountsForm = form
        self.modalities = store.modalities
        self.waited_seconds = 0.0  # by `next()`, so far
        self._due: Future[Batch] | None = None  # what `next()` waits for
        self._caches = {
            segment: BlockCache(store.segments[segment], count_cache_slots(plan, segment, world))
            for segment in plan.segments
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
        """Stop the threads. When it returns, they are gone and no read is under way."""
        self._stop.set()
        self._ring.close()
        self._thread.join()
        self._gatherers.shutdown(cancel_futures=True)
        for cache in self._caches.values():
            cache.close()

    def _run(self, micro_batch: int) -> None:
        """The loader's thread: plan, prefetch blocks, and hand batches to the gatherers."""
        planned: deque[dict[str, np.ndarray]] = deque()
        gathering: deque[Future[Batch]] = deque()
        try:
            while not self._stop.is_set():
                if len(planned) < READ_AHEAD:
                    planned += self._plan_stretch(micro_batch)
                    micro_batch += STRETCH_BATCHES
                if len(gathering) == GATHERING:
                    # The blocks of the oldest batch may be overwritten only once it is built.
                    gathering.popleft().result()
                gathering.append(self._start_build(planned.popleft()))
                self._ring.put(gathering[-1])
        except BaseException as error:  # noqa: BLE001  raised again where the batch was expected
            failed: Future[Batch] = Future()
            failed.set_exception(error)
            self._ring.put(failed)

    def _plan_stretch(self, micro_batch: int) -> list[dict[str, np.ndarray]]:
        """This rank's cells of STRETCH_BATCHES micro-batches, by segment; prefetch their blocks."""
        stretch: list[dict[str, np.ndarray]] = [{} for _ in range(STRETCH_BATCHES)]
        for segment, cache in self._caches.items():
            positions = self.plan.select_cells(micro_batch, segment, STRETCH_BATCHES)
            dealt = [
                self.plan.count_dealt_cells(micro_batch + i, segment)
                for i in range(STRETCH_BATCHES)
            ]
            batches = np.split(positions, [count - dealt[0] for count in dealt[1:]])
            for cells, global_cells in zip(stretch, batches, strict=True):
                cells[segment] = global_cells[self.rank :: self.world]
            cache.prefetch_blocks(np.concatenate([cells[segment] for cells in stretch]))
        return stretch

    def _start_build(self, cells: dict[str, np.ndarray]) -> Future[Batch]:
        """Find the rows of a micro-batch's cells, and have a gatherer build the batch."""
        parts = [
            self._caches[segment].locate_cells(positions)
            for segment, positions in cells.items()
            if len(positions)
        ]
        return self._gatherers.submit(self._build_batch, parts)

    def _build_batch(self, parts: list[BatchPart]) -> Batch:
        return assemble_batch(self.modalities, parts, self._buffers, self.form)
