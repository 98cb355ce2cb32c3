"""The benchmark of scale: what it runs, the profiles it draws, and when its bars are judged."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.benchmarks import cells
from tests.benchmarks.scale import __main__ as scale
from tests.benchmarks.scale import probe, profiles
from tests.benchmarks.scale.__main__ import Scale


def plan_scale(*words: str) -> Scale:
    return Scale(["--json", "x.json", *words])


def make_record(method: str, cells: str, **values: float) -> dict[str, Any]:
    return {"method": method, "data_set": cells, "fold": 0, "seed": 0} | values


def test_every_size_is_estimated_and_every_call_is_made_once() -> None:
    cases = list(plan_scale("--quick").list_cases())
    assert [case[:2] for case in cases] == [
        ("exact", "2000"),
        ("approximate", "2000"),
        ("approximate", "8000"),
        *((call, "8000") for call in probe.CALLS),
    ]


def test_the_store_is_made_of_lanes_with_both_modalities(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cells, "find_file", lambda shape, work: Path(f"{shape.name}.h5ad"))
    plan = plan_scale("--quick")
    words = map(str, plan.list_conversion(2 * scale.QUICK_LANE, tmp_path))
    lanes = [word for word in words if word.startswith("lane")]
    assert lanes == [f"lane00{i}:{name}={name}.h5ad" for i in range(2) for name in ("rna", "adt")]
    with pytest.raises(ValueError, match="no multiple"):
        plan.list_conversion(scale.QUICK_LANE + 1, tmp_path)


def test_profiles_are_two_noisy_looks_at_the_same_cells(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(profiles, "PIECE", 70)
    first, second = profiles.find_profiles(300, tmp_path)
    expected = 1 / (1 + profiles.NOISE**2)
    found = np.corrcoef(first.ravel(), second.ravel())[0, 1]
    assert found == pytest.approx(expected, abs=0.03)
    assert np.corrcoef(first[:-1].ravel(), second[1:].ravel())[0, 1] == pytest.approx(0, abs=0.03)


def test_estimates_are_told_with_their_errors(tmp_path: Path) -> None:
    args = plan_scale("--work", str(tmp_path)).args
    args.cells = 300
    exact, estimated = probe.score_exactly(args), probe.score_approximately(args)
    assert estimated["foscttm"] == pytest.approx(exact["foscttm"], abs=1e-4)
    assert estimated["foscttm_error"] == 0  # all cells are asked
    assert 0 < exact["mixing"] < 1


def test_bars_are_judged_where_their_runs_were_made() -> None:
    plan = plan_scale()
    records = [make_record("exact", "100000", seconds=50.0, rss_mib=900.0, foscttm=0.1)]
    assert [bar["holds"] for bar in plan.judge(records)] == [True, True, *[None] * 5]
    records += [
        make_record("approximate", "100000", foscttm=0.104, foscttm_error=0.001),
        make_record("match", "1000000", rss_mib=5000.0),
    ]
    assert [bar["holds"] for bar in plan.judge(records)][2:] == [False, None, None, False, None]
