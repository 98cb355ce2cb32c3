"""Losses that are not finite, and losses that jump.

A step whose loss or gradient is not finite is skipped and its cause named; a few in a row end the
run. A jump of the loss is logged alone.
"""

from __future__ import annotations

import math
from dataclasses import replace

import torch
from torch import Tensor

from clue_dist.checkpoint.run_folder import RunState
from clue_dist.data.batch import Batch
from clue_dist.errors import TrainingError
from clue_dist.train.outcome import StepOutcome
from clue_dist.train.sinks import Sinks
from clue_dist.train.trainer import Trainer

SKIP_LIMIT = 5  # skipped steps in a row that end the run
SPIKE = 8.0  # standard deviations from the running mean; absurd counts may lower a loss, too
MEMORY = 0.95  # share of the running mean and variance that a step leaves
WARM_UP_STEPS = 50  # until mean and variance are known


def judge_outcome(
    trainer: Trainer, state: RunState, outcome: StepOutcome, sinks: Sinks
) -> RunState:
    """Log what was odd about a step. Every rank must call.

    Args:
        trainer: what training works with.
        state: the state of the run, which counts the step already, and may count one more.
        outcome: what came of the step.
        sinks: where events are logged.

    Returns:
        The state with skipped steps in a row, and the usual loss, brought up to date.

    Raises:
        TrainingError: SKIP_LIMIT steps in a row were skipped; it names what was not finite.
    """
    step = outcome.step + 1  # as people count
    if not outcome.skipped:
        if state.usual is not None and _is_spike(step, state.usual, outcome.loss):
            numbers = {"loss": outcome.loss, "usual": state.usual[0]}
            sinks.write_event("loss spike", step, numbers)
        return replace(state, skipped=0, usual=_update_usual(state.usual, outcome.loss))
    culprits = find_culprits(trainer, outcome.step, outcome.batches)
    state = replace(state, skipped=state.skipped + 1)
    facts: dict[str, int | str] = {"found": culprits, "in_a_row": state.skipped}
    sinks.write_event("not finite, step skipped", step, facts)
    if state.skipped >= SKIP_LIMIT:
        raise TrainingError(
            f"loss or gradient were not finite in {SKIP_LIMIT} steps in a row; "
            "none of these changed a weight",
            where=f"step {step}",
            got=culprits,
            fix="the last checkpoint is sound: type the same command with a lower train.lr or "
            "train.clip, and it goes on from there; if values of the store are named above, "
            "mend and convert the files, and start a new run",
        )
    return state


def find_culprits(trainer: Trainer, step: int, batches: list[Batch]) -> str:
    """Name what is not finite in the micro-batches of a step: values read, and terms of the loss.

    If a rank has read such values, only ranks that have are named: some terms compare the cells of
    all ranks, so that they are not finite anywhere.
    """
    bad_values, bad_terms = [], []
    trainer.engine.eval()
    with torch.no_grad():
        for micro_step, batch in enumerate(batches):
            terms = trainer.split_loss(batch, step, micro_step)
            for modality in batch.modalities:
                if not _get_values(batch, modality).isfinite().all():
                    bad_values.append(f"values of {modality}")
            for name, value in terms.items():
                if not math.isfinite(float(value)):
                    bad_terms.append(f"term {name}")
    trainer.engine.train()
    findings = list(enumerate(trainer.ranks.gather_values((bad_values, bad_terms))))
    readers = [finding for finding in findings if finding[1][0]]
    lines = [
        f"rank {rank}: {', '.join(dict.fromkeys(values + terms))}"
        for rank, (values, terms) in readers or findings
        if values or terms
    ]
    return "; ".join(lines) or "a gradient, of finite losses"


def _get_values(batch: Batch, modality: str) -> Tensor:
    """The values of a modality, of which sparse counts hold those that are not zero."""
    counts = batch.modalities[modality].counts
    return counts if isinstance(counts, Tensor) else counts.values


def _is_spike(step: int, usual: tuple[float, float], loss: float) -> bool:
    """Whether a loss is far from its running mean. Always False in the first steps."""
    mean, variance = usual
    return step > WARM_UP_STEPS and abs(loss - mean) > SPIKE * math.sqrt(variance) + 1e-12


def _update_usual(usual: tuple[float, float] | None, loss: float) -> tuple[float, float]:
    """Running mean and variance of the loss, in which a spike counts as SPIKE and no more."""
    if usual is None:
        return loss, 0.0
    mean, variance = usual
    change = loss - mean
    limit = SPIKE * math.sqrt(variance)
    change = max(-limit, min(change, limit)) if limit else change
    return mean + (1 - MEMORY) * change, MEMORY * (variance + (1 - MEMORY) * change**2)
