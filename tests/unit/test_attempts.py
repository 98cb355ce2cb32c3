"""A run folder keeps how training was started, each time."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import pytest

from clue_dist.checkpoint.attempts import (
    ATTEMPTS_FILE,
    TrainingAttempt,
    list_versions,
    read_attempts,
    record_attempt,
)
from clue_dist.errors import SavingError

FIRST = TrainingAttempt(0, 100, 2, "cpu", {"rna+adt": 90}, {"rna+adt": 10})


def test_every_start_is_kept_with_its_command_and_versions(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ["launch/train.py", "--local_rank=0", "--set", "run=a b"]
    monkeypatch.setattr(sys, "argv", words)
    record_attempt(tmp_path, FIRST)
    record_attempt(tmp_path, replace(FIRST, step=60, ranks=1))
    with (tmp_path / ATTEMPTS_FILE).open("a") as file:
        file.write('{"unknown": 1}\n{"step": 3')  # of a later version; of a job that was killed
    first, second = read_attempts(tmp_path)
    assert (first.step, first.ranks, second.step, second.ranks) == (0, 2, 60, 1)
    assert first.command == "launch/train.py --set 'run=a b'"
    assert first.versions == list_versions()
    assert first.versions.keys() >= {"python", "clue-dist", "torch", "deepspeed"}
    assert first.held_out_cells == {"rna+adt": 10}
    assert first.time[:2] == "20"


def test_a_run_of_an_earlier_version_has_none(tmp_path: Path) -> None:
    assert read_attempts(tmp_path) == []
    with pytest.raises(SavingError, match=r"attempts\.jsonl could not be written"):
        record_attempt(tmp_path / "nowhere", FIRST)
