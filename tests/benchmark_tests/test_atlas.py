"""The benchmark of many cells: what it converts, what it reads, and when its bars are judged."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from clue_dist.store.manifest import Manifest
from clue_dist.store.reader import Store
from tests.benchmarks import cells
from tests.benchmarks.atlas import __main__ as atlas
from tests.benchmarks.atlas import probe
from tests.benchmarks.atlas.__main__ import Atlas
from tests.benchmarks.atlas.enlarge import enlarge_store
from tests.benchmarks.stores import plan_evenly
from tests.stores import make_store


def plan_atlas(*words: str) -> Atlas:
    return Atlas(["--json", "x.json", *words])


def test_every_size_is_made_of_the_same_lanes_half_of_them_paired(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cells, "find_file", lambda shape, work: Path(f"{shape.name}.h5ad"))
    plan = plan_atlas("--quick")
    words = map(str, plan.list_conversion(4 * atlas.QUICK_LANE, tmp_path))
    lanes = [word for word in words if word.startswith("lane")]
    both = [[f"lane00{i}:rna=rna.h5ad", f"lane00{i}:adt=adt.h5ad"] for i in range(4)]
    assert lanes == [both[0][0], *both[1], both[2][0], *both[3]]
    with pytest.raises(ValueError, match="no multiple"):
        plan.list_conversion(atlas.QUICK_LANE + 1, tmp_path)


def test_the_manifest_of_many_cells_is_a_manifest(tmp_path: Path) -> None:
    store = make_store(tmp_path / "s.zarr")
    many = probe.enlarge_manifest(store.manifest, 15_000)
    assert many.n_cells == 15_000
    assert len(many.shards) > 20 * len(store.manifest.shards)
    many.write(tmp_path)
    assert Manifest.read(tmp_path).n_cells == 15_000


def test_an_enlarged_store_has_the_shards_of_the_small_one_over_and_over(tmp_path: Path) -> None:
    cells = {"rna+adt": 600, "rna": 500}
    small = make_store(tmp_path / "s.zarr", cells=cells)
    enlarge_store(tmp_path / "s.zarr", 3_300, tmp_path / "many.zarr")
    many = Store(tmp_path / "many.zarr")
    assert many.manifest.n_cells == 3_300
    assert many.manifest.lists_every_shard()
    positions = np.arange(1_500)
    for name, n_cells in cells.items():
        shard_cells = small.manifest.strata[name].shard_blocks * 16
        origins = positions % (n_cells // shard_cells * shard_cells)
        found, expected = (
            store.segments[name].read_rows("rna", rows)
            for store, rows in ((many, positions), (small, origins))
        )
        for field in ("indptr", "indices", "values"):
            np.testing.assert_array_equal(getattr(found, field), getattr(expected, field))


def test_the_plan_takes_as_many_cells_of_every_stratum(tmp_path: Path) -> None:
    store = make_store(tmp_path / "s.zarr", cells={"rna+adt": 200, "rna": 150})
    plan = plan_evenly(store, 64, probe.LANES, probe.WINDOW_BLOCKS)
    assert plan.stratum_shares == {"rna+adt": 32, "rna": 32}
    probe.read_first(store, plan, probe.FAR)
    assert len(plan.select_cells(probe.FAR, "rna")) == 32


def test_any_number_of_cells_is_trained_on_for_as_many_steps(tmp_path: Path) -> None:
    for size in (1_000_000, 10_000_000):
        words = plan_atlas().list_training(size, tmp_path / "s.zarr", tmp_path / "run")
        (epochs,) = (float(word.split("=")[1]) for word in words if "epochs" in str(word))
        assert epochs * size == pytest.approx(atlas.STEPS * atlas.BATCH)


def make_record(method: str, size: int, repeat: int) -> dict[str, Any]:
    values = dict.fromkeys(("cells_per_s", "anon_mib", *atlas.SHORT, *atlas.ABSOLUTE), 1.0)
    return {"method": method, "data_set": str(size), "fold": repeat} | values


def test_bars_compare_the_largest_with_the_smallest_once_all_is_measured() -> None:
    plan = plan_atlas("--cells", "2000000", "1000000", "--repeats", "2")
    records = [make_record(m, n, r) for m in atlas.METHODS for n in plan.args.cells for r in (0, 1)]
    n_bars = 13 + 1 + len(atlas.ABSOLUTE)
    assert [bar["holds"] for bar in plan.judge(records)] == [True] * n_bars
    slow = [r | {"cells_per_s": 0.8} if r["data_set"] == "2000000" else r for r in records]
    missed = [bar["name"] for bar in plan.judge(slow) if not bar["holds"]]
    than = "of 2,000,000 cells, times that of 1,000,000"
    assert missed == [f"{method}: cells/s {than}" for method in atlas.METHODS]
    heavy = [r | {"anon_mib": 1000.0, "open_ms": 200.0} for r in records]
    missed = [bar["name"] for bar in plan.judge(heavy) if not bar["holds"]]
    assert missed == [plan.bars["gigabyte"].name, plan.bars["open_ms"].name]
    assert plan.tabulate(records).count("1000000") == len(atlas.METHODS)


def test_the_worst_of_the_larger_sizes_counts() -> None:
    plan = plan_atlas("--cells", "1000000", "2000000", "4000000", "--repeats", "1")
    records = [make_record(m, n, 0) for m in atlas.METHODS for n in plan.args.cells]
    worse = {"cells_per_s": 0.5, "anon_mib": 1.5}
    bad = [r | worse if r["data_set"] == "2000000" else r for r in records]
    assert [bar["value"] for bar in plan.judge(bad)][:2] == [0.5, 1.5]
    assert [bar["holds"] for bar in plan.judge(records[1:])][:2] == [None, None]
