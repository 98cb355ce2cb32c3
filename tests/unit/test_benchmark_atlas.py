"""The benchmark of many cells: what it converts, what it reads, and when its bars are judged."""

from __future__ import annotations

from pathlib import Path

import pytest

from clue_dist.store.manifest import Manifest
from tests.benchmarks.atlas import __main__ as atlas
from tests.benchmarks.atlas import probe
from tests.stores import make_store


def test_every_size_is_made_of_the_same_lanes_half_of_them_paired(
    tmp_path: Path, monkeypatch
) -> None:
    monkeypatch.setattr(atlas.cells, "file_of", lambda shape, work: Path(f"{shape.name}.h5ad"))
    args = atlas.arguments(["--json", "x.json", "--quick"])
    words = list(map(str, atlas.command(4 * atlas.QUICK_LANE, tmp_path, args)))
    lanes = [word for word in words if word.startswith("lane")]
    assert lanes == [
        "lane000:rna=rna.h5ad",
        "lane001:rna=rna.h5ad",
        "lane001:adt=adt.h5ad",
        "lane002:rna=rna.h5ad",
        "lane003:rna=rna.h5ad",
        "lane003:adt=adt.h5ad",
    ]
    with pytest.raises(ValueError, match="no multiple"):
        atlas.command(atlas.QUICK_LANE + 1, tmp_path, args)


def test_the_manifest_of_many_cells_is_a_manifest(tmp_path: Path) -> None:
    store = make_store(tmp_path / "s.zarr")
    many = probe.enlarged(store.manifest, 15_000)
    assert many.n_cells == 15_000
    assert len(many.shards) > 20 * len(store.manifest.shards)
    assert many.lists_every_shard()
    many.write(tmp_path)
    assert Manifest.read(tmp_path).n_cells == 15_000


def test_the_plan_takes_as_many_cells_of_every_stratum(tmp_path: Path) -> None:
    store = make_store(tmp_path / "s.zarr", cells={"rna+adt": 2000, "rna": 1500})
    plan = probe.plan_of(store, 64)
    assert plan.stratum_shares == {"rna+adt": 32, "rna": 32}
    probe.first_batch(store, plan, probe.FAR)
    assert len(plan.select_cells(probe.FAR, "rna")) == 32


def record(method: str, size: int, repeat: int, **values: float) -> dict:
    every = dict.fromkeys(("cells_per_s", "anon_mib", *atlas.SHORTS, *atlas.ABSOLUTE), 1.0)
    return {"method": method, "data_set": str(size), "fold": repeat} | every | values


def test_bars_compare_the_largest_with_the_smallest_once_all_is_measured() -> None:
    args = atlas.arguments(["--json", "x.json", "--cells", "2000000", "1000000", "--repeats", "2"])
    records = [record(m, n, r) for m in atlas.METHODS for n in args.cells for r in range(2)]
    n_bars = 11 + 1 + len(atlas.ABSOLUTE)
    assert [bar["holds"] for bar in atlas.bars_of(records, args)] == [True] * n_bars
    slow = [r | {"cells_per_s": 0.8} if r["data_set"] == "2000000" else r for r in records]
    judged = {bar["name"]: bar for bar in atlas.bars_of(slow, args)}
    missed = [name for name, bar in judged.items() if not bar["holds"]]
    assert missed == [
        f"{m}: cells/s of 2,000,000 cells, times that of 1,000,000" for m in atlas.METHODS
    ]
    heavy = [r | {"anon_mib": 1000.0, "open_ms": 200.0} for r in records]
    missed = [bar["name"] for bar in atlas.bars_of(heavy, args) if not bar["holds"]]
    assert missed == [atlas.GIGABYTE.name, atlas.ABSOLUTE["open_ms"].name]


def test_the_worst_of_the_larger_sizes_counts() -> None:
    args = atlas.arguments(
        ["--json", "x.json", "--cells", "1000000", "2000000", "4000000", "--repeats", "1"]
    )
    records = [record(m, n, 0) for m in atlas.METHODS for n in args.cells]
    bad = [
        r | {"cells_per_s": 0.5, "anon_mib": 1.5} if r["data_set"] == "2000000" else r
        for r in records
    ]
    assert [bar["value"] for bar in atlas.bars_of(bad, args)][:2] == [0.5, 1.5]
    assert [bar["holds"] for bar in atlas.bars_of(records[1:], args)][:2] == [None, None]
