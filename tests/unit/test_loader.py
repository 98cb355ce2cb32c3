"""What the loader serves is what the plan asked for, on any number of ranks, and an error is never swallowed."""

import itertools
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from clue_dist.data import batch as loaders
from clue_dist.data.batch import Batch, Part, SparseCounts, assemble
from clue_dist.data.buffers import Buffers
from clue_dist.data.loader import Loader
from clue_dist.data.plan import Plan
from clue_dist.errors import StoreError
from clue_dist.store.reader import Store
from clue_dist.store.rows import Blocks, Csr, Located, coded
from tests.stores import make_store


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return make_store(
        tmp_path / "s.zarr",
        cells={"rna+adt": 203, "rna": 70, "adt": 33},
        features={"rna": 40, "adt": 6},
        block_cells=16,
    )


def plan_of(store: Store, window: int = 2) -> Plan:
    sizes = {s: r.n_cells for s, r in store.strata.items()}
    return Plan(5, sizes, {"rna+adt": 16, "rna": 8, "adt": 8}, 4, window, 16)


def dense(batch: Batch, modality: str) -> np.ndarray:
    """Rows of the modality in batch order, NaN where a cell lacks it."""
    observed = batch.modalities[modality]
    c = observed.counts
    if isinstance(c, SparseCounts):
        values = torch.sparse_csr_tensor(c.indptr, c.indices, c.values, (len(observed.rows), c.n_features)).to_dense()
    else:
        values = c
    out = np.full((batch.n_cells, values.shape[1]), np.nan)
    out[observed.rows.numpy()] = values.numpy()
    return out


def expected(store: Store, plan: Plan, step: int, modality: str) -> np.ndarray:
    parts = []
    for name, reader in store.strata.items():
        cells = plan.cells(step, name)
        if modality not in reader.modalities:
            parts.append(np.full((len(cells), store.manifest.modalities[modality].n_features), np.nan))
            continue
        rows = reader.rows(modality, cells)
        parts.append(rows if isinstance(rows, np.ndarray) else rows.scipy().toarray())
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


def test_dense_batches_hold_the_same_counts(store: Store) -> None:
    plan = plan_of(store)
    with Loader(store, plan, dense=True) as loader:
        for step in range(12):
            batch = next(loader)
            assert all(isinstance(o.counts, torch.Tensor) for o in batch.modalities.values())
            for m in ("rna", "adt"):
                np.testing.assert_array_equal(dense(batch, m), expected(store, plan, step, m))


def test_blocks_stay_while_a_slow_thread_gathers_from_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = make_store(tmp_path / "s.zarr", cells={"rna": 1600}, features={"rna": 40}, block_cells=16)
    plan = Plan(0, {"rna": 1600}, {"rna": 16}, 4, 1, 16)
    slow = np.random.default_rng(0)

    def assemble(*args: Any) -> Batch:
        time.sleep(0.004 * slow.random())
        return loaders.assemble(*args)

    monkeypatch.setattr("clue_dist.data.loader.assemble", assemble)
    with Loader(store, plan, first=7) as loader:
        assert loader._caches["rna"].slots < 100  # of as many blocks: they are replaced all the time
        for step in range(7, 250):
            np.testing.assert_array_equal(dense(next(loader), "rna"), expected(store, plan, step, "rna"))


def test_memory_is_used_again_once_nobody_holds_it() -> None:
    buffers = Buffers()
    tensor = torch.from_numpy(buffers.empty(90, np.float32)).reshape(9, 10)
    place, part = tensor.data_ptr(), tensor[3:]
    del tensor
    assert buffers.empty(10, np.float32).ctypes.data != place  # part of a tensor holds all of it
    del part
    held = [buffers.empty(100, np.float32), buffers.empty(100, np.float32)]  # there was some to spare
    assert place in {array.ctypes.data for array in held}
    assert buffers.empty(10, np.int32).dtype == np.int32


def test_batches_of_binary_counts_share_their_ones() -> None:
    rows = coded(Csr(np.array([0, 2, 3]), np.array([1, 4, 0], np.int32), np.ones(3, np.float32), 5), 0)
    located = Located(
        Blocks(rows.codes[None], rows.rest[None], rows.lengths[None], rows.starts()[None]),
        np.zeros(2, np.int64),
        np.array([1, 0]),
        5,
        rows.bits,
    )
    buffers = Buffers()
    batches = [assemble(["atac"], [Part({"atac": located}, np.zeros(2, np.int32))], buffers) for _ in range(2)]
    one, two = (batch.modalities["atac"].counts for batch in batches)
    assert isinstance(one, SparseCounts)
    assert isinstance(two, SparseCounts)
    assert one.values.tolist() == [1, 1, 1]
    assert one.indices.tolist() == [0, 1, 4]
    assert one.indptr.tolist() == [0, 1, 3]
    assert one.values.data_ptr() == two.values.data_ptr()
    assert one.indices.data_ptr() != two.indices.data_ptr()


def test_batch_codes_come_with_their_cells(store: Store) -> None:
    plan = plan_of(store)
    with Loader(store, plan) as loader:
        got = next(loader).batch_code.numpy()
    want = np.concatenate([r.obs_codes("batch", plan.cells(0, s)) for s, r in store.strata.items()])
    np.testing.assert_array_equal(got, want)


@pytest.mark.parametrize("world", [2, 4])
def test_ranks_together_hold_the_global_batch_in_the_same_composition(store: Store, world: int) -> None:
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


def test_a_damaged_chunk_raises_where_its_batch_was_due(store: Store) -> None:
    shard = store.root / "strata/rna/rna/codes/c/0/0"
    data = bytearray(shard.read_bytes())
    data[3] ^= 0x10
    shard.write_bytes(data)
    with Loader(Store(store.root), plan_of(store)) as loader, pytest.raises(StoreError, match="missing or damaged"):
        list(itertools.islice(loader, 40))


def test_closing_ends_the_thread_even_when_nobody_reads(store: Store) -> None:
    loader = Loader(store, plan_of(store), prefetch=1)
    loader.close()
    assert not loader._thread.is_alive()
