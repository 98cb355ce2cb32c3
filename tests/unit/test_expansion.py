"""Rows that a GPU expands are those that the host decodes; without a GPU they are interpreted."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import scipy.sparse as sp
import torch
from torch import Tensor

from clue_dist.config import Config
from clue_dist.data.assembly import BatchPart, CountsForm, assemble_batch
from clue_dist.data.batch import Batch, CodedCounts, SparseCounts
from clue_dist.data.device_batches import BatchPacker, DeviceBatches
from clue_dist.data.loader import Loader
from clue_dist.errors import StoreError
from clue_dist.ranks import Ranks
from clue_dist.store.kernels import find_fault
from clue_dist.store.rows import COUNT_BITS, CodedBlocks, CsrRows, LocatedRows, code_rows
from clue_dist.train import trainer
from tests.benchmarks.gpu.parity import compare_expansion
from tests.benchmarks.gpu.training import _make_batches
from tests.benchmarks.gpu.workload import TINY, code_batch
from tests.stores import make_store
from tests.unit.test_device_batches import are_equal, make_plan

pytest.importorskip("triton", reason="Triton, which comes with torch for CUDA, is not installed")

from clue_dist.data.expansion import BLOCK, expand_counts

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
N_FEATURES = 4 * BLOCK


def draw_dense(largest: int, seed: int = 0) -> np.ndarray:
    """Six cells: one is empty, some fill several blocks, with far gaps and large counts."""
    rng = np.random.default_rng(seed)
    dense = rng.integers(1, 6, (6, N_FEATURES)) * (rng.random((6, N_FEATURES)) < 0.3)
    dense[0], dense[1] = 0, 1
    dense[2, 3:-1] = 0
    dense[3, ::50] = largest
    dense[4, ::2] = largest
    dense[5, :] = 0
    dense[5, [0, -1]] = 1, largest
    return np.minimum(dense, largest)


def locate_rows(dense: np.ndarray, bits: int) -> LocatedRows:
    """Rows in one block, in another order."""
    x = sp.csr_matrix(dense)
    rows = code_rows(CsrRows(x.indptr, x.indices, x.data, x.shape[1]), bits)
    parts = rows.codes, rows.rest, rows.lengths, rows.compute_starts()
    order = np.random.default_rng(1).permutation(len(dense))
    blocks = CodedBlocks(*(part[None] for part in parts))
    return LocatedRows(blocks, np.zeros(len(dense), np.int32), order, dense.shape[1], bits)


def assemble(parts: Sequence[LocatedRows], form: CountsForm) -> Batch:
    codes = [np.zeros(len(part.row), np.int32) for part in parts]
    rows = [BatchPart({"rna": part}, code) for part, code in zip(parts, codes, strict=True)]
    return assemble_batch(["rna"], rows, form=form)


@pytest.mark.parametrize(
    ("bits", "largest"), [(0, 1), (COUNT_BITS, 9), (COUNT_BITS, 600), (COUNT_BITS, 70_000)]
)
def test_expanded_rows_are_those_that_the_host_decodes(bits: int, largest: int) -> None:
    """Numbers that do not fit a code take one, two or four bytes."""
    rows = locate_rows(draw_dense(largest), bits)
    packed = BatchPacker(DEVICE).copy_batch(assemble([rows], "coded"))
    assert are_equal(packed.to("cpu"), assemble([rows], "sparse"))


def test_segments_of_other_codes_meet_in_a_batch() -> None:
    """One is binary, and its numbers are of another width than those of the other."""
    parts = [locate_rows(draw_dense(1), 0), locate_rows(draw_dense(70_000, seed=2), COUNT_BITS)]
    packed = BatchPacker(DEVICE).copy_batch(assemble(parts, "coded"))
    assert are_equal(packed.to("cpu"), assemble(parts, "sparse"))


def test_coded_profiles_are_not_taken_for_counts() -> None:
    batch = assemble([locate_rows(draw_dense(9), COUNT_BITS)], "coded")
    with pytest.raises(AssertionError, match="`device_batches` expands these first"):
        _ = batch.modalities["rna"].counts


def test_coded_batches_of_a_loader_are_its_batches(tmp_path: Path) -> None:
    """Dense modalities, which have no code, are among them."""
    features = {"rna": 300, "adt": 6, "atac": 500}
    cells = {"rna+adt": 90, "rna": 40, "atac": 20}
    store = make_store(tmp_path / "s.zarr", cells=cells, features=features)
    plan = replace(make_plan(store), stratum_shares={"rna+adt": 8, "rna": 4, "atac": 4})
    with Loader(store, plan) as loader:
        wanted = [next(loader).map_tensors(Tensor.clone) for _ in range(3)]
    with DeviceBatches(Loader(store, plan, form="coded"), DEVICE) as batches:
        assert all(are_equal(next(batches).to("cpu"), batch) for batch in wanted)


def test_a_nonzero_crosses_as_little_more_than_a_byte() -> None:
    """Of droplets, in which few counts and gaps are large; as CSR one takes eight bytes."""
    dense = np.random.default_rng(0).poisson(0.1, (64, 20_000))
    sizes = {}
    for form in ("sparse", "coded"):
        batch = assemble([locate_rows(dense, COUNT_BITS)], form)
        copied = BatchPacker(torch.device("cpu")).copy_batch(batch).observed.untyped_storage()
        sizes[form] = copied.nbytes() / np.count_nonzero(dense)
    assert sizes["sparse"] > 8
    assert sizes["coded"] < 1.1


def test_the_benchmark_copies_and_expands_what_it_would_train_on() -> None:
    shape = replace(TINY, n_cells=8)
    packer = BatchPacker(DEVICE)
    for batch in _make_batches(shape, coded=False):
        assert are_equal(packer.copy_batch(code_batch(batch)).to("cpu"), batch)
    for part in compare_expansion(shape, DEVICE).values():
        assert part["entries that differ"] == 0
        assert 1 < part["bytes a non-zero"] < 4  # the starts of short rows count


def spoil(counts: CodedCounts, rng: np.random.Generator) -> CodedCounts:
    """Change one number of codes or of rest, to anything."""
    name = rng.choice(["codes", "rest"])
    array = getattr(counts, name).numpy().copy()
    array[rng.integers(len(array))] = rng.integers(2 ** (8 * array.itemsize))
    return replace(counts, **{name: torch.from_numpy(array)})


def lay_rows(counts: CodedCounts) -> LocatedRows | None:
    """The rows with lengths, which a store has, too; None: none fit what is coded."""
    starts = counts.starts.numpy().astype(np.int64)
    codes, rest, bits = counts.codes.numpy(), counts.rest.numpy(), int(counts.bits[0])
    lengths = np.zeros((len(counts.bits), 3), np.uint32)
    for row, ((start, first_rest), (end, last_rest)) in enumerate(pairwise(starts)):
        n_far = int((codes[start:end] >> bits == (256 >> bits) - 1).sum())
        n_high = (last_rest - first_rest - n_far) // 2
        if n_far + 2 * n_high != last_rest - first_rest or n_high < 0:
            return None
        lengths[row] = end - start, n_far, n_high
    blocks = CodedBlocks(codes[None], rest[None], lengths[None], starts[None])
    n = len(lengths)
    return LocatedRows(blocks, np.zeros(n, np.int32), np.arange(n), counts.n_features, bits)


def decode_on_host(rows: LocatedRows) -> SparseCounts | None:
    """Decode with the kernels of the host; None: they refuse a row."""
    try:
        found = rows.to_csr()
    except StoreError:
        return None
    arrays = found.indptr.astype(np.int32), found.indices, found.values
    return SparseCounts(*map(torch.from_numpy, arrays), rows.n_features)


def has_fault(rows: LocatedRows) -> bool:
    """Whether `python -m data_prep check` would find a row at fault."""
    blocks = rows.blocks
    parts = blocks.codes, blocks.rest, blocks.lengths, blocks.starts
    return bool(find_fault(*parts, rows.bits, rows.n_features))


def test_what_the_host_refuses_is_refused_and_all_that_is_not_is_the_same() -> None:
    """A GPU, which has no lengths, counts the codes of high counts, as a check does."""
    rng = np.random.default_rng(0)
    batch = assemble([locate_rows(draw_dense(70_000)[3:], COUNT_BITS)], "coded")
    whole, n_refused = batch.modalities["rna"].profiles, 0
    assert isinstance(whole, CodedCounts)
    for _ in range(30):
        spoiled = spoil(whole, rng)
        rows = lay_rows(spoiled)
        wanted = None if rows is None else decode_on_host(rows)
        try:
            found = expand_counts(spoiled)
        except StoreError:
            assert rows is None or wanted is None or has_fault(rows)
            n_refused += 1
            continue
        assert wanted is not None
        for name in ("indptr", "indices", "values"):
            assert torch.equal(getattr(found, name), getattr(wanted, name))
    assert 0 < n_refused < 30


def test_training_on_a_gpu_takes_coded_batches(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trainer, "DeviceBatches", lambda loader, device: (loader, device))
    store = make_store(tmp_path / "s.zarr", cells={"rna+adt": 90, "rna": 40})
    setup: Any = SimpleNamespace(store=store, plan=make_plan(store), config=Config())
    for device, coded in (("cuda", True), ("cpu", False)):
        opened: Any = trainer.Trainer(None, setup, Ranks(), torch.device(device)).open_loader(0)
        loader = opened[0] if coded else opened
        assert loader.form == ("coded" if coded else "sparse")
        loader.close()
