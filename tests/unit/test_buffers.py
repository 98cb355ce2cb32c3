"""Memory of batches is used again once nobody can read it any more, and never before."""

import gc
from pathlib import Path

import numpy as np
import pytest
import torch

from clue_dist.data.assembly import BatchPart, CountsForm, assemble_batch
from clue_dist.data.batch import SparseCounts
from clue_dist.data.buffers import BufferPool
from clue_dist.data.loader import Loader
from clue_dist.data.plan import CellPlan
from clue_dist.store.rows import CodedBlocks, CsrRows, LocatedRows, code_rows
from tests.stores import make_store


def test_memory_is_lent_again_once_nobody_holds_it() -> None:
    pool = BufferPool()
    tensor = torch.from_numpy(pool.lend_array(90, np.float32)).reshape(9, 10)
    place, rows = tensor.data_ptr(), tensor[3:]
    del tensor
    assert pool.lend_array(10, np.float32).ctypes.data != place  # the rows keep all of it
    del rows
    held = [pool.lend_array(100, np.float32), pool.lend_array(100, np.float32)]  # 1/8 was spare
    assert place in {array.ctypes.data for array in held}
    assert pool.lend_array(10, np.int32).dtype == np.int32
    assert pool.lend_array(0, np.int32).shape == (0,)


def test_every_view_of_an_array_keeps_its_memory() -> None:
    """Also views of views, which NumPy lets refer to the array at their origin."""
    pool = BufferPool()
    for view in (
        lambda array: array[2:5],
        lambda array: array.reshape(4, 5)[1:].T,
        lambda array: array.view(np.int32)[::2],
        lambda array: torch.from_numpy(array[3:].reshape(-1, 1))[2],
        lambda array: memoryview(array[:3]),
    ):
        array = pool.lend_array(20, np.float32)
        place, kept = array.ctypes.data, view(array)
        del array
        assert pool.lend_array(20, np.float32).ctypes.data != place
        del kept
        assert pool.lend_array(20, np.float32).ctypes.data == place


def test_memory_comes_back_from_garbage_collection_in_the_middle_of_lending() -> None:
    pool = BufferPool()
    places = []
    for _ in range(100):
        array = pool.lend_array(1000, np.float32)
        places.append(array.ctypes.data)
        cycle = [array]
        cycle.append(cycle)  # only the collector ends it
        del array, cycle
        if len(places) % 10 == 0:
            gc.collect()
    assert len(set(places)) <= 20


@pytest.mark.parametrize("form", ["sparse", "dense"])
def test_a_kept_batch_keeps_its_values(tmp_path: Path, form: CountsForm) -> None:
    store = make_store(
        tmp_path / "s.zarr", cells={"rna+adt": 203, "rna": 70}, features={"rna": 40, "adt": 6}
    )
    sizes = {name: reader.n_cells for name, reader in store.segments.items()}
    plan = CellPlan(5, sizes, {"rna+adt": 16, "rna": 8}, 4, 2, 16)

    def tensors(counts: SparseCounts | torch.Tensor) -> list[torch.Tensor]:
        if isinstance(counts, torch.Tensor):
            return [counts]
        return [counts.indptr, counts.indices, counts.values]

    kept = []
    with Loader(store, plan, form=form) as loader:
        for step in range(60):
            batch = next(loader)
            if step % 3 == 0:
                held = tensors(batch.modalities["rna"].counts)
                held = [t[1:] for t in held] if step % 2 else held  # parts of tensors, too
                kept.append((held, [t.clone() for t in held]))
    for held, want in kept:
        assert all(torch.equal(a, b) for a, b in zip(held, want, strict=True))


def test_batches_of_binary_counts_share_their_ones() -> None:
    rows = code_rows(
        CsrRows(np.array([0, 2, 3]), np.array([1, 4, 0], np.int32), np.ones(3, np.float32), 5), 0
    )
    located = LocatedRows(
        CodedBlocks(
            rows.codes[None], rows.rest[None], rows.lengths[None], rows.compute_starts()[None]
        ),
        np.zeros(2, np.int64),
        np.array([1, 0]),
        5,
        rows.bits,
    )
    pool = BufferPool()
    batches = [
        assemble_batch(["atac"], [BatchPart({"atac": located}, np.zeros(2, np.int32))], pool)
        for _ in range(2)
    ]
    one, two = (batch.modalities["atac"].counts for batch in batches)
    assert isinstance(one, SparseCounts)
    assert isinstance(two, SparseCounts)
    assert one.values.tolist() == [1, 1, 1]
    assert one.indices.tolist() == [0, 1, 4]
    assert one.indptr.tolist() == [0, 1, 3]
    assert one.values.data_ptr() == two.values.data_ptr()
    assert one.indices.data_ptr() != two.indices.data_ptr()
    one.values.log1p_()
    with pytest.raises(RuntimeError, match="were written to"):
        pool.share_ones(3)


def test_ones_are_shared_in_inference_mode_too() -> None:
    pool = BufferPool()
    with torch.inference_mode():
        ones = [pool.share_ones(3), pool.share_ones(2), pool.share_ones(5)]
    assert [one.tolist() for one in ones] == [[1] * 3, [1] * 2, [1] * 5]
    ones[2].log1p_()
    with pytest.raises(RuntimeError, match="were written to"):
        pool.share_ones(3)
