"""Learning rate and KL weight warm up, and every step is trained with those of its own number."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from clue_dist.config import Config, DataConfig, TrainConfig
from clue_dist.data.batch import Batch
from clue_dist.model.noise import Noise
from clue_dist.ranks import Ranks
from clue_dist.train.engine import OPTIMIZERS
from clue_dist.train.schedule import compute_kl_weight, compute_learning_rate
from clue_dist.train.step import train_step
from clue_dist.train.trainer import Trainer

STEPS = 20
# A fifth of the steps for the learning rate, half of them for the KL weight.
CONFIG = Config(
    train=TrainConfig(lr=0.1, warmup=0.2, final_lr=0.5, kl_warmup=0.5, grad_accum=2),
    data=DataConfig(lanes=4, batch_size=16),
)


def make_setup(config: Config = CONFIG) -> Any:
    plan = SimpleNamespace(compose_batch=lambda _: {"rna": 8}, lanes=4)
    return SimpleNamespace(config=config, total_steps=STEPS, plan=plan)


class RecordingEngine:
    """Takes the place of DeepSpeed's and of the objective: it notes KL weights and rates."""

    def __init__(self) -> None:
        self.weight = torch.nn.Parameter(torch.ones(1))
        groups = [{"params": [self.weight], "lr_scale": 1.0}]
        groups.append({"params": [torch.nn.Parameter(torch.ones(1))], "lr_scale": 10.0})
        self.optimizer = self.basic_optimizer = OPTIMIZERS["adamw"](groups, lr=1.0, eps=1e-8)
        self.module = torch.nn.ParameterList([self.weight])
        self.kl_weights: list[float] = []
        self.rates: list[list[float]] = []

    def __call__(self, compute: Callable[[Any], Any]) -> Any:
        return compute(self)

    def compute_loss(
        self, _batch: object, _noise: Noise, kl_weight: float
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        self.kl_weights.append(kl_weight)
        return self.weight.sum(), {}

    def backward(self, loss: torch.Tensor) -> None:
        loss.backward()

    def step(self) -> None:
        self.rates.append([group["lr"] for group in self.optimizer.param_groups])

    def was_step_applied(self) -> bool:
        return True


def test_the_learning_rate_rises_over_the_warm_up_and_falls_to_its_last() -> None:
    rates = [compute_learning_rate(make_setup(), step) for step in range(STEPS)]
    assert rates[:5] == pytest.approx([0.02, 0.04, 0.06, 0.08, 0.1])  # never 0
    assert all(later < before for before, later in pairwise(rates[4:]))
    assert compute_learning_rate(make_setup(), STEPS) == pytest.approx(0.05)


def test_the_kl_weight_rises_to_one_and_stays_there() -> None:
    weights = [compute_kl_weight(make_setup(), step) for step in range(STEPS)]
    assert weights == pytest.approx([0.1 * n for n in range(1, 10)] + [1.0] * 11)
    no_warm_up = Config(train=TrainConfig(kl_warmup=0))
    assert compute_kl_weight(make_setup(no_warm_up), 0) == 1.0


def test_each_step_is_trained_with_its_own_rate_and_kl_weight(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("clue_dist.train.step._agree_on_outcome", _make_outcome)
    engine, setup = RecordingEngine(), make_setup()
    trainer = Trainer(engine, setup, Ranks(), torch.device("cpu"))
    batches = iter([Batch(torch.ones(8, 1), torch.ones(8), {}) for _ in range(2 * STEPS)])
    for step in range(STEPS):
        train_step(trainer, batches, step)
    steps = [step for step in range(STEPS) for _ in range(2)]  # two micro-batches each
    assert engine.kl_weights == [compute_kl_weight(setup, step) for step in steps]
    rates = [compute_learning_rate(setup, step) for step in steps]
    assert engine.rates == [[rate, 10.0 * rate] for rate in rates]


def _make_outcome(*_: object) -> SimpleNamespace:
    return SimpleNamespace(skipped=False)
