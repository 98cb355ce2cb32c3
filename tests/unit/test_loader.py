"""The loader serves what the plan asks for, on any number of ranks, and swallows no error."""

import itertools
import threading
import time
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from clue_dist.data import loader as loading
from clue_dist.data.assembly import assemble_batch
from clue_dist.data.batch import Batch, SparseCounts
from clue_dist.data.loader import (
    HELD_STRETCHES,
    STRETCH_BATCHES,
    BlockCache,
    Loader,
    count_cache_slots,
)
from clue_dist.data.plan import CellPlan
from clue_dist.errors import ConfigError, StoreError
from clue_dist.store.block_pool import BlockPool, BlockRead
from clue_dist.store.reader import Store
from clue_dist.store.rows import CsrRows
from tests.stores import make_store


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return make_store(
        tmp_path / "s.zarr",
        cells={"rna+adt": 203, "rna": 70, "adt": 33},
        features={"rna": 40, "adt": 6},
        block_cells=16,
    )


def plan_of(store: Store, window: int = 2) -> CellPlan:
    sizes = {s: r.n_cells for s, r in store.segments.items()}
    return CellPlan(5, sizes, {"rna+adt": 16, "rna": 8, "adt": 8}, 4, window, 16)


def dense(batch: Batch, modality: str) -> np.ndarray:
    """Rows of the modality in batch order, NaN where a cell lacks it."""
    observed = batch.modalities[modality]
    c = observed.counts
    if isinstance(c, SparseCounts):
        values = torch.sparse_csr_tensor(
            c.indptr, c.indices, c.values, (len(observed.rows), c.n_features)
        ).to_dense()
    else:
        values = c
    out = np.full((batch.n_cells, values.shape[1]), np.nan)
    out[observed.rows.numpy()] = values.numpy()
    return out


def expected(store: Store, plan: CellPlan, step: int, modality: str) -> np.ndarray:
    parts = []
    for name, reader in store.segments.items():
        cells = plan.select_cells(step, name)
        if modality not in reader.modalities:
            parts.append(
                np.full((len(cells), store.manifest.modalities[modality].n_features), np.nan)
            )
            continue
        rows = reader.read_rows(modality, cells)
        parts.append(rows if isinstance(rows, np.ndarray) else rows.to_scipy().toarray())
    return np.concatenate(parts)


def test_batches_hold_the_planned_cells(store: Store) -> None:
    plan = plan_of(store)
    with Loader(store, plan) as loader:
        for step in range(40):  # several passes over every stratum
            batch = next(loader)
            for m in ("rna", "adt"):
                np.testing.assert_array_equal(dense(batch, m), expected(store, plan, step, m))
            np.testing.assert_array_equal(
                batch.observed.numpy(), np.repeat([[1, 1], [1, 0], [0, 1]], [16, 8, 8], 0) == 1
            )


def test_lengths_are_the_numbers_of_non_zeros(store: Store) -> None:
    reader = store.segments["rna+adt"]
    rows = reader.read_rows("rna", np.arange(reader.n_cells))
    assert isinstance(rows, CsrRows)
    lengths = reader.read_lengths("rna", np.arange(reader.n_blocks))[..., 0].ravel()
    assert lengths[: reader.n_cells].tolist() == np.diff(rows.indptr).tolist()
    assert not lengths[reader.n_cells :].any()


def test_dense_batches_hold_the_same_counts(store: Store) -> None:
    plan = plan_of(store)
    with Loader(store, plan, form="dense") as loader:
        for step in range(12):
            batch = next(loader)
            assert all(isinstance(o.counts, torch.Tensor) for o in batch.modalities.values())
            for m in ("rna", "adt"):
                np.testing.assert_array_equal(dense(batch, m), expected(store, plan, step, m))


def test_blocks_stay_while_a_slow_thread_gathers_from_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = make_store(
        tmp_path / "s.zarr", cells={"rna": 1600}, features={"rna": 40}, block_cells=16
    )
    plan = CellPlan(0, {"rna": 1600}, {"rna": 16}, 4, 1, 16)
    slow = np.random.default_rng(0)

    def assemble(*args: Any) -> Batch:
        time.sleep(0.004 * slow.random())
        return assemble_batch(*args)

    monkeypatch.setattr("clue_dist.data.loader.assemble_batch", assemble)
    with Loader(store, plan, first=7) as loader:
        # There are 100 blocks, so that they are replaced all the time.
        assert loader._caches["rna"].slots < 100
        for step in range(7, 250):
            np.testing.assert_array_equal(
                dense(next(loader), "rna"), expected(store, plan, step, "rna")
            )


