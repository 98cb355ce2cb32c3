"""A few hostile inputs of every group: refused with a clear error or right; crashes are counted."""

import importlib
import itertools
import multiprocessing
import os
import pickle
from functools import partial
from pathlib import Path
from random import Random

import dask
import h5py
import numpy as np
import pytest

from clue_dist.errors import ConfigError, StoreError, TrainingError
from tests.benchmarks.hostile import __main__ as hostile
from tests.benchmarks.hostile import changes, hdf5, probe, spoil, watch
from tests.benchmarks.hostile.__main__ import Hostile
from tests.benchmarks.hostile.probe import GROUPS
from tests.benchmarks.hostile.trial import Trial, WrongValues, run_data_prep

NUMBERS = range(3, hostile.INPUTS, 67)  # of the inputs of a group: one of each kind


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("hostile")
    watch.plant_canary(path / "canary")
    return path


@pytest.mark.parametrize("group", [group for group in GROUPS if group != "run"])
def test_inputs_are_refused_or_right(folder: Path, group: str) -> None:
    make_sound, spoil_input = GROUPS[group]
    base = folder / make_sound.__module__ / make_sound.__name__
    if not base.exists():
        base.mkdir(parents=True)
        make_sound(base)
    for number in NUMBERS:
        scratch = folder / group / str(number)
        scratch.mkdir(parents=True)
        with watch.note_code() as ran:
            found = spoil_input(base, scratch, number, Random(f"0 {number}")).find_outcome()
        assert found["end"] != "crashed", found
        assert ran == []


def test_inputs_are_tried_in_a_process_that_is_started_anew_where_one_ends_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ends = {1: partial(os._exit, 3), 2: partial(sum, itertools.repeat(1))}

    def spoil_toy(base: Path, folder: Path, number: int, rng: Random) -> Trial:
        return Trial(f"{base.name} {number}", {"a": ends.get(number, partial(int, "7"))})

    monkeypatch.setattr(probe, "LIMIT", 0)  # ends what computes for more than a second

    context = multiprocessing.get_context("fork")  # which has imported everything
    monkeypatch.setattr(multiprocessing, "get_context", lambda method: context)
    monkeypatch.setitem(GROUPS, "toy", (lambda base: None, spoil_toy))
    found = hostile.try_inputs("toy", tmp_path, range(4), seed=0)
    assert (found["inputs"], found["right"], found["crashed"]) == (4, 2, 2)
    told = [crash["told"]["process"] for crash in found["crashes"]]
    assert told == ["ended by signal or code 3", "no answer in time"]
    assert "test_hostile" in (tmp_path / "probe.log").read_text()


@pytest.mark.parametrize(
    ("error", "end"),
    [
        (StoreError("what", where="here"), "refused"),
        (ConfigError("what", got=1), "refused"),
        (StoreError("says too little"), "crashed"),
        (TrainingError("exit code 1", where="here"), "crashed"),
        (ValueError("any other"), "crashed"),
        (MemoryError(), "crashed"),
        (WrongValues("values"), "crashed"),
        (None, "right"),
    ],
)
def test_ends(error: Exception | None, end: str) -> None:
    def attempt() -> None:
        if error is not None:
            raise error

    assert Trial("x", {"a": lambda: None, "b": attempt}).find_outcome()["end"] == end


def test_what_must_be_refused_and_is_taken_is_a_crash() -> None:
    assert Trial("x", {"a": lambda: None}, ["a"]).find_outcome()["end"] == "crashed"


def test_commands_are_refused_with_exit_code_2(tmp_path: Path) -> None:
    check = Trial("x", {"a": lambda: run_data_prep("check", tmp_path / "none.zarr")})
    found = check.find_outcome()
    assert found["end"] == "refused"
    assert "no store here" in found["told"]["a"]


def test_code_that_runs_is_noted(folder: Path) -> None:
    with watch.note_code() as ran:
        importlib.import_module(watch.CANARY)
        pickle.loads(watch.make_bomb())
    assert {"imported", "unpickled"} < set(ran)
    assert any("find_class" in event for event in ran)


def test_code_that_a_task_of_a_conversion_runs_is_noted(folder: Path) -> None:
    """Dask, which runs it, may load its own objects alone."""
    task = dask.delayed(lambda: pickle.loads(watch.make_bomb()))
    with watch.note_code() as ran:
        dask.compute(task(), dask.delayed(os.system)("true"), scheduler="threads")
    assert any("find_class" in event for event in ran)
    assert any("os.system" in event for event in ran)


def test_changes_follow_from_the_seed() -> None:
    tree = {"a": [1, 2, {"b": None}], "c": "text"}
    drawn = [
        spoil.format_tree(spoil.spoil_tree(tree, Random(seed), 2)[0]) for seed in (*range(20), 0)
    ]
    assert drawn[0] == drawn[-1]
    assert len(set(drawn)) > 10
    assert tree == {"a": [1, 2, {"b": None}], "c": "text"}


def test_every_edit_of_the_tables_is_python() -> None:
    for group in spoil.EDITS:
        for edit in changes.list_edits(group):
            for part in edit.split(" & "):
                expression = part.partition(" = ")[2] or part.partition(" -> ")[2]
                if expression:
                    compile(expression, edit, "eval")
    assert len(changes.list_edits(*spoil.EDITS)) > 400


def test_hdf5_edits_change_values_attributes_and_names(tmp_path: Path) -> None:
    with h5py.File(tmp_path / "a.h5", "w") as file:
        for name in ("data", "indices"):
            file[f"X/{name}"] = np.arange(4)
        file["X/indptr"] = [0, 3, 4]
        file["X/data"].attrs["kept"] = 1
        hdf5.edit_file(file, "X/data = turned(v, file) & X@shape = [1, 2]")
        hdf5.edit_file(file, "X/indices = v[:-1]")
        hdf5.edit_file(file, "del X/indptr")
        assert file["X/data"][:].tolist() == [2, 1, 0, 3]
        assert file["X/data"].attrs["kept"] == 1
        assert file["X"].attrs["shape"].tolist() == [1, 2]
        assert set(file["X"]) == {"data", "indices"}
        assert len(file["X/indices"]) == 3
    with h5py.File(tmp_path / "b.h5", "w") as file:
        file["X"] = np.ones((2, 2))
        with pytest.raises(hdf5.OtherForm):
            hdf5.edit_file(file, "X/indices = v[:-1]")
        hdf5.edit_file(file, "data = v + 1")
        assert file["X"][0, 0] == 2


def test_bars_ask_for_none() -> None:
    plan = Hostile(["--json", "x.json"])
    counts = {"inputs": 9, "refused": 8, "right": 1, "crashed": 0, "ran": 0, "crashes": []}
    run = {"data_set": "inputs", "seconds": 1.0, "grown_mb": 1}
    records = [counts | run | {"method": group} for group in GROUPS]
    assert [bar["holds"] for bar in plan.judge(records)] == [True, True]
    assert f" {len(GROUPS) * hostile.INPUTS} " in plan.bars["crashed"].name
    assert [bar["holds"] for bar in plan.judge(records[1:])] == [None, None]
    crash = {"number": 3, "what": "gone", "told": {"check": "KeyError"}, "ran": []}
    bad = [records[0] | {"crashed": 1, "ran": 1, "crashes": [crash]}, *records[1:]]
    assert [bar["holds"] for bar in plan.judge(bad)] == [False, False]
    text = plan.tabulate(bad)
    assert "manifest 3: gone: {'check': 'KeyError'}" in text
    assert str(9 * len(GROUPS)) in text
