"""Batches packed for one copy to a device are the loader's own, and nothing overwrites them."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest
import torch
from torch import Tensor

from clue_dist.data.batch import Batch
from clue_dist.data.device_batches import BatchPacker, DeviceBatches
from clue_dist.data.loader import Loader
from clue_dist.data.plan import CellPlan
from clue_dist.errors import StoreError
from clue_dist.store.reader import Store
from tests.stores import make_store

CPU = torch.device("cpu")


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return make_store(
        tmp_path / "s.zarr", cells={"rna+adt": 90, "rna": 40}, features={"rna": 40, "adt": 6}
    )


def make_plan(store: Store) -> CellPlan:
    sizes = {name: reader.n_cells for name, reader in store.segments.items()}
    return CellPlan(5, sizes, {"rna+adt": 16, "rna": 8}, 4, 2, 16)


def are_equal(one: Batch, other: Batch) -> bool:
    pairs = zip(one.list_tensors(), other.list_tensors(), strict=True)
    return all(a.dtype == b.dtype and torch.equal(a, b) for a, b in pairs)


def test_batches_are_those_of_the_loader_also_when_they_are_kept(store: Store) -> None:
    plan = make_plan(store)
    with Loader(store, plan) as loader:
        wanted = [next(loader).map_tensors(Tensor.clone) for _ in range(6)]
    with DeviceBatches(Loader(store, plan), CPU) as batches:
        kept = [next(batches) for _ in range(6)]
        assert batches.waited_seconds > 0
    assert all(are_equal(*pair) for pair in zip(kept, wanted, strict=True))
    assert kept[0].modalities["rna"].counts.n_features == 40  # type: ignore[union-attr]


def test_a_batch_is_one_piece_of_memory_and_the_buffer_is_used_again(store: Store) -> None:
    packer = BatchPacker(CPU)
    with Loader(store, make_plan(store)) as loader:
        places = []
        for _ in range(6):
            tensors = packer.copy_batch(next(loader)).list_tensors()
            assert len({t.untyped_storage().data_ptr() for t in tensors}) == 1
            assert tensors[0].untyped_storage().data_ptr() != packer._buffer.data_ptr()
            assert all(t.data_ptr() % 8 == 0 for t in tensors)
            places.append(packer._buffer.data_ptr())
    assert places[-1] == places[1]  # no memory is asked for once it is large enough


def test_closing_ends_a_wait_and_an_error_of_the_loader_is_raised(store: Store) -> None:
    with DeviceBatches(Loader(store, make_plan(store)), CPU) as batches:
        next(batches)
    with DeviceBatches(Loader(store, make_plan(store)), CPU) as batches:
        error = StoreError("damaged")
        batches.loader._build_batch = lambda _: (_ for _ in ()).throw(error)  # type: ignore
        with pytest.raises(StoreError):
            list(itertools.islice(batches, 50))
