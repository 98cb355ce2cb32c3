"""tests/benchmarks/faults: bars are judged for whole runs alone, damages are counted right."""

from pathlib import Path

import pytest

from tests.benchmarks import kept
from tests.benchmarks.faults import __main__ as faults
from tests.benchmarks.faults import campaigns
from tests.benchmarks.faults.__main__ import Faults
from tests.faults.jobs import find_committed_step, find_last_step


def test_every_bar_is_about_a_number_of_a_campaign_and_open_where_that_was_left_out() -> None:
    plan = Faults(["--json", "x.json"])
    assert {key.partition(": ")[0] for key in plan.bars} == campaigns.CAMPAIGNS.keys()
    assert plan.bars["kills: went on"].bar == faults.FULL.kills
    assert plan.bars["damages: the one before used"].bar == faults.FULL.damages
    stops = [
        {"method": "stops", "data_set": "simulated", "seconds until saved": 1.0, "steps lost": 2}
    ]
    holds = {bar["name"]: bar["holds"] for bar in plan.judge(stops)}
    assert holds["seconds from a stop signal to the last commit, at most"] is True
    assert holds["steps lost by stops"] is False
    assert holds["kills after which the run went on"] is None
    assert "steps lost" in plan.tabulate(stops)


def test_steps_are_read_of_whole_lines_and_whole_checkpoints(tmp_path: Path) -> None:
    assert (find_last_step(tmp_path), find_committed_step(tmp_path)) == (0, 0)
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n{"step": 2}\n{"st')
    for name in ("step-00000001", "step-00000003.partial"):
        (tmp_path / "checkpoints" / name).mkdir(parents=True)
        (tmp_path / "checkpoints" / name / "COMMIT.json").touch()
    assert (find_last_step(tmp_path), find_committed_step(tmp_path)) == (2, 1)


def test_memory_is_told_of_the_rank_that_grew_most(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    size = campaigns.CampaignSize(steps=100, kills=0, stops=0, damages=0, saves=0, features=0)
    samples = [
        {"step": s, "ranks": [[100, 7, 9], [200 + s, 7, 9 + (s > 50)]]} for s in range(0, 101, 5)
    ]
    kept.write_json(tmp_path / "samples.json", samples)
    monkeypatch.setattr(campaigns, "run_whole", lambda shared, size: tmp_path / "whole")
    found = campaigns.watch_sizes(tmp_path, size, tmp_path)
    assert found["memory at the end to after a tenth"] == pytest.approx(295 / 212.5)
    assert found["leaks"] == 1
