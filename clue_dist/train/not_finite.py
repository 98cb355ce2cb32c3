"""Losses that are not finite, and losses that jump: skipped, named, and after a few in a row the end of the run."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from clue_dist.checkpoint.run_folder import RunState
from clue_dist.data.batch import Batch
from clue_dist.errors import TrainingError
from clue_dist.ranks import Ranks
from clue_dist.train.setup import Setup
from clue_dist.train.sinks import Sinks
from clue_dist.train.step import StepOutcome, compute_kl_weight, make_noise

SKIP_LIMIT = 5  # steps in a row
SPIKE = 8.0  # standard deviations from the mean of late, either way: absurd counts may lower a loss, too
MEMORY = 0.95  # of mean and variance, a step
WARM = 50  # steps until they are known


def judge_outcome(
    engine: Any, setup: Setup, ranks: Ranks, state: RunState, outcome: StepOutcome, sinks: Sinks
) -> RunState:
    """The state after a step (`state.step` counts it already); what was odd is logged. Every rank must call.

    Raises:
        TrainingError: SKIP_LIMIT steps in a row were skipped; what was not finite is named.
    """
    if not outcome.skipped:
        if _is_spike(state, outcome.loss):
            assert state.usual is not None
            sinks.event("loss spike", state.step, {"loss": outcome.loss, "usual": state.usual[0]})
        return replace(state, skipped=0, usual=_usual(state.usual, outcome.loss))
    found = find_culprits(engine, setup, ranks, state.step - 1, outcome.batches)
    state = replace(state, skipped=state.skipped + 1)
    sinks.event("not finite, step skipped", state.step, {"found": found, "in_a_row": state.skipped})
    if state.skipped >= SKIP_LIMIT:
        raise TrainingError(
            f"loss or gradient were not finite in {SKIP_LIMIT} steps in a row; none of these changed a weight",
            where=f"step {state.step}",
            got=found,
            fix="the last checkpoint is sound: type the same command with a lower train.lr or train.clip, and it goes "
            "on from there; if values of the store are named above, convert the mended files and start a new run",
        )
    return state


def find_culprits(engine: Any, setup: Setup, ranks: Ranks, step: int, seen: list[Batch]) -> str:
    """What is not finite in the micro-batches of a step: values read, loss terms by modality.

    Of the ranks that read such values, if there are any: some terms compare the cells of all ranks.
    """
    values, broken = [], []
    engine.eval()
    with torch.no_grad():
        for micro, batch in enumerate(seen):
            device = batch.observed.device
            noise = make_noise(setup, ranks, step, micro, device)
            _, terms = engine(batch, noise, compute_kl_weight(setup, step), True)
            bad = [name for name, value in terms.items() if not math.isfinite(float(value))]
            values += [
                f"values of {m}" for m in batch.modalities if not _values(batch, m).isfinite().all()
            ]
            broken += [f"term {name}" for name in bad]
    engine.train()
    told = list(enumerate(ranks.all_gather_object((values, broken))))
    readers = [one for one in told if one[1][0]] or told
    lines = [f"rank {r}: {', '.join(dict.fromkeys(v + b))}" for r, (v, b) in readers if v or b]
    return "; ".join(lines) or "a gradient, of finite losses"


def _values(batch: Batch, modality: str) -> Tensor:
    counts = batch.modalities[modality].counts
    return counts if isinstance(counts, Tensor) else counts.values


def _is_spike(state: RunState, loss: float) -> bool:
    if state.usual is None or state.step <= WARM:
        return False
    mean, variance = state.usual
    return abs(loss - mean) > SPIKE * math.sqrt(variance) + 1e-12


def _usual(usual: tuple[float, float] | None, loss: float) -> tuple[float, float]:
    """Running mean and variance, a spike counting as no more than one."""
    if usual is None:
        return loss, 0.0
    mean, variance = usual
    change = loss - mean
    limit = SPIKE * math.sqrt(variance)
    change = max(-limit, min(change, limit)) if limit else change
    return mean + (1 - MEMORY) * change, MEMORY * (variance + (1 - MEMORY) * change**2)
