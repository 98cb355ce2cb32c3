"""The arithmetic and the words of launch/bench.py."""

import argparse
import math
import os
import threading
import time
from pathlib import Path

import pytest
import torch

from clue_dist.data.timing import record_phases, time_phase
from clue_dist.errors import ConfigError
from clue_dist.ranks import Ranks
from clue_dist.train import bench
from clue_dist.train.arguments import require_bench_arguments
from clue_dist.train.bench import RankClock, TimedEngine, share_time
from clue_dist.train.speed_report import (
    LoaderSpeed,
    ModelSpeed,
    SpeedReport,
    TrainingSpeed,
    judge_speed,
)


def data(cells_per_s: float) -> LoaderSpeed:
    return LoaderSpeed(
        cells_per_s / 512, cells_per_s, 1e3 * cells_per_s, {"read and decode": 0.6, "gather": 0.4}
    )


def model(cells_per_s: float) -> ModelSpeed:
    return ModelSpeed(512e3 / cells_per_s, 1.0, 2.0, 0.5, cells_per_s)


def both(waited: float) -> TrainingSpeed:
    return TrainingSpeed(1.0, 1.0, waited)


def test_the_model_is_the_limit_where_no_step_waits() -> None:
    verdict = judge_speed(data(14_990), model(1_000), both(0.01), "cuda")
    assert verdict == "the model is the limit: the loader could feed 14 such GPUs"
    assert judge_speed(data(1_590), model(1_000), both(0.0), "cpu").endswith(
        "could feed 1.5 such models"
    )


def test_data_is_the_limit_where_steps_wait() -> None:
    verdict = judge_speed(data(400), model(1_000), both(0.6), "cuda")
    assert verdict.startswith(
        "data is the limit: the model could take 2.5 times what the loader gives"
    )
    assert "read and decode (60%)" in verdict


def test_a_loader_that_keeps_up_alone_but_not_beside_the_model_wants_cores() -> None:
    verdict = judge_speed(data(3_000), model(1_000), both(0.3), "cuda")
    assert "only beside the model" in verdict
    assert "could feed 3.0 such GPUs" in verdict
    assert "more CPU cores" in verdict


def test_shares_sum_to_one_and_name_the_rest() -> None:
    assert share_time({"read": 2.0, "gather": 1.0}, 4.0) == {
        "read": 0.5,
        "gather": 0.25,
        "other": 0.25,
    }
    # Two threads.
    assert share_time({"read": 6.0, "gather": 2.0}, 4.0) == {
        "read": 0.75,
        "gather": 0.25,
        "other": 0.0,
    }


def test_the_report_ends_with_the_verdict_and_json_has_it_all() -> None:
    about = {
        "store": "s.zarr",
        "batch_size": 512,
        "ranks": 2,
        "name": "H100",
        "precision": "bf16",
        "device": "cuda",
    }
    report = SpeedReport(about, data(2_000), model(1_000), both(0.0))
    assert (
        report.format_text().splitlines()[-1]
        == "the model is the limit: the loader could feed 2.0 such GPUs"
    )
    assert report.as_dict()["feeds"] == 2.0
    assert report.as_dict()["data"]["phases"]["gather"] == 0.4


@pytest.mark.parametrize(
    "wrong", [{"seconds": 0.0}, {"seconds": math.nan}, {"seconds": math.inf}, {"repeats": 0}]
)
def test_what_cannot_be_timed_is_refused(wrong: dict[str, float]) -> None:
    arguments = {"seconds": 1.0, "repeats": 1, "json": None} | wrong
    with pytest.raises(ConfigError, match=f"where: --{next(iter(wrong))}"):
        require_bench_arguments(argparse.Namespace(**arguments))


def test_a_file_that_cannot_be_written_is_refused_before_anything_is_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "old.json").touch()
    given = [
        argparse.Namespace(seconds=1.0, repeats=1, json=tmp_path / name)
        for name in ("new.json", "old.json")
    ]
    for args, needed in zip(given, (tmp_path, tmp_path / "old.json"), strict=True):
        require_bench_arguments(args)
        with monkeypatch.context() as patch:
            # Root may write anywhere.
            patch.setattr(os, "access", lambda path, mode, needed=needed: path != needed)
            with pytest.raises(
                ConfigError, match=f"cannot be written\n  where: --json {args.json}"
            ):
                require_bench_arguments(args)


class FakeTime:
    """A clock that only work moves."""

    now = 0.0

    def perf_counter(self) -> float:
        return self.now

    def pass_by(self, seconds: float) -> None:
        self.now += seconds


@pytest.fixture
def clock_face(monkeypatch: pytest.MonkeyPatch) -> FakeTime:
    face = FakeTime()
    monkeypatch.setattr(bench, "time", face)
    return face


class Engine:
    """Every second step ends an accumulation and is longer."""

    optimizer = None
    steps = 0

    def __init__(self, face: FakeTime) -> None:
        self.face = face

    def __call__(self, seconds: float) -> None:
        self.face.pass_by(seconds)

    def backward(self, loss: torch.Tensor) -> None:
        self.face.pass_by(0.02)

    def step(self) -> None:
        self.steps += 1
        self.face.pass_by(0.05 if self.steps % 2 == 0 else 0.0)


def test_parts_of_a_step_sum_over_its_micro_batches(clock_face: FakeTime) -> None:
    watched = TimedEngine(Engine(clock_face), RankClock(Ranks(), torch.device("cpu"), 1.0, 1))
    # The last step was disturbed: medians do not mind.
    for seconds in (0.01, 0.02, 0.01, 0.01, 0.5, 0.5):
        watched(seconds)
        watched.backward(torch.zeros(()))
        watched.step()
    assert watched.average_parts(grad_accum=2) == pytest.approx([30, 40, 50])


def test_a_clock_covers_the_time_it_was_given(clock_face: FakeTime) -> None:
    clock = RankClock(Ranks(), torch.device("cpu"), 2.0, 1)
    warm = iter([5.0] * 3)  # the first calls are slow and do not count
    assert clock.count_calls(lambda: clock_face.pass_by(next(warm, 0.125)), 3) == 16
    assert clock.count_calls(lambda: clock_face.pass_by(10.0), 3) == 3
    assert clock.time_calls(lambda: clock_face.pass_by(0.5), 4) == 2.0


def test_phases_add_up_over_threads_and_only_while_watched() -> None:
    @time_phase("nap")
    def nap() -> str:
        time.sleep(0.02)
        return "done"

    nap()
    with record_phases() as seconds:
        threads = [threading.Thread(target=nap) for _ in range(3)]
        for t in threads:
            t.start()
        for t in threads:
            t.join()
        assert nap() == "done"
    nap()
    assert seconds.keys() == {"nap"}
    assert seconds["nap"] >= 4 * 0.02


def test_an_error_in_a_phase_is_raised_and_its_time_counted() -> None:
    @time_phase("bad")
    def bad() -> None:
        raise ValueError("no")

    with record_phases() as seconds, pytest.raises(ValueError, match="no"):
        bad()
    assert seconds["bad"] >= 0
