"""On a GPU the host learns a step late what came of it, and the device itself clips and skips."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from clue_dist.model import trunk
from clue_dist.model.imputation import keep_sources
from clue_dist.ranks import Ranks
from clue_dist.train import engine as engines
from clue_dist.train.outcome import LateOutcome, OutcomeReader, StepOutcome
from clue_dist.train.step import train_step
from clue_dist.train.trainer import Trainer
from tests.benchmarks.gpu.counting import count_work
from tests.stores import make_store
from tests.unit.run_helpers import MODEL, make_setup


@pytest.fixture
def group() -> None:
    """Join a process group of one, as training does."""
    if not dist.is_initialized():
        engines.join_process_group(Ranks())


def make_late(step: int, stops: float = 0.0) -> LateOutcome:
    sums = torch.tensor([1.0 + step, 0.0, stops, 0.0], dtype=torch.float64)
    return LateOutcome(step, [], {}, sums)


def read_steps(reader: OutcomeReader, latest: Any, wait: bool = False) -> list[int]:
    return [outcome.step for outcome in reader.read_outcomes(latest, wait)]


def test_late_outcomes_come_in_order_and_all_of_them_when_they_must(group: None) -> None:
    reader = OutcomeReader()
    assert read_steps(reader, make_late(0)) == []
    assert read_steps(reader, make_late(1)) == [0]
    assert read_steps(reader, make_late(2), wait=True) == [1, 2]
    assert read_steps(reader, make_late(3)) == []
    # A run that stops keeps the state of its last step.
    assert read_steps(reader, make_late(4, stops=1.0)) == [3]
    assert read_steps(reader, make_late(5)) == [4, 5]


def test_an_outcome_that_is_known_is_given_at_once() -> None:
    known = StepOutcome(3, [], {}, 1.0, skipped=False, stop_requested=False, save_failed=False)
    assert OutcomeReader().read_outcomes(known, False) == [known]


@pytest.mark.slow
@pytest.mark.parametrize("optimizer", ["adamw", "rmsprop"])
def test_a_batch_without_a_modality_updates_its_weights_as_on_several_ranks(
    tmp_path: Path, group: None, optimizer: str
) -> None:
    make_store(tmp_path / "s.zarr")
    settings = {"epochs": 8, "optimizer": optimizer, "lr": 0.01}
    setup = make_setup(tmp_path / "s.zarr", train=settings, data={"batch_size": 16})
    weights = []
    for stage in (0, 1):  # ZeRO-1 has a gradient of every weight, as several ranks have
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(engines, "choose_zero_stage", lambda *_, stage=stage: stage)
            engine = engines.build_engine(setup, Ranks(), torch.device("cpu"))
        trainer = Trainer(engine, setup, Ranks(), torch.device("cpu"))
        names = trainer.model.modalities
        with trainer.open_loader(0) as loader:
            train_step(trainer, loader, 0)
            batches = (keep_sources(batch, names, names[:1]) for batch in loader)
            train_step(trainer, batches, 1)
        weights.append(torch.cat([p.detach().flatten() for p in engine.module.parameters()]))
        n_updates = {int(state["step"]) for state in engine.basic_optimizer.state.values()}
        assert n_updates == {2}
        engine.destroy()
    assert torch.allclose(*weights, rtol=1e-4, atol=1e-6)


@pytest.mark.slow
def test_one_rank_keeps_the_memory_of_gradients_and_trains_as_if_it_were_fresh(
    tmp_path: Path, group: None
) -> None:
    make_store(tmp_path / "s.zarr")
    setup = make_setup(
        tmp_path / "s.zarr",
        model=MODEL | {"decoder": {"hidden": 8, "features_per_step": 5}},
        train={"epochs": 8, "lr": 0.01, "grad_accum": 2},
        data={"batch_size": 32},
    )
    weights = []
    for fresh in (True, False):
        with pytest.MonkeyPatch.context() as patch:
            if fresh:
                patch.setattr(engines, "keep_gradient_memory", lambda _: None)
            engine = engines.build_engine(setup, Ranks(), torch.device("cpu"))
        trainer = Trainer(engine, setup, Ranks(), torch.device("cpu"))
        places = []
        with trainer.open_loader(0) as loader:
            for step in range(4):
                train_step(trainer, loader, step)
                places.append([p.grad for p in engine.module.parameters()])
        weights.append(torch.cat([p.detach().flatten() for p in engine.module.parameters()]))
        for first, last in zip(places[0], places[-1], strict=True):
            assert (last is None) if fresh else (last is first and not last.any())
        engine.destroy()
    assert torch.equal(*weights)


def train_some(path: Path, stage: int, guarded: bool, limit: float) -> tuple[Any, list[Any]]:
    """Take four steps, the third with a gradient that is NaN; count the syncs of the last."""
    setup = make_setup(
        path,
        train={"zero_stage": stage, "epochs": 8, "clip": limit, "lr": 0.01},
        data={"batch_size": 16},
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(engines, "can_guard_on_device", lambda *_: guarded)
        patch.setattr(engines, "choose_zero_stage", lambda *_: stage)  # on one rank, too
        engine = engines.build_engine(setup, Ranks(), torch.device("cpu"))
    trainer, outcomes = Trainer(engine, setup, Ranks(), torch.device("cpu")), []
    weight = next(p for p in engine.module.parameters() if p.requires_grad)
    with trainer.open_loader(0) as loader:
        for step in range(4):
            hook = weight.register_hook(lambda g: g * torch.nan) if step == 2 else None
            with count_work() as counts:
                latest = train_step(trainer, loader, step)
            if hook is not None:
                hook.remove()
            outcomes.append(latest.read_outcome() if isinstance(latest, LateOutcome) else latest)
            outcomes[-1] = outcomes[-1].loss, outcomes[-1].skipped
    weights = torch.cat([p.detach().flatten() for p in engine.module.parameters()])
    engine.destroy()
    return weights, [*outcomes, counts]


@pytest.mark.slow
@pytest.mark.parametrize(("stage", "limit"), [(0, 0.1), (1, 0.1), (2, 0.1), (1, 0.0)])
def test_an_update_guarded_on_the_device_is_the_same_and_waits_for_nothing(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, group: None, stage: int, limit: float
) -> None:
    make_store(tmp_path / "s.zarr")
    monkeypatch.setattr(trunk, "_multiply_rows_on_cpu", trunk._multiply_rows)  # as on a GPU
    weights, (*outcomes, counts) = train_some(tmp_path / "s.zarr", stage, False, limit)
    same_weights, (*same_outcomes, fewer) = train_some(tmp_path / "s.zarr", stage, True, limit)
    assert torch.allclose(weights, same_weights, rtol=1e-4, atol=1e-6)
    for (loss, skipped), (same_loss, same_skipped) in zip(outcomes, same_outcomes, strict=True):
        assert loss == pytest.approx(same_loss, rel=1e-5)
        assert skipped is same_skipped
    assert [skipped for _, skipped in same_outcomes] == [False, False, True, False]
    assert "outcome.py" in counts.format_places()
    assert not fewer.blocking_copies, fewer.format_places()
    assert not fewer.syncs, fewer.format_places()