def test_batch_codes_come_with_their_cells(store: Store) -> None:
    plan = plan_of(store)
    with Loader(store, plan) as loader:
        codes = next(loader).batch_code.numpy()
    want = np.concatenate(
        [r.read_codes("batch", plan.select_cells(0, s)) for s, r in store.segments.items()]
    )
    np.testing.assert_array_equal(codes, want)


@pytest.mark.parametrize("world", [2, 4])
def test_ranks_together_hold_the_global_batch_in_the_same_composition(
    store: Store, world: int
) -> None:
    plan = plan_of(store)
    for first in (0, 37):
        batches = []
        for rank in range(world):
            with Loader(store, plan, rank=rank, world=world, first=first) as loader:
                batches.append(next(loader))
        assert all(torch.equal(b.observed, batches[0].observed) for b in batches)
        together = np.concatenate([dense(b, "rna") for b in batches])
        want = expected(store, plan, first, "rna")
        order = lambda x: x[np.lexsort(np.nan_to_num(x, nan=-1).T)]  # noqa: E731
        np.testing.assert_array_equal(order(together), order(want))


def test_a_damaged_block_raises_where_its_batch_was_due_and_is_named(tmp_path: Path) -> None:
    """And ever after; it was read together with others, in which nothing is wrong."""
    store = make_store(
        tmp_path / "s.zarr", cells={"rna": 1600}, features={"rna": 40}, block_cells=16
    )
    plan = CellPlan(0, {"rna": 1600}, {"rna": 16}, 4, 1, 16)
    due = next(step for step in itertools.count(13) if 0 in plan.select_cells(step, "rna") // 16)
    assert due > STRETCH_BATCHES
    shard = store.root / "strata/rna/rna/codes/c/0/0"
    data = bytearray(shard.read_bytes())
    data[3] ^= 0x10  # of block 0, the first one in the shard
    shard.write_bytes(data)
    with Loader(Store(store.root), plan, first=13) as loader:
        for step in range(13, due):
            np.testing.assert_array_equal(
                dense(next(loader), "rna"), expected(store, plan, step, "rna")
            )
        for _ in range(2):
            with pytest.raises(StoreError, match=r"damaged(.|\n)*blocks 0 \(cells 0 to 15\)"):
                next(loader)


def test_after_an_error_while_a_batch_is_built_no_other_is_served(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Batches behind it are built by then: one who caught the error would miss its cells."""
    calls, real = itertools.count(), loading.assemble_batch

    def third(*args: Any) -> Any:
        if next(calls) == 2:
            raise MemoryError("no room")
        return real(*args)

    monkeypatch.setattr(loading, "assemble_batch", third)
    monkeypatch.setattr(loading, "GATHERERS", 1)
    with Loader(store, plan_of(store)) as loader:
        next(loader), next(loader)
        for _ in range(5):
            with pytest.raises(MemoryError, match="no room"):
                next(loader)


def test_an_interrupted_wait_leaves_no_batch_out(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan, real = plan_of(store), Future.result

    def interrupted(future: Future[Any], timeout: float | None = None) -> Any:
        if threading.current_thread() is not threading.main_thread():
            return real(future, timeout)
        monkeypatch.undo()
        raise KeyboardInterrupt

    with Loader(store, plan) as loader:
        next(loader)
        monkeypatch.setattr(Future, "result", interrupted)
        with pytest.raises(KeyboardInterrupt):
            next(loader)
        np.testing.assert_array_equal(dense(next(loader), "rna"), expected(store, plan, 1, "rna"))


def test_a_closed_loader_has_no_more_batches(store: Store) -> None:
    loader = Loader(store, plan_of(store))
    next(loader)
    loader.close()
    assert list(loader) == []


def test_closing_waits_for_what_is_being_read(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A thread of TensorStore that reads on while the interpreter ends would abort the process."""
    slow: list[Future[None]] = []

    def start(pool: BlockPool, blocks: np.ndarray, slots: np.ndarray) -> BlockRead:
        reading = real(pool, blocks, slots)
        slow.append(Future())
        threading.Timer(0.2, slow[-1].set_result, [None]).start()
        return replace(reading, futures=reading.futures | {"slow": slow[-1]})

    real = BlockPool.start_read
    monkeypatch.setattr(BlockPool, "start_read", start)
    with Loader(store, plan_of(store)) as loader:
        next(loader)
    assert len(slow) > 2
    assert all(future.done() for future in slow)


def test_closing_wakes_who_waits_for_a_batch(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    reading = threading.Event()

    def stuck(*_: Any) -> None:
        reading.set()
        time.sleep(0.5)

    monkeypatch.setattr(BlockCache, "prefetch_blocks", stuck)
    loader = Loader(store, plan_of(store))
    with ThreadPoolExecutor(1) as other:
        waiting = other.submit(list, loader)
        assert reading.wait(10)
        loader.close()
        assert waiting.result(10) == []


def test_ranks_that_do_not_divide_the_lanes_are_refused(store: Store) -> None:
    with pytest.raises(ConfigError, match=r"4 % 3 = 1"):
        Loader(store, plan_of(store), world=3)


@st.composite
def plans(draw: st.DrawFn) -> tuple[CellPlan, int]:
    """A stratum of one to three segments, each of a part of a span or of many spans; any ranks."""
    lanes, window, size = (
        draw(st.sampled_from(sizes)) for sizes in ((1, 2, 4, 16), (1, 2, 8), (4, 16))
    )
    span = lanes * window * size
    cells = {
        f"s.{i}" if i > 1 else "s": draw(st.integers(1, 5 * span))
        for i in range(1, draw(st.integers(2, 4)))
    }
    share, turn = draw(st.integers(0, 9)), draw(st.sampled_from([0.0, 0.1, 0.5, 0.9]))
    turns = {"s": turn, "other": 1 - turn} if turn else {}
    shares = {"s": lanes * (share if turn else max(share, 1))}
    plan = CellPlan(draw(st.integers(0, 99)), cells, shares, lanes, window, size, turns)
    return plan, draw(st.sampled_from([w for w in (1, 2, 4, 16) if lanes % w == 0]))


@pytest.mark.slow
@given(plans(), st.integers(0, 10**6))
@settings(max_examples=200, deadline=None)
def test_no_rank_needs_more_blocks_than_it_has_slots_for(
    chosen: tuple[CellPlan, int], first: int
) -> None:
    plan, world = chosen
    for segment in plan.segments:
        needed: set[int] = set()
        for step in range(first, first + HELD_STRETCHES * STRETCH_BATCHES):
            needed |= set((plan.select_cells(step, segment)[::world] // plan.block_cells).tolist())
        assert len(needed) <= count_cache_slots(plan, segment, world)


@pytest.mark.parametrize("world", [1, 2, 4])
def test_a_rank_has_slots_for_the_spans_that_it_reads_and_one_end_of_a_pass(world: int) -> None:
    batch, span_blocks, block_cells = 16, 8, 16  # of four lanes and windows of two blocks
    spans = 1000
    plan = CellPlan(0, {"s": spans * span_blocks * block_cells + 20}, {"s": batch}, 4, 2, 16)
    held = HELD_STRETCHES * STRETCH_BATCHES * batch / (span_blocks * block_cells)
    assert held.is_integer()
    rest = 2  # blocks that hold the last 20 cells
    expected = (held + 2) * span_blocks // world + rest
    assert count_cache_slots(plan, "s", world) == expected


@pytest.mark.parametrize("world", [1, 8])
def test_cells_added_a_hundred_times_take_hardly_more_memory(world: int) -> None:
    def slots(segments: int) -> int:
        cells = {f"s.{i}" if i > 1 else "s": 10**7 // segments for i in range(1, segments + 1)}
        plan = CellPlan(0, cells, {"s": 512}, 8, 16, 64)
        return sum(count_cache_slots(plan, segment, world) for segment in plan.segments)

    assert slots(10) < 2 * slots(1)
    assert slots(100) < 6 * slots(1)


def test_what_sixteen_ranks_are_served_while_blocks_are_replaced(tmp_path: Path) -> None:
    """A pass is little longer than a span, so that ends of passes follow each other closely.

    A rank may need all blocks of such an end.
    """
    store = make_store(
        tmp_path / "s.zarr", cells={"adt": 3941}, features={"adt": 3}, block_cells=64
    )
    plan = CellPlan(0, {"adt": 3941}, {"adt": 144}, 16, 1, 64)
    known = store.segments["adt"].read_rows("adt", np.arange(3941))
    assert isinstance(known, np.ndarray)
    for rank in (0, 7):
        with Loader(store, plan, rank=rank, world=16) as loader:
            for step in range(200):
                counts = next(loader).modalities["adt"].counts
                np.testing.assert_array_equal(
                    counts, known[plan.select_cells(step, "adt")[rank::16]]
                )


def test_too_few_slots_are_an_error_not_other_cells(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = make_store(
        tmp_path / "s.zarr", cells={"rna": 1600}, features={"rna": 40}, block_cells=16
    )
    plan = CellPlan(0, {"rna": 1600}, {"rna": 16}, 4, 1, 16)
    monkeypatch.setattr("clue_dist.data.loader.count_cache_slots", lambda *_: 12)
    with Loader(store, plan) as loader, pytest.raises(RuntimeError, match="12 slots, too few"):
        list(itertools.islice(loader, 50))


def test_closing_ends_the_thread_even_when_nobody_reads(store: Store) -> None:
    loader = Loader(store, plan_of(store), prefetch=1)
    loader.close()
    assert not loader._thread.is_alive()
