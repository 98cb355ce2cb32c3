"""Segments of a stratum: cells that were added later are dealt and trained as those before."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from clue_dist.config import Config
from clue_dist.data.loader import Loader
from clue_dist.data.plan import CellPlan
from clue_dist.store.reader import Store
from clue_dist.train.setup import prepare_setup
from tests.unit.prep_helpers import (
    convert_files,
    make_anndata,
    make_counts,
    read_counts,
    write_h5mu,
)
from tests.unit.test_prep_append import append_files, write_cells


@pytest.fixture
def store(tmp_path: Path) -> Path:
    """A store of 300 cells, a third of which were added."""
    path = tmp_path / "s.zarr"
    convert_files(path, write_cells(tmp_path, slice(0, 200), "first"), block_cells=4)
    append_files(path, write_cells(tmp_path, slice(200, 300), "more"))
    return path


@pytest.mark.slow
@pytest.mark.parametrize("world", [1, 2, 4])
def test_segments_take_turns_and_every_pass_deals_each_cell_once(store: Path, world: int) -> None:
    after = Store(store)
    sizes = {name: reader.n_cells for name, reader in after.segments.items()}
    plan = CellPlan(0, sizes, {"rna": 8, "rna+adt": 16}, 4, 2, 4)
    assert plan.segments == ["rna", "rna.2", "rna+adt", "rna+adt.2"]
    dealt: dict[str, list[int]] = {name: [] for name in sizes}
    loaders = [Loader(after, plan, rank=rank, world=world) for rank in range(world)]
    try:
        for step in range(60):
            batches = [next(loader) for loader in loaders]
            assert [b.n_cells for b in batches] == [24 // world] * world
            for name in sizes:
                dealt[name] += plan.select_cells(step, name).tolist()
            # Proteins are dense: their rows have the order of the batch.
            for rank, batch in enumerate(batches):
                want = [
                    after.segments[s].read_rows("adt", plan.select_cells(step, s)[rank::world])
                    for s in ("rna+adt", "rna+adt.2")
                ]
                np.testing.assert_array_equal(
                    batch.modalities["adt"].counts.numpy(), np.concatenate(want)
                )
    finally:
        for loader in loaders:
            loader.close()
    for name, n in sizes.items():
        whole = len(dealt[name]) // n * n
        assert whole > 0
        assert (np.bincount(dealt[name][:whole], minlength=n) == whole // n).all()
    # A third of the cells has a third of the turns.
    assert abs(len(dealt["rna+adt.2"]) - 60 * 16 / 3) <= 4


@pytest.mark.parametrize("sizes", [(1, 10**7), (10**7, 1), (3, 5, 7), (10**9, 10**8, 10**3)])
def test_turns_add_up_at_any_step(sizes: tuple[int, ...]) -> None:
    names = ["s", *(f"s.{i}" for i in range(2, len(sizes) + 1))]
    plan = CellPlan(0, dict(zip(names, sizes, strict=True)), {"s": 64}, 8, 2, 4)
    for step in (0, 1, 2, 10, 999, 10**6, 10**9, 10**12):
        counts = [
            plan.count_dealt_cells(step + 1, name) - plan.count_dealt_cells(step, name)
            for name in names
        ]
        assert sum(counts) == 64
        assert all(n >= 0 and n % 8 == 0 for n in counts)
        for name, n in zip(names, sizes, strict=True):
            fair_share = step * 64 * n / sum(sizes)
            assert abs(plan.count_dealt_cells(step, name) - fair_share) <= 8 * len(sizes)


def test_training_treats_segments_as_one_stratum(tmp_path: Path, store: Path) -> None:
    data = {"batch_size": 32, "lanes": 4, "weights": {"rna": 1.0, "rna+adt": 3.0}}
    setup = prepare_setup(Config(store=str(store), run=str(tmp_path / "run"), data=data), 1)
    assert setup.plan.stratum_shares == {"rna": 8, "rna+adt": 24}
    assert all(setup.held_out_cells[name] for name in ("rna+adt", "rna+adt.2"))
    assert "stratum rna+adt: " in setup.format_summary()
    assert "in 2 segments" in setup.format_summary()
    assert setup.load_held_out_batch().n_cells == sum(setup.held_out_cells.values())


def test_segments_may_be_packed_differently(tmp_path: Path) -> None:
    """Peaks that were binary and are counted later, proteins that need two bytes later."""
    atac, adt = make_counts(200, 30, 3, "peak").clip(upper=1), make_counts(200, 8, 4, "p")
    atac[100:] *= 3
    adt[100:] *= 200
    for name, cells in (("one", slice(0, 100)), ("two", slice(100, 200))):
        write_h5mu(
            tmp_path / f"{name}.h5mu", atac=make_anndata(atac[cells]), adt=make_anndata(adt[cells])
        )
    convert_files(tmp_path / "s.zarr", str(tmp_path / "one.h5mu"))
    after = append_files(tmp_path / "s.zarr", str(tmp_path / "two.h5mu"))
    packed = [s.packed for s in after.manifest.strata.values()]
    assert [p["atac"].bits for p in packed] == [0, 2]
    assert [p["adt"].values for p in packed] == ["uint8", "uint16"]
    pd.testing.assert_frame_equal(
        read_counts(after, "atac").loc[atac.index], atac, check_dtype=False
    )
    pd.testing.assert_frame_equal(read_counts(after, "adt").loc[adt.index], adt, check_dtype=False)
    stratum = "atac+adt"
    plan = CellPlan(0, {n: r.n_cells for n, r in after.segments.items()}, {stratum: 16}, 4, 1, 64)
    with Loader(after, plan) as loader:
        for step in range(10):
            counts = next(loader).modalities["adt"].counts
            rows = [
                after.segments[s].read_rows("adt", plan.select_cells(step, s))
                for s in plan.segments
            ]
            np.testing.assert_array_equal(counts, np.concatenate(rows))  # type: ignore[arg-type]
