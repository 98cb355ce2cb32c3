"""The arithmetic and the words of launch/bench.py."""

import threading
import time

import pytest
import torch

from clue_dist.data.phases import phase, watch
from clue_dist.ranks import Ranks
from clue_dist.train.bench import Both, Clock, Data, Model, Report, Watched, shares, verdict


def data(cells_per_s: float) -> Data:
    return Data(cells_per_s / 512, cells_per_s, 1e3 * cells_per_s, {"read and decode": 0.6, "gather": 0.4})


def model(cells_per_s: float) -> Model:
    return Model(512e3 / cells_per_s, 1.0, 2.0, 0.5, cells_per_s)


def both(waited: float) -> Both:
    return Both(1.0, 1.0, waited)


def test_the_model_is_the_limit_where_no_step_waits() -> None:
    told = verdict(data(14_990), model(1_000), both(0.01), "cuda")
    assert told == "the model is the limit: the loader could feed 14 such GPUs"
    assert verdict(data(1_590), model(1_000), both(0.0), "cpu").endswith("could feed 1.5 such models")


def test_data_is_the_limit_where_steps_wait() -> None:
    told = verdict(data(400), model(1_000), both(0.6), "cuda")
    assert told.startswith("data is the limit: the model could take 2.5 times what the loader gives")
    assert "read and decode (60%)" in told


def test_a_loader_that_keeps_up_alone_but_not_beside_the_model_wants_cores() -> None:
    told = verdict(data(3_000), model(1_000), both(0.3), "cuda")
    assert "only beside the model" in told
    assert "could feed 3.0 such GPUs" in told
    assert "more CPU cores" in told


def test_shares_sum_to_one_and_name_the_rest() -> None:
    assert shares({"read": 2.0, "gather": 1.0}, 4.0) == {"read": 0.5, "gather": 0.25, "other": 0.25}
    assert shares({"read": 6.0, "gather": 2.0}, 4.0) == {"read": 0.75, "gather": 0.25, "other": 0.0}  # two threads


def test_the_report_ends_with_the_verdict_and_json_has_it_all() -> None:
    about = {"store": "s.zarr", "batch_size": 512, "ranks": 2, "name": "H100", "precision": "bf16", "device": "cuda"}
    report = Report(about, data(2_000), model(1_000), both(0.0))
    assert report.text().splitlines()[-1] == "the model is the limit: the loader could feed 2.0 such GPUs"
    assert report.as_dict()["feeds"] == 2.0
    assert report.as_dict()["data"]["phases"]["gather"] == 0.4


class Engine:
    """Forward, backward and step of known length; every second step ends an accumulation and is longer."""

    optimizer = None
    steps = 0

    def __call__(self, seconds: float) -> None:
        time.sleep(seconds)

    def backward(self, loss: torch.Tensor) -> None:
        time.sleep(0.02)

    def step(self) -> None:
        self.steps += 1
        time.sleep(0.05 if self.steps % 2 == 0 else 0.0)


def test_parts_of_a_step_sum_over_its_micro_batches() -> None:
    watched = Watched(Engine(), Clock(Ranks(), torch.device("cpu"), 1.0, 1))
    for _ in range(6):
        watched(0.01)
        watched.backward(torch.zeros(()))
        watched.step()
    forward, backward, optimizer = watched.ms_per_step(grad_accum=2)
    assert 20 <= forward < backward
    assert backward >= 40
    assert 50 <= optimizer < 100


def test_phases_add_up_over_threads_and_only_while_watched() -> None:
    @phase("nap")
    def nap() -> str:
        time.sleep(0.02)
        return "done"

    nap()
    with watch() as seconds:
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
    @phase("bad")
    def bad() -> None:
        raise ValueError("no")

    with watch() as seconds, pytest.raises(ValueError, match="no"):
        bad()
    assert seconds["bad"] >= 0


def test_a_clock_covers_the_time_it_was_given() -> None:
    clock = Clock(Ranks(), torch.device("cpu"), 0.2, 1)
    assert 2 <= clock.calls(lambda: time.sleep(0.01), 2) <= 20
    assert clock.calls(lambda: time.sleep(0.2), 3) == 3
