"""A checkpoint holds the weights of its own step, in files that others may read."""

from __future__ import annotations

import itertools
import os
import stat
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from clue_dist.checkpoint import engine_state, saver
from clue_dist.checkpoint.run_folder import RunState, list_checkpoints, list_shard_files
from clue_dist.checkpoint.saver import Saver
from clue_dist.ranks import Ranks
from clue_dist.train import step
from clue_dist.train.outcome import StepOutcome
from clue_dist.train.step import train_step
from clue_dist.train.trainer import Trainer

LABEL = "weights:0:weight"
LARGE = 2 * saver.SMALL  # elements: what is smaller is copied at once


class CountingEngine:
    """An engine whose update adds one to every weight."""

    def __init__(self) -> None:
        self.weight, self.module = torch.zeros(LARGE), torch.nn.Module()
        self.optimizer = SimpleNamespace(param_groups=[])
        self.basic_optimizer = SimpleNamespace(skip=False, guards_on_device=False)
        self.updated = threading.Event()

    def backward(self, loss: Tensor) -> None:
        pass

    def step(self) -> None:
        self.weight += 1
        self.updated.set()

    def was_step_applied(self) -> bool:
        return True


@pytest.fixture
def engine(monkeypatch: pytest.MonkeyPatch) -> CountingEngine:
    """An engine of which a `Saver` saves the one weight."""
    counting = CountingEngine()
    monkeypatch.setattr(engine_state, "collect_shapes", lambda _: {"weight": [LARGE]})
    monkeypatch.setattr(engine_state, "collect_tensors", lambda engine, _: {LABEL: engine.weight})
    return counting


def make_trainer(engine: CountingEngine, monkeypatch: pytest.MonkeyPatch) -> Trainer:
    """A trainer whose loss is zero."""
    outcome = StepOutcome(0, [], {}, 0.0, skipped=False, stop_requested=False, save_failed=False)
    monkeypatch.setattr(step, "_agree_on_outcome", lambda *_: outcome)
    settings = SimpleNamespace(grad_accum=1, clip=0.0)
    setup: Any = SimpleNamespace(config=SimpleNamespace(train=settings))
    trainer = Trainer(engine, setup, Ranks(), torch.device("cpu"))
    monkeypatch.setattr(Trainer, "compute_loss", lambda *_: (torch.zeros(()), {}))
    return trainer


def iterate_batches() -> Iterator[Any]:
    while True:
        yield SimpleNamespace(to=lambda _: None)


def test_the_update_waits_until_what_it_changes_is_copied(
    tmp_path: Path, engine: CountingEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    awaited, prepare, wait = threading.Event(), saver._prepare_copy, Saver.wait_for_copies

    def prepare_late(views: Mapping[str, Tensor]) -> Callable[[], dict[str, Tensor]]:
        copy = prepare(views)

        def copy_late() -> dict[str, Tensor]:
            awaited.wait()
            engine.updated.wait(0.2)  # an update that does not wait comes first
            return copy()

        return copy_late

    def wait_for_copies(saver: Saver) -> None:
        awaited.set()
        wait(saver)

    monkeypatch.setattr(saver, "_prepare_copy", prepare_late)
    monkeypatch.setattr(Saver, "wait_for_copies", wait_for_copies)
    trainer = make_trainer(engine, monkeypatch)
    with Saver(tmp_path, engine, Ranks(), keep=1) as saving:
        saving.save_checkpoint(RunState(step=1, world=1, fingerprint="f"))
        train_step(trainer, iterate_batches(), 1, saving)
        saving.finish()
    assert engine.weight.unique().tolist() == [1]
    (file,) = list_shard_files(list_checkpoints(tmp_path / "checkpoints")[0])
    assert load_file(file)[LABEL].unique().tolist() == [0]


@pytest.mark.parametrize("umask", [0o022, 0o007])
def test_every_file_has_the_permissions_that_the_umask_leaves(
    tmp_path: Path, engine: CountingEngine, umask: int
) -> None:
    before = os.umask(umask)
    try:
        with Saver(tmp_path, engine, Ranks(), keep=1) as saving:
            state = RunState(step=1, world=1, fingerprint="f", best_step=1)
            saving.save_best_weights(state)
            saving.save_checkpoint(state)
            saving.finish()
    finally:
        os.umask(before)
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert len(files) == 6
    assert {stat.S_IMODE(path.stat().st_mode) for path in files} == {0o666 & ~umask}


def test_what_somebody_set_aside_under_another_name_stays(
    tmp_path: Path, engine: CountingEngine
) -> None:
    for name in ("step-mine", "step-00000001", "step-00000009"):
        (tmp_path / "checkpoints" / f"{name}.aside").mkdir(parents=True)
    with Saver(tmp_path, engine, Ranks(), keep=1) as saving:
        saving.save_checkpoint(RunState(step=2, world=1, fingerprint="f"))
        saving.finish()
    kept = {path.name for path in (tmp_path / "checkpoints").iterdir()}
    assert kept == {"step-00000002", "step-00000009.aside", "step-mine.aside"}


def test_what_a_checkpoint_consists_of_is_on_the_disk_before_it_counts(
    tmp_path: Path, engine: CountingEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    synced: list[Path] = []
    monkeypatch.setattr(saver, "sync_to_disk", synced.append)
    for kind in ("checkpoints", "best"):
        with Saver(tmp_path, engine, Ranks(), keep=1) as saving:
            save = saving.save_checkpoint if kind == "checkpoints" else saving.save_best_weights
            save(RunState(step=1, world=1, fingerprint="f", best_step=1))
            saving.finish()
        (folder,) = list_checkpoints(tmp_path / kind)
        *files, partial, parent = synced
        assert {path.name for path in folder.iterdir()} <= {path.name for path in files}
        assert partial.suffix == ".partial"
        assert {path.parent for path in files} == {partial}
        assert parent == folder.parent
        synced.clear()


def test_the_time_that_training_waits_for_saving_is_counted(
    tmp_path: Path, engine: CountingEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    seconds = itertools.count()  # every look at the clock takes a second
    clock = SimpleNamespace(perf_counter=lambda: next(seconds), monotonic=time.monotonic)
    monkeypatch.setattr(saver, "time", clock)
    with Saver(tmp_path, engine, Ranks(), keep=1) as saving:
        saving.save_checkpoint(RunState(step=1, world=1, fingerprint="f"))
        assert saving.waited_seconds == 2  # for earlier saves, and to prepare the copy
        saving.wait_for_copies()
        assert saving.waited_seconds == 3
        saving.finish()
        assert saving.waited_seconds == 5


def test_what_has_been_saved_is_not_waited_for_again(
    tmp_path: Path, engine: CountingEngine
) -> None:
    with Saver(tmp_path, engine, Ranks(), keep=2) as saving:
        for step_number in range(1, 5):
            saving.save_checkpoint(RunState(step=step_number, world=1, fingerprint="f"))
            assert [step_saved for step_saved, _ in saving._writes] == [step_number]
        saving.finish()
        assert not saving._writes
    names = [folder.name for folder in list_checkpoints(tmp_path / "checkpoints")]
    assert names == ["step-00000004", "step-00000003"]
