"""tests/benchmarks/faults: bars are judged for whole runs alone, damages are counted right."""

from __future__ import annotations

import argparse
from pathlib import Path

import pytest

from tests.benchmarks.faults import __main__ as faults
from tests.benchmarks.faults import campaigns
from tests.benchmarks.faults.jobs import last_step, resumes_at


def test_a_quick_look_judges_nothing_and_a_whole_run_every_bar() -> None:
    records = [{"method": name, "bars": [0.0] * len(bars)} for name, bars in faults.BARS.items()]
    quick = list(faults.bars_of(records, argparse.Namespace(quick=True)))
    whole = list(faults.bars_of(records, argparse.Namespace(quick=False)))
    assert {bar["holds"] for bar in quick} == {None}
    assert None not in {bar["holds"] for bar in whole}
    assert faults.BARS.keys() == campaigns.CAMPAIGNS.keys()


def test_a_campaign_that_was_left_out_is_open() -> None:
    records = [{"method": "stops", "bars": [1.0, 2.0]}]
    bars = {
        bar["name"]: bar["holds"]
        for bar in faults.bars_of(records, argparse.Namespace(quick=False))
    }
    assert bars["seconds from a stop signal to the last commit, at most"] is True
    assert bars["steps lost by stops"] is False
    assert bars["kills after which the run went on"] is None


def test_steps_are_read_of_whole_lines_and_whole_checkpoints(tmp_path: Path) -> None:
    assert (last_step(tmp_path), resumes_at(tmp_path)) == (0, 0)
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n{"step": 2}\n{"st')
    for name in ("step-00000001", "step-00000003.partial"):
        (tmp_path / "checkpoints" / name).mkdir(parents=True)
        (tmp_path / "checkpoints" / name / "COMMIT.json").touch()
    assert (last_step(tmp_path), resumes_at(tmp_path)) == (2, 1)


def test_memory_is_told_of_the_rank_that_grew_most(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    size = campaigns.Size(steps=100, kills=0, stops=0, damages=0, saves=0, features=0)
    samples = [
        {"step": s, "ranks": [[100, 7, 9], [200 + s, 7, 9 + (s > 50)]]} for s in range(0, 101, 5)
    ]
    campaigns.common.write_json(tmp_path / "samples.json", samples)
    monkeypatch.setattr(campaigns, "whole", lambda shared, size: tmp_path / "whole")
    memory, leaks = campaigns.steady(tmp_path, size, tmp_path)["bars"]
    assert memory == pytest.approx(295 / 212.5)
    assert leaks == 1
