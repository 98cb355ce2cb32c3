"""`fit`: what it refuses, how it is interrupted, and what it gives."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch.distributed as dist

import clue_dist
from clue_dist.api import training_call
from clue_dist.errors import ClueError, ConfigError
from clue_dist.resilience.stop_signals import StopFlag
from data_prep.from_python import ConversionRequest
from tests.unit.fit_helpers import SMALL, make_mudata


@pytest.fixture
def audible_interrupt() -> Iterator[None]:
    """Ctrl-C is heard, also where the tests run in the background of a shell, which ignores it."""
    previous = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, previous)


def test_a_folder_that_cannot_hold_a_run_is_refused_before_the_conversion(tmp_path: Path) -> None:
    (tmp_path / "run").write_text("")
    with pytest.raises(ConfigError, match="run folder cannot be written"):
        training_call._find_store(make_mudata(20), ConversionRequest(), tmp_path / "run")
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def test_training_in_a_thread_hears_no_signals() -> None:
    before = signal.getsignal(signal.SIGTERM)
    errors: list[BaseException] = []

    def open_flag() -> None:
        try:
            with StopFlag() as stop:
                assert not stop
        except BaseException as error:  # noqa: BLE001  it is looked at below
            errors.append(error)

    thread = threading.Thread(target=open_flag)
    thread.start()
    thread.join()
    assert errors == []
    assert signal.getsignal(signal.SIGTERM) is before


@pytest.mark.usefixtures("audible_interrupt")
def test_a_flag_knows_whether_a_person_interrupted() -> None:
    for number, interrupted in ((signal.SIGINT, True), (signal.SIGTERM, False)):
        with StopFlag() as stop:
            signal.raise_signal(number)
            assert stop
            assert stop.was_interrupted == interrupted


def test_mistakes_in_settings_come_before_the_cells_are_touched(tmp_path: Path) -> None:
    for settings, config in (({"train.lrr": 1}, "atlas"), ({}, {"train": {"lrr": 1}})):
        with pytest.raises(ClueError, match=r"did you mean `train.lr`\?"):
            clue_dist.fit(make_mudata(), tmp_path / "run", config=config, settings=settings)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
@pytest.mark.usefixtures("audible_interrupt")
def test_an_interrupt_saves_and_is_raised(tmp_path: Path) -> None:
    """As the stop button of a notebook does it, once training is under way."""

    def interrupt() -> None:
        while not (tmp_path / "run" / "metrics.jsonl").exists():
            time.sleep(0.05)
        os.kill(os.getpid(), signal.SIGINT)

    threading.Thread(target=interrupt, daemon=True).start()
    endless = SMALL | {"train.epochs": 10_000, "train.patience": 0}
    with pytest.raises(KeyboardInterrupt, match="the same call goes on"):
        clue_dist.fit(make_mudata(), tmp_path / "run", settings=endless)
    assert list((tmp_path / "run" / "checkpoints").glob("step-*/COMMIT.json"))


@pytest.mark.slow
def test_fit_trains_in_this_process_and_again(tmp_path: Path) -> None:
    mdata = make_mudata(300)
    handlers = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    first = clue_dist.fit(mdata, tmp_path / "first", settings=SMALL)
    dist.destroy_process_group()  # as other code in the process may do
    second = clue_dist.fit(tmp_path / "first.zarr", tmp_path / "second", settings=SMALL)
    assert "FOSCTTM of held-out pairs" in repr(first)
    np.testing.assert_array_equal(first.embed(mdata), second.embed(mdata))
    assert np.isfinite(mdata.obsm["X_clue_var"]).all()
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == handlers
    again = clue_dist.fit(mdata, tmp_path / "first", settings=SMALL)
    assert again.trained_model.name == first.trained_model.name
    scores = first.evaluate(mdata)
    assert 0 <= scores["rna->adt"]["global"]["foscttm"] <= 1
