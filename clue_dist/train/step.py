"""One optimizer step, and what all ranks agree on at its end.

They agree on whether loss and gradient are finite, a signal asked to stop, and a save failed.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import torch
import torch.distributed as dist
from torch import Tensor

from clue_dist.checkpoint.saver import Saver
from clue_dist.data.batch import Batch
from clue_dist.deepspeed_internals import (
    checks_gradients,
    fill_missing_gradients,
    list_optimized,
    list_reduced_gradients,
)
from clue_dist.resilience.stop_signals import StopFlag
from clue_dist.train.engine import keeps_gradients_local
from clue_dist.train.gradients import average_other_gradients
from clue_dist.train.outcome import LateOutcome, StepOutcome
from clue_dist.train.schedule import compute_learning_rate
from clue_dist.train.trainer import Trainer


def train_step(
    trainer: Trainer,
    batches: Iterator[Batch],
    step: int,
    saver: Saver | None = None,
    stop: StopFlag | None = None,
) -> StepOutcome | LateOutcome:
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
    fill_missing_gradients(engine)
    world = trainer.ranks.world
    if world > 1 and keeps_gradients_local(trainer.setup.config, world):
        average_other_gradients(engine.module)
    if engine.basic_optimizer.guards_on_device:
        return _update_on_device(trainer, step, taken, means, saver, stop)
    norm = _measure_norm(trainer)
    outcome = _agree_on_outcome(trainer, step, taken, means, norm, saver, stop)
    engine.basic_optimizer.skip = outcome.skipped
    if norm is not None and trainer.setup.config.train.clip > 0 and not outcome.skipped:
        weights = list_optimized(engine)
        torch.nn.utils.clip_grads_with_norm_(weights, trainer.setup.config.train.clip, norm)
    if saver is not None:
        saver.wait_for_copies()
    engine.step()
    if not engine.was_step_applied():  # ZeRO found a gradient that is not finite
        outcome = replace(outcome, skipped=True)
    return outcome


def _update_on_device(
    trainer: Trainer,
    step: int,
    batches: list[Batch],
    terms: dict[str, Tensor],
    saver: Saver | None,
    stop: StopFlag | None,
) -> LateOutcome:
    """Update without a look at any value: the optimizer clips and skips by tensors."""
    gradients, is_shared_out = list_reduced_gradients(trainer.engine)
    squared_norm = torch.nn.utils.get_total_norm(gradients).double() ** 2
    # Where each rank has all gradients, all of them add the same.
    share = squared_norm if is_shared_out else squared_norm / dist.get_world_size()
    sums = _sum_over_ranks(terms["loss"], ~squared_norm.isfinite(), saver, stop, share)
    optimizer, limit = trainer.engine.basic_optimizer, trainer.setup.config.train.clip
    optimizer.found_inf = (sums[1] > 0).float()
    if limit > 0:
        optimizer.grad_scale = ((sums[4].sqrt() + 1e-6) / limit).clamp_min(1).float()
    if saver is not None:
        saver.wait_for_copies()
    trainer.engine.step()
    return LateOutcome(step, batches, terms, sums[:4])


def _measure_norm(trainer: Trainer) -> Tensor | None:
    """The norm of all gradients, (); None where DeepSpeed looks at it, and clips by it."""
    if checks_gradients(trainer.engine):
        return None
    gradients, _ = list_reduced_gradients(trainer.engine)
    return torch.nn.utils.get_total_norm(gradients)


def _agree_on_outcome(
    trainer: Trainer,
    step: int,
    batches: list[Batch],
    terms: dict[str, Tensor],
    norm: Tensor | None,
    saver: Saver | None,
    stop: StopFlag | None,
) -> StepOutcome:
    """Exchange a few numbers once. It waits for the device, as the gradient's norm does anyway."""
    is_bad = ~(terms["loss"] if norm is None else norm).isfinite()
    sums = _sum_over_ranks(terms["loss"], is_bad, saver, stop)
    return LateOutcome(step, batches, terms, sums).read_outcome()


def _sum_over_ranks(
    loss: Tensor,
    is_bad: Tensor,
    saver: Saver | None,
    stop: StopFlag | None,
    *further: Tensor,
) -> Tensor:
    """Sum over ranks what `LateOutcome` takes, and further numbers, float64."""
    loss = loss.double()
    flags = bool(stop), saver is not None and saver.has_failed
    # Filled in on the device: to copy them there would wait for it.
    filled = [loss.new_full((), float(flag)) for flag in flags]
    is_bad = (~loss.isfinite() | is_bad).double()
    sums = torch.stack([loss.nan_to_num(0, 0, 0), is_bad, *filled, *further])
    if dist.get_world_size() > 1:
        dist.all_reduce(sums)
    return sums
