"""What is measured of the plan's batches: the store's order is the real one, and what is not random is seen."""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from clue_dist.data.loader import Loader
from clue_dist.data.plan import CellPlan
from tests.benchmarks.randomness import __main__ as randomness
from tests.benchmarks.randomness import deal
from tests.benchmarks.randomness.__main__ import BATCH
from tests.benchmarks.randomness.atlas import GROUPS, TYPES, atlas_of, barcodes, stored
from tests.unit.prep_helpers import convert_files, make_anndata, make_counts, write_h5mu


def test_the_atlas_is_sorted_by_plate_and_by_type() -> None:
    for unpaired in (False, True):
        atlas = atlas_of(5000, unpaired)
        assert len(atlas.group) == len(atlas.stratum) == sum(atlas.sizes.values()) == 5000
        assert (np.diff(atlas.group) >= 0).all()
        assert len(np.unique(atlas.group)) > 0.9 * GROUPS
        assert len(np.unique(atlas.stratum)) == (3 if unpaired else 1)
    for plate in range(GROUPS // TYPES):
        assert len(np.unique(atlas.stratum[atlas.group // TYPES == plate])) == 1


@pytest.mark.parametrize("seed", [0, 3])
def test_a_converted_store_lies_and_is_served_as_said(seed: int, tmp_path: Path) -> None:
    """The plan and the groups in stored order say of every batch what the loader serves of the real store."""
    atlas = atlas_of(900, unpaired=True)
    groups = pd.Series([f"group-{g:03d}" for g in atlas.group], barcodes(900).astype(str))
    files = {}
    for m, name in enumerate(("rna", "atac")):
        mine = np.array([name in atlas.strata[s].split("+") for s in atlas.stratum])
        counts = make_counts(900, 20, seed=m, prefix=name)[mine]
        counts.index = groups.index[mine]
        files[name] = make_anndata(
            counts.clip(upper=1) if name == "atac" else counts, batch=groups[mine].to_numpy()
        )
    store = convert_files(
        tmp_path / "s.zarr",
        str(write_h5mu(tmp_path / "in.h5mu", **files)),
        block_cells=8,
        seed=seed,
    )

    code_of = np.array([int(name.removeprefix("group-")) for name in store.manifest.batches])
    want = stored(atlas, seed)
    assert set(want) == set(store.segments)
    for name, reader in store.segments.items():
        np.testing.assert_array_equal(
            code_of[reader.read_codes("batch", np.arange(reader.n_cells))], want[name]
        )

    plan = CellPlan(seed, atlas.sizes, {"rna+atac": 16, "rna": 8, "atac": 8}, 4, 2, 8)
    dealt = deal.by_plan(plan, 30)
    counts = sum(deal.composition(want[s], cells) for s, cells in dealt.items())
    with Loader(store, plan) as loader:
        for t in range(30):
            got = np.bincount(code_of[next(loader).batch_code.numpy()], minlength=GROUPS)
            np.testing.assert_array_equal(got, counts[t])


def plan_of(n: int, seed: int = 0) -> CellPlan:
    return CellPlan(seed, {"rna+atac": n}, {"rna+atac": 64}, 4, 2, 16)


def test_independent_draws_have_the_spread_of_draws() -> None:
    got = randomness.measured(atlas_of(6400, unpaired=False), "draws", 8, 16, range(40), 2)
    # What one batch of a pass has, the next cannot have.
    for key, ideal in (("spread", 1.0), ("neighbours", -BATCH / 6400)):
        assert abs(got[key]["mean"] - ideal) < 4 * got[key]["error"] < 0.06
    assert got["not_once"] == 0
    assert got["again"][0] == pytest.approx(got["again"][1], rel=0.05)


def test_a_store_that_was_not_shuffled_is_seen() -> None:
    got = randomness.measured(atlas_of(40_000, unpaired=False), "unshuffled", 8, 1, range(2), 1)
    assert got["spread"]["mean"] > 1.5
    assert got["spread"]["worst"] > 1.5


def test_batches_alike_their_neighbours_are_seen() -> None:
    """Every pass deals the first half of the groups, shuffled, then the other half."""
    n, plan = 6400, plan_of(6400)
    group = np.repeat(np.arange(GROUPS), n // GROUPS + 1)[:n]
    rng = np.random.default_rng(0)
    halves = np.concatenate([rng.permutation(n // 2), n // 2 + rng.permutation(n // 2)]).reshape(
        -1, 64
    )
    got = deal.shares_of(plan, {"rna+atac": halves}, {"rna+atac": group})
    assert got.variance[: GROUPS // TYPES].mean() > 1.5
    assert got.neighbours[: GROUPS // TYPES].mean() > 0.3


def test_a_cell_dealt_twice_is_counted_with_the_one_left_out() -> None:
    plan = plan_of(640)
    dealt = deal.by_plan(plan, deal.steps_for(plan, 2))
    assert deal.not_once(plan, dealt) == 0
    cells = dealt["rna+atac"]
    cells[3, 5] = cells[0, 0]
    assert deal.not_once(plan, dealt) == 2


def test_companions_met_again_are_counted() -> None:
    plan = CellPlan(0, {"s": 4}, {"s": 2}, 1, 1, 2)
    same, other = (
        np.array([[0, 1], [2, 3], [1, 0], [3, 2]]),
        np.array([[0, 1], [2, 3], [0, 2], [1, 3]]),
    )
    assert deal.met_again(plan, {"s": same}) == (1.0, pytest.approx(1 / 3))
    assert deal.met_again(plan, {"s": other}) == (0.0, pytest.approx(1 / 3))
    assert deal.met_again(plan, {"s": same[:3]}) is None


def record(
    method: str, cells: int, spread: float = 1.0, neighbours: float = 0.0, not_once: int = 0
) -> dict:
    told = {"mean": 1.0, "error": 0.001, "worst_error": 0.002}
    of = {"spread": told | {"worst": spread}, "neighbours": told | {"worst": neighbours}}
    return {
        "method": method,
        "data_set": f"paired-{cells}",
        "not_once": not_once,
        "batches": 9,
        "again": None,
    } | of


def test_bars_judge_the_farthest_of_all_settings_of_the_plan() -> None:
    args = argparse.Namespace(quick=False)
    records = [
        record(f"plan-{i}", s.cells) for s in randomness.SIZES for i in range(2 * len(s.settings))
    ]
    control = record("unshuffled", randomness.SIZES[0].cells, 9.0, 0.9)
    assert [bar["holds"] for bar in randomness.bars_of([*records, control], args)] == [True] * 6
    bad = [record("plan-0", randomness.SIZES[0].cells, 0.94, -0.06, 2), *records[1:]]
    got = list(randomness.bars_of(bad, args))
    assert [bar["holds"] for bar in got] == [False] * 3 + [True] * 3
    assert [bar["value"] for bar in got[:3]] == [pytest.approx(0.06), pytest.approx(0.06), 2]
    assert {bar["holds"] for bar in randomness.bars_of(records[2:-1], args)} == {None}
    assert {
        bar["holds"] for bar in randomness.bars_of(records, argparse.Namespace(quick=True))
    } == {None}
    assert "unshuffled" in randomness.table([*records, control])
