"""A few hostile inputs of every group: refused with a clear error or right; and what goes wrong is counted as such."""

from __future__ import annotations

import argparse
import importlib
import os
import pickle
from pathlib import Path

import dask
import numpy as np
import pytest

from clue_dist.errors import ConfigError, StoreError, TrainingError
from tests.benchmarks.hostile import __main__ as hostile
from tests.benchmarks.hostile import spoil, watch
from tests.benchmarks.hostile.probe import GROUPS
from tests.benchmarks.hostile.trial import Trial, command, outcome, wrong

EVERY = 19  # of the inputs of a group: no multiple of how kinds take turns


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("hostile")
    watch.plant(path / "canary")
    return path


@pytest.mark.parametrize("group", GROUPS)
def test_inputs_are_refused_or_right(folder: Path, group: str) -> None:
    ready, make = GROUPS[group]
    base = folder / ready.__module__ / "base"
    if not base.exists():
        base.mkdir(parents=True)
        ready(base)
    for number in range(3, hostile.INPUTS, EVERY):
        scratch = folder / group / str(number)
        scratch.mkdir(parents=True)
        with watch.watched(folder / "canary") as ran:
            found = outcome(make(base, scratch, number, np.random.default_rng([0, number])))
        assert found["end"] != "crashed", found
        assert ran == []


def test_inputs_are_tried_in_a_process_of_their_own(tmp_path: Path) -> None:
    got = hostile.tried("config", tmp_path, range(4), seed=0)
    assert (got["inputs"], got["refused"] + got["right"], got["crashes"]) == (4, 4, [])


@pytest.mark.parametrize(
    ("error", "end"),
    [
        (StoreError("what", where="here"), "refused"),
        (ConfigError("what", got=1), "refused"),
        (StoreError("says too little"), "crashed"),
        (TrainingError("exit code 1", where="here"), "crashed"),
        (ValueError("any other"), "crashed"),
        (MemoryError(), "crashed"),
        (None, "right"),
    ],
)
def test_ends(error: Exception | None, end: str) -> None:
    def attempt() -> None:
        if error is not None:
            raise error

    assert outcome(Trial("x", {"a": lambda: None, "b": attempt}))["end"] == end


def test_wrong_values_and_what_must_be_refused_are_crashes() -> None:
    assert outcome(Trial("x", {"a": lambda: wrong("values")}))["end"] == "crashed"
    assert outcome(Trial("x", {"a": lambda: None}, frozenset({"a"})))["end"] == "crashed"


def test_commands_are_refused_with_exit_code_2(tmp_path: Path) -> None:
    found = outcome(Trial("x", {"a": lambda: command("check", tmp_path / "none.zarr")}))
    assert found["end"] == "refused"
    assert "no store here" in found["told"]["a"]


def test_code_that_runs_is_noted(folder: Path) -> None:
    with watch.watched(folder / "canary") as ran:
        importlib.import_module(spoil.CANARY)
        pickle.loads(watch.bomb(folder / "canary"))
    assert {"imported", "unpickled"} < set(ran)
    assert any("find_class" in event for event in ran)


def test_code_that_a_task_of_a_conversion_runs_is_noted(folder: Path) -> None:
    """Dask, which runs it, may load its own objects alone."""
    task = dask.delayed(lambda: pickle.loads(watch.bomb(folder / "canary")))
    with watch.watched(folder / "canary") as ran:
        dask.compute(task(), dask.delayed(os.system)("true"), scheduler="threads")
    assert any("find_class" in event for event in ran)
    assert any("os.system" in event for event in ran)


def test_changes_follow_from_the_seed() -> None:
    tree = {"a": [1, 2, {"b": None}], "c": "text"}
    drawn = [
        spoil.text_of(spoil.spoiled(tree, np.random.default_rng(seed), 2)[0])
        for seed in (*range(20), 0)
    ]
    assert drawn[0] == drawn[-1]
    assert len(set(drawn)) > 10
    assert tree == {"a": [1, 2, {"b": None}], "c": "text"}


def test_bars_ask_for_none() -> None:
    args = argparse.Namespace(quick=False)
    record = {
        "inputs": 9,
        "refused": 8,
        "right": 1,
        "crashed": 0,
        "ran": 0,
        "seconds": 1.0,
        "grown_mb": 1,
        "crashes": [],
    }
    records = [record | {"method": group} for group in GROUPS]
    assert [bar["holds"] for bar in hostile.bars_of(records, args)] == [True, True]
    assert [bar["holds"] for bar in hostile.bars_of(records[1:], args)] == [None, None]
    crash = {"number": 3, "what": "gone", "told": {"check": "KeyError"}, "ran": []}
    bad = [records[0] | {"crashed": 1, "ran": 1, "crashes": [crash]}, *records[1:]]
    assert [bar["holds"] for bar in hostile.bars_of(bad, args)] == [False, False]
    assert "gone: check: KeyError" in hostile.table(bad)
