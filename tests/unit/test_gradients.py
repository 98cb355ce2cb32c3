"""What ranks exchange of gradients: the scored rows of decoders, and all others as one tensor."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from clue_dist.config import Config
from clue_dist.deepspeed_internals import fill_missing_gradients
from clue_dist.model.decoders import OutputLayer
from clue_dist.ranks import Ranks
from clue_dist.train import engine as engines
from clue_dist.train import gradients
from clue_dist.train.step import train_step
from clue_dist.train.trainer import Trainer
from tests.benchmarks.gpu.workload import TINY, TINY_MODEL, make_batch, make_noise, make_objective
from tests.stores import make_store
from tests.unit.run_helpers import make_setup


def test_only_scored_rows_go_through_the_hook() -> None:
    torch.manual_seed(0)
    layer, h, features = OutputLayer(3, 10), torch.randn(4, 3), torch.tensor([2, 7])
    layer(h, features).sum().backward()
    assert layer.weight.grad is not None
    expected, seen = 4 * layer.weight.grad, []

    def triple(rows: Tensor) -> Tensor:
        seen.append(rows.shape)
        return 3 * rows

    layer.row_hook = triple
    layer(h, features).sum().backward()  # adds to the gradient that there is, in place
    assert seen == [(2, 3)]
    torch.testing.assert_close(layer.weight.grad, expected)
    with torch.no_grad():
        layer(h, features)  # nothing to go through it


def test_every_gradient_is_averaged_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two ranks, of which the other one has gradients of 1 everywhere."""
    job = SimpleNamespace(get_world_size=lambda: 2, all_reduce=lambda mean: mean.add_(0.5))
    monkeypatch.setattr(gradients, "dist", job)
    alone, shared = (make_objective(TINY, TINY_MODEL) for _ in range(2))
    gradients.average_scored_rows(shared.model)
    for objective in (alone, shared):
        objective.compute_loss(make_batch(TINY), make_noise(TINY, 0))[0].backward()
        optimizer = torch.optim.SGD(objective.parameters())
        fill_missing_gradients(SimpleNamespace(optimizer=optimizer))
    gradients.average_other_gradients(shared)
    hooked = [f"model.decoders.{i}.rate.weight" for i in (0, 1)]  # of 60 and 90 features, 40 a step
    for (name, weight), same in zip(alone.named_parameters(), shared.parameters(), strict=True):
        assert weight.grad is not None
        assert same.grad is not None
        expected = (weight.grad + 1) / 2
        if name in hooked:
            rows = weight.grad.any(1)
            assert int(rows.sum()) == TINY.features_per_step
            expected[~rows] = 0
        torch.testing.assert_close(same.grad, expected, msg=name)


def test_a_rank_alone_exchanges_no_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gradients, "dist", SimpleNamespace(get_world_size=lambda: 1))
    objective = make_objective(TINY, TINY_MODEL)
    gradients.average_scored_rows(objective.model)
    objective.compute_loss(make_batch(TINY), make_noise(TINY, 0))[0].backward()


def test_deepspeed_leaves_gradients_where_each_rank_has_all_of_them() -> None:
    for precision, stage, expected in (("fp32", 0, True), ("fp32", 1, True), ("fp32", 2, False)):
        config = Config(train={"precision": precision, "zero_stage": stage})
        assert engines.keeps_gradients_local(config, 2) is expected
    assert not engines.keeps_gradients_local(Config(train={"precision": "bf16"}), 2)


def test_the_hook_sees_all_rows_where_all_features_are_scored() -> None:
    layer, h = OutputLayer(3, 10), torch.randn(4, 3)
    layer.row_hook = lambda rows: 3 * rows
    for times in (1, 2):  # a hook for each forward pass
        layer(h, None).sum().backward()
        assert layer.weight.grad is not None
        torch.testing.assert_close(layer.weight.grad, 3 * times * h.sum(0).expand(10, 3))


@pytest.mark.slow
def test_zero_1_updates_from_where_the_backward_pass_adds_gradients_up(tmp_path: Path) -> None:
    if not dist.is_initialized():
        engines.join_process_group(Ranks())
    make_store(tmp_path / "s.zarr")
    train = {"epochs": 8, "lr": 0.01, "grad_accum": 2, "clip": 0.1}
    setup = make_setup(tmp_path / "s.zarr", train=train, data={"batch_size": 32})
    weights: list[Tensor] = []
    for stage in (0, 1):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(engines, "choose_zero_stage", lambda *_, stage=stage: stage)
            engine: Any = engines.build_engine(setup, Ranks(), torch.device("cpu"))
        trainer, places = Trainer(engine, setup, Ranks(), torch.device("cpu")), []
        with trainer.open_loader(0) as loader:
            for step in range(4):
                train_step(trainer, loader, step)
                places.append([find_place(weight) for weight in engine.module.parameters()])
        assert places[0] == places[-1]
        assert not any(weight.grad.any() for weight in engine.module.parameters())
        weights.append(nn.utils.parameters_to_vector(engine.module.parameters()).detach().clone())
        engine.destroy()
    torch.testing.assert_close(*weights, rtol=1e-4, atol=1e-6)


def find_place(weight: Any) -> int:
    """Where the gradient of a weight lies in memory."""
    place: int = weight.grad.data_ptr()
    return place
