"""One optimizer step, and what all ranks agree on at its end.

They agree on whether loss and gradient are finite, a signal asked to stop, and a save failed.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
import torch.distributed as dist
from torch import Tensor

from clue_dist.checkpoint.saver import Saver
from clue_dist.data.batch import Batch
from clue_dist.deepspeed_internals import checks_gradients
from clue_dist.resilience.stop_signals import StopFlag
from clue_dist.train.schedule import compute_learning_rate
from clue_dist.train.trainer import Trainer


@dataclass(frozen=True)
class StepOutcome:
    """What came of an optimizer step."""

    # What belongs to this rank alone:
    batches: list[Batch]  # micro-batches
    terms: dict[str, Tensor]  # loss and its terms, () each
    # What is the same on all ranks:
    loss: float  # mean over ranks
    skipped: bool  # loss or gradient were not finite, and no weight has changed
    stop_requested: bool  # a signal came to one rank at least
    save_failed: bool  # one rank at least could not write what it had to save


def train_step(
    trainer: Trainer,
    batches: Iterator[Batch],
    step: int,
    saver: Saver | None = None,
    stop: StopFlag | None = None,
) -> StepOutcome:
    """Take `grad_accum` micro-batches and make one update. Every rank must call.

    Each micro-batch is the same global set of cells, however many ranks share it.

    Args:
        trainer: what training works with.
        batches: where the micro-batches come from.
        step: the step, counted from 0.
        saver: it copies the weights of the step before, for which the update waits.
        stop: whether this rank was asked to stop.
    """
    engine, micro_steps = trainer.engine, trainer.setup.config.train.grad_accum
    for group in engine.optimizer.param_groups:
        group["lr"] = compute_learning_rate(trainer.setup, step) * group["lr_scale"]
    means: dict[str, Tensor] = {}
    taken = []
    for micro_step in range(micro_steps):
        batch = next(batches).to(trainer.device)
        loss, terms = trainer.compute_loss(batch, step, micro_step)
        engine.backward(loss)
        for name, value in {"loss": loss.detach(), **terms}.items():
            means[name] = means.get(name, 0.0) + value / micro_steps
        taken.append(batch)
        if micro_step < micro_steps - 1:
            engine.step()  # DeepSpeed counts micro-batches, and updates at the last one alone
    outcome = _agree_on_outcome(trainer, taken, means, saver, stop)
    engine.basic_optimizer.skip = outcome.skipped
    if saver is not None:
        saver.wait_for_copies()
    engine.step()
    if not engine.was_step_applied():  # ZeRO found a gradient that is not finite
        outcome = replace(outcome, skipped=True)
    return outcome


def _agree_on_outcome(
    trainer: Trainer,
    batches: list[Batch],
    terms: dict[str, Tensor],
    saver: Saver | None,
    stop: StopFlag | None,
) -> StepOutcome:
    """Exchange a few numbers once. It waits for the device, as the gradient's norm does anyway."""
    loss = terms["loss"].double()
    is_bad = ~loss.isfinite()
    if not checks_gradients(trainer.engine):
        parameters = trainer.engine.module.parameters()
        gradients = [weight.grad for weight in parameters if weight.grad is not None]
        is_bad = is_bad | ~torch.nn.utils.get_total_norm(gradients).isfinite()
    flags = bool(stop), saver is not None and saver.has_failed
    # Filled in on the device: to copy them there would wait for it.
    filled = [loss.new_full((), float(flag)) for flag in flags]
    sums = torch.stack([loss.nan_to_num(0, 0, 0), is_bad.double(), *filled])
    dist.all_reduce(sums)
    loss_sum, n_bad, n_stops, n_failures = sums.tolist()
    mean = loss_sum / dist.get_world_size()
    return StepOutcome(batches, terms, mean, n_bad > 0, n_stops > 0, n_failures > 0)
