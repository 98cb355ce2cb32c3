"""What is measured of the plan's batches: the store's order is real, what is not random is seen."""

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from clue_dist.data.loader import Loader
from clue_dist.data.plan import CellPlan
from tests.benchmarks.randomness import __main__ as randomness
from tests.benchmarks.randomness import deal
from tests.benchmarks.randomness.__main__ import BATCH, SIZES, Randomness
from tests.benchmarks.randomness.atlas import (
    GROUPS,
    TYPES,
    list_barcodes,
    make_atlas,
    order_stored,
)
from tests.unit.prep_helpers import convert_files, make_anndata, make_counts, write_h5mu


def test_the_atlas_is_sorted_by_plate_and_by_type() -> None:
    for unpaired in (False, True):
        atlas = make_atlas(5000, unpaired)
        assert len(atlas.group) == len(atlas.stratum) == sum(atlas.sizes.values()) == 5000
        assert (np.diff(atlas.group) >= 0).all()
        assert len(np.unique(atlas.group)) > 0.9 * GROUPS
        assert len(np.unique(atlas.stratum)) == (3 if unpaired else 1)
    for plate in range(GROUPS // TYPES):
        assert len(np.unique(atlas.stratum[atlas.group // TYPES == plate])) == 1


def test_a_converted_store_lies_and_is_served_as_said(tmp_path: Path) -> None:
    """The plan and the groups in stored order say what the loader serves of the real store."""
    atlas, files = make_atlas(300, unpaired=True), {}
    groups = pd.Series([f"group-{g:03d}" for g in atlas.group], list_barcodes(300).astype(str))
    for m, name in enumerate(("rna", "atac")):
        some = np.array([name in atlas.strata[s].split("+") for s in atlas.stratum])
        counts = make_counts(300, 20, seed=m, prefix=name)[some].clip(upper=1)
        counts.index = groups.index[some]
        files[name] = make_anndata(counts, batch=groups[some].to_numpy())
    given = str(write_h5mu(tmp_path / "in.h5mu", **files))
    store = convert_files(tmp_path / "s.zarr", given, block_cells=8, seed=3)

    code_of = np.array([int(name.removeprefix("group-")) for name in store.manifest.batches])
    order = order_stored(atlas, 3)
    assert set(order) == set(store.segments)
    for name, reader in store.segments.items():
        codes = reader.read_codes("batch", np.arange(reader.n_cells))
        np.testing.assert_array_equal(code_of[codes], order[name])

    plan = CellPlan(3, atlas.sizes, {"rna+atac": 16, "rna": 8, "atac": 8}, 4, 2, 8)
    dealt = deal.deal_plan(plan, 20)
    counts = sum(deal.count_groups(order[s], cells) for s, cells in dealt.items())
    with Loader(store, plan) as loader:
        for t in range(20):
            batch = code_of[next(loader).batch_code.numpy()]
            np.testing.assert_array_equal(np.bincount(batch, minlength=GROUPS), counts[t])


def plan_pairs(n: int) -> CellPlan:
    return CellPlan(0, {"rna+atac": n}, {"rna+atac": 64}, 4, 2, 16)


def test_independent_draws_have_the_spread_of_draws() -> None:
    atlas = make_atlas(6400, unpaired=False)
    found = randomness.measure_deals(atlas, "draws", 8, 16, range(40), 2)
    # What one batch of a pass has, the next cannot have.
    for key, ideal in (("spread", 1.0), ("neighbours", -BATCH / 6400)):
        assert abs(found[key]["mean"] - ideal) < 4 * found[key]["error"] < 0.06
    assert found["not_once"] == 0
    assert found["again"] == pytest.approx(found["chance"], rel=0.05)


def test_a_store_that_was_not_shuffled_is_seen() -> None:
    atlas = make_atlas(40_000, unpaired=False)
    found = randomness.measure_deals(atlas, "unshuffled", 8, 1, range(2), 1)
    assert found["spread"]["mean"] > 1.5
    assert found["spread"]["worst"] > 1.5


def test_batches_alike_their_neighbours_are_seen() -> None:
    """Every pass deals the first half of the groups, shuffled, then the other half."""
    n, rng = 6400, np.random.default_rng(0)
    group = np.repeat(np.arange(GROUPS), n // GROUPS + 1)[:n]
    halves = np.concatenate([rng.permutation(n // 2), n // 2 + rng.permutation(n // 2)])
    dealt, order = {"rna+atac": halves.reshape(-1, 64)}, {"rna+atac": group}
    variance, neighbours = deal.measure_shares(plan_pairs(n), dealt, order)
    assert variance[: GROUPS // TYPES].mean() > 1.5
    assert neighbours[: GROUPS // TYPES].mean() > 0.3


def test_a_cell_dealt_twice_is_counted_with_the_one_left_out() -> None:
    plan = plan_pairs(640)
    dealt = deal.deal_plan(plan, deal.count_steps(plan, 2))
    assert deal.count_not_once(plan, dealt) == 0
    cells = dealt["rna+atac"]
    cells[3, 5] = cells[0, 0]
    assert deal.count_not_once(plan, dealt) == 2


def test_companions_met_again_are_counted() -> None:
    plan = CellPlan(0, {"s": 4}, {"s": 2}, 1, 1, 2)
    same = np.array([[0, 1], [2, 3], [1, 0], [3, 2]])
    other = np.array([[0, 1], [2, 3], [0, 2], [1, 3]])
    assert deal.count_met_again(plan, {"s": same}) == (1.0, pytest.approx(1 / 3))
    assert deal.count_met_again(plan, {"s": other}) == (0.0, pytest.approx(1 / 3))
    assert deal.count_met_again(plan, {"s": same[:3]}) is None


def make_record(
    method: str, cells: int, spread: float = 1.0, neighbours: float = 0.0, not_once: int = 0
) -> dict[str, Any]:
    means = {"mean": 1.0, "error": 0.001, "worst_error": 0.002}
    worst = {"spread": means | {"worst": spread}, "neighbours": means | {"worst": neighbours}}
    run = {"method": method, "data_set": f"paired-{cells}", "batches": 9}
    return run | worst | {"not_once": not_once, "again": None, "chance": None}


def test_bars_judge_the_farthest_of_all_settings_of_the_plan() -> None:
    plan = Randomness(["--json", "x.json"])
    records = [make_record(f"plan-{i}", s.cells) for s in SIZES for i in range(2 * len(s.settings))]
    control = make_record("unshuffled", SIZES[0].cells, 9.0, 0.9)
    assert [bar["holds"] for bar in plan.judge([*records, control])] == [True] * 6
    bad = [make_record("plan-0", SIZES[0].cells, 0.94, -0.06, 2), *records[1:]]
    judged = list(plan.judge(bad))
    assert [bar["holds"] for bar in judged] == [False] * 3 + [True] * 3
    assert [bar["value"] for bar in judged[:3]] == [pytest.approx(0.06), pytest.approx(0.06), 2]
    assert {bar["holds"] for bar in plan.judge(records[2:-1])} == {None}
    assert "unshuffled" in plan.tabulate([*records, control])
