"""One optimizer step, and what all ranks agree on at its end: is the loss finite, must we stop, did a save fail."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from clue_dist.checkpoint.deepspeed_internals import checks_gradients
from clue_dist.checkpoint.saver import Saver
from clue_dist.data.batch import Batch
from clue_dist.model.noise import Noise
from clue_dist.ranks import Ranks
from clue_dist.resilience.stop_signals import StopFlag
from clue_dist.train.setup import Setup


@dataclass(frozen=True)
class StepOutcome:
    """batches: this rank's micro-batches; terms: its loss and the terms of it, () each. The rest is the same on all
    ranks: loss, the mean over them; skipped: loss or gradient were not finite, and no weight has changed; stop: a
    signal came; failed: a save did not succeed."""

    batches: list[Batch]
    terms: dict[str, Tensor]
    loss: float
    skipped: bool
    stop: bool
    failed: bool


def train_step(
    engine: Any,
    setup: Setup,
    ranks: Ranks,
    batches: Iterator[Batch],
    step: int,
    device: torch.device,
    saver: Saver | None = None,
    stop: StopFlag | None = None,
) -> StepOutcome:
    """grad_accum micro-batches, each the same global set of cells whatever the ranks, and one update."""
    for group in engine.optimizer.param_groups:
        group["lr"] = compute_learning_rate(setup, step) * group["lr_scale"]
    sums: dict[str, Tensor] = {}
    seen, micros = [], setup.config.train.grad_accum
    for micro in range(micros):
        batch = next(batches).to(device)
        loss, terms = engine(
            batch, make_noise(setup, ranks, step, micro, device), compute_kl_weight(setup, step)
        )
        engine.backward(loss)
        for name, value in {"loss": loss.detach(), **terms}.items():
            sums[name] = sums.get(name, 0.0) + value / micros
        seen.append(batch)
        if micro < micros - 1:
            engine.step()  # DeepSpeed updates at the last micro-batch alone
    outcome = _agreed(engine, seen, sums, stop, saver)
    engine.basic_optimizer.skip = outcome.skipped
    if saver is not None:
        saver.before_update()
    engine.step()
    if not engine.was_step_applied():  # ZeRO found a gradient that is not finite
        outcome = replace(outcome, skipped=True)
    return outcome


def _agreed(
    engine: Any,
    seen: list[Batch],
    terms: dict[str, Tensor],
    stop: StopFlag | None,
    saver: Saver | None,
) -> StepOutcome:
    """One exchange of a few numbers: it waits for the device, as the norm of the gradient does right after."""
    loss = terms["loss"].double()
    bad = ~loss.isfinite()
    if not checks_gradients(engine):
        grads = [p.grad for p in engine.module.parameters() if p.grad is not None]
        bad = bad | ~torch.nn.utils.get_total_norm(grads).isfinite()
    flags = [bool(stop), saver is not None and saver.failed]
    told = torch.cat(
        [torch.stack([loss.nan_to_num(0, 0, 0), bad.double()]), loss.new_tensor(flags)]
    )
    dist.all_reduce(told)
    mean, n_bad, n_stop, n_failed = told.tolist()
    return StepOutcome(
        seen, terms, mean / dist.get_world_size(), n_bad > 0, n_stop > 0, n_failed > 0
    )


def make_noise(setup: Setup, ranks: Ranks, step: int, micro: int, device: torch.device) -> Noise:
    """All that a micro-batch draws at random."""
    c, plan = setup.config, setup.plan
    number = step * c.train.grad_accum + micro
    return Noise(c.seed, number, plan.stratum_shares, plan.lanes, ranks.rank, ranks.world, device)


def compute_learning_rate(setup: Setup, step: int) -> float:
    """Linear warm-up, then a cosine down to final_lr; a pure function of the step."""
    t = setup.config.train
    warm = t.warmup * setup.total_steps
    if step < warm:
        return t.lr * (step + 1) / (warm + 1)
    progress = (step - warm) / max(setup.total_steps - warm, 1)
    return t.lr * (t.final_lr + (1 - t.final_lr) * 0.5 * (1 + math.cos(math.pi * progress)))


def compute_kl_weight(setup: Setup, step: int) -> float:
    """Factor on lambda_kl: rises from 0 to 1 over the first kl_warmup of the steps."""
    warm = setup.config.train.kl_warmup * setup.total_steps
    return min(1.0, (step + 1) / warm) if warm else 1.0
