"""Held-out cells are scored: their scores pick the weights that are kept, and can end training."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import combinations
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from clue_dist.checkpoint.run_folder import RunState
from clue_dist.data.batch import Batch
from clue_dist.losses.explained import measure_explained
from clue_dist.losses.objective import EncodedCells, HeldOutScores
from clue_dist.metrics.integration import (
    LABEL_NEIGHBOURS,
    LISI_NEIGHBOURS,
    MIXING_NEIGHBOURS,
    mark_labelled_cells,
    measure_ilisi,
    measure_islands,
    measure_label_accuracy,
    measure_mixing,
)
from clue_dist.metrics.matching import compute_nearer_share
from clue_dist.model.noise import Noise
from clue_dist.model.posterior_encoder import Posterior
from clue_dist.neighbours.nearest import find_neighbours
from clue_dist.train.sinks import Sinks
from clue_dist.train.space_fit import fit_common_space, thin_cells
from clue_dist.train.trainer import Trainer, ValidationCells
from clue_dist.train.translation_fit import TranslatedCells, fit_theta_shifts, fit_translation

# Standard errors within which a score cannot be told from the lowest. That is the lowest of twenty,
# and of few cells so by luck: with one error, weights of the first tenth of a run may be kept.
TOLERATED_ERRORS = 2.0
# Of fewer labelled cells, half of them or more would vote for the label of each.
LEAST_LABELLED = 2 * LABEL_NEIGHBOURS


@dataclass(frozen=True)
class Validation:
    """What the held-out cells say of the present weights."""

    cells: list[float]  # score of each cell; their mean is the score of the weights; less is better
    parts: dict[str, float]  # what docs/training.md lists, by modality, by pair, or of the joint z


def validate_model(
    trainer: Trainer, validation_cells: ValidationCells, state: RunState, sinks: Sinks
) -> RunState:
    """Fit the common space, score the held-out cells, and choose the weights that are kept.

    Returns:
        The state with the validation counted; `best_step` is the present step if these weights are
        to be kept.
    """
    if validation_cells.held_out is None:  # the last weights are the best that can be had
        fit_to_pairs(trainer, validation_cells.fitting, None, None)
        return replace(state, best_step=state.step)
    validation = score_held_out_cells(trainer, validation_cells.held_out, validation_cells)
    cells = validation.cells
    numbers = {"score": statistics.fmean(cells)} | validation.parts
    wrong = [name for name, value in numbers.items() if not math.isfinite(value)]
    if wrong:
        facts: dict[str, int | str] = {"found": ", ".join(wrong), "best_step": state.best_step}
        sinks.write_event("validation not finite", state.step, facts)
    if "score" in wrong:
        return replace(state, bad=state.bad + 1)
    state, error = choose_weights(state, cells)
    finite = {name: value for name, value in numbers.items() if name not in wrong}
    sinks.write_numbers("validation", state.step, finite | _list_choice_numbers(state, error))
    return state


def fit_to_pairs(
    trainer: Trainer, fitting: Batch | None, held_out: Batch | None, posterior: Posterior | None
) -> None:
    """Fit what is not trained but follows from pairs: the common space, and the translation.

    Args:
        trainer: what training works with.
        fitting: training cells with several modalities.
        held_out: the validation cells.
        posterior: what the model infers of them.
    """
    space_cells, translated, explained = None, None, None
    if fitting is not None and held_out is not None and posterior is not None:
        n_aligned = trainer.model.n_aligned
        space_cells = EncodedCells.select_aligned(posterior, held_out, n_aligned)
        translated = TranslatedCells.from_posterior(posterior, held_out.observed)
        explained = trainer.compute_in_engine(
            lambda objective: measure_explained(objective.model, held_out, posterior)
        )
    found = fit_common_space(trainer, fitting, space_cells, explained)
    if fitting is not None and found is not None:
        cells = TranslatedCells.from_posterior(found, fitting.observed)
        fit_translation(trainer.model.translation, cells, translated, trainer.ranks)
        if held_out is not None and posterior is not None:
            fit_theta_shifts(trainer, held_out, posterior)


def choose_weights(state: RunState, cells: Sequence[float]) -> tuple[RunState, float]:
    """Choose between the weights that are kept as the best and the present ones.

    Weights whose score is within two standard errors of the lowest cannot be told from those that
    have it. The latest of them are kept, as the steps that led to them were smaller. Both scores
    are means over the same cells, which are hard or easy for both: the error is that of the mean
    difference, cell by cell, and far smaller than the error of either score.

    Args:
        state: the state of the run at the present step.
        cells: (n,), the finite score of each validation cell.

    Returns:
        The state with the validation counted, and the standard error of the difference between the
        score and the lowest one so far.
    """
    score, error = statistics.fmean(cells), 0.0
    if state.lowest_score is None or score < state.lowest_score:
        state = replace(
            state,
            lowest_score=score,
            lowest_step=state.step,
            lowest_cells=tuple(cells),
            bad=0,
        )
    else:
        state = replace(state, bad=state.bad + 1)
        if state.lowest_cells:  # a run that an earlier version began did not keep them
            error = _compute_paired_error(cells, state.lowest_cells)
    assert state.lowest_score is not None
    if score <= state.lowest_score + TOLERATED_ERRORS * error:
        state = replace(state, best_step=state.step, best_score=score)
    return state, error


def format_best_weights(state: RunState) -> str:
    """Say which weights are kept, their score and, if it is another one, the lowest score."""
    text = f"the weights of step {state.best_step}: validation score {state.best_score:.4f}"
    if state.best_score == state.lowest_score:
        return f"{text}, the lowest"
    return f"{text} (lowest {state.lowest_score:.4f}, at step {state.lowest_step})"


def score_held_out_cells(
    trainer: Trainer, held_out: Batch, validation_cells: ValidationCells
) -> Validation:
    """Fit the common space and score the held-out cells; every rank must call.

    With pairs the score is FOSCTTM (eq. 18) on L2-normalised z, averaged over pairs of modalities.
    Without, it is minus the ELBOs (eq. 5 and 8) by their weights in the loss.

    Returns:
        What rank 0 found, on every rank: rounding may differ between ranks.
    """
    trainer.engine.eval()
    with torch.no_grad():
        noise = _make_noise(trainer, held_out)
        scores = trainer.compute_in_engine(
            lambda objective: objective.score_held_out(held_out, noise)
        )
    trainer.engine.train()
    fit_to_pairs(trainer, validation_cells.fitting, held_out, scores.posterior)
    joint, alone = trainer.model.read_latents(held_out, scores.posterior)
    patterns = validation_cells.patterns
    joint_of_patterns = None if patterns is None else trainer.embed_batch(patterns)

    def measure_cells() -> tuple[list[float], dict[str, float]]:
        cells, parts = _score_cells(trainer, held_out, scores, alone)
        parts |= _measure_joint(joint, held_out, validation_cells.labels)
        if patterns is not None and joint_of_patterns is not None:
            parts |= _measure_islands(joint_of_patterns, patterns)
        return cells, parts

    return Validation(*trainer.ranks.run_on_first(measure_cells))


def _score_cells(
    trainer: Trainer, held_out: Batch, scores: HeldOutScores, alone: dict[str, Tensor]
) -> tuple[list[float], dict[str, float]]:
    """The score of each cell, and its parts by modality or pair; `alone`: z by modality."""
    parts = {name: float(value) for name, value in scores.terms.items()}
    if not trainer.setup.has_paired_cells:
        return scores.minus_elbo.tolist(), parts
    if not all(latent.isfinite().all() for latent in alone.values()):
        return [math.nan] * held_out.n_cells, parts
    pairs = _select_pairs(held_out, alone)
    shares = {
        name: (pair.cells, compute_nearer_share(*pair.latents)) for name, pair in pairs.items()
    }
    means = {f"foscttm/{name}": float(share.mean()) for name, (_, share) in shares.items()}
    mixing = {f"mixing/{name}": _measure_mixing(*pair.latents) for name, pair in pairs.items()}
    return _average_over_pairs(shares, held_out.n_cells), means | mixing | parts


def _measure_joint(joint: Tensor, held_out: Batch, labels: np.ndarray) -> dict[str, float]:
    """How batches mix and labels stay apart in z from everything observed, where there are two."""
    known = mark_labelled_cells(labels)
    batches = held_out.batch_code.cpu().numpy()
    measures = {}
    if len(joint) > 2 and joint.isfinite().all():
        in_batch = batches >= 0  # -1: unknown
        if len(np.unique(batches[in_batch])) > 1:
            placed = joint[torch.from_numpy(in_batch).to(joint.device)]
            neighbours = find_neighbours(placed, LISI_NEIGHBOURS)
            measures["ilisi"] = measure_ilisi(neighbours, batches[in_batch])
        if known.sum() >= LEAST_LABELLED and len(np.unique(labels[known])) > 1:
            labelled = joint[torch.from_numpy(known).to(joint.device)]
            neighbours = find_neighbours(labelled, LABEL_NEIGHBOURS)
            measures["accuracy"] = measure_label_accuracy(neighbours, labels[known])
    return measures


def _measure_islands(joint: Tensor, batch: Batch) -> dict[str, float]:
    """The worst island of z from everything observed, of cells of every pattern."""
    if len(joint) < 3 or not joint.isfinite().all():
        return {}
    patterns = np.unique(batch.observed.cpu().numpy(), axis=0, return_inverse=True)[1]
    islands = measure_islands(find_neighbours(joint, MIXING_NEIGHBOURS), patterns.reshape(-1))
    return {"islands": max(islands.values())} if len(islands) > 1 else {}


def _measure_mixing(first: Tensor, second: Tensor) -> float:
    """Measure mixing on some of the cells, as its time grows with their square."""
    return measure_mixing(thin_cells(first), thin_cells(second))


def _list_choice_numbers(state: RunState, error: float) -> dict[str, float]:
    """What is logged of the choice, beside the score."""
    numbers: dict[str, float | None] = {
        "error": error,
        "best_score": state.best_score,
        "best_step": state.best_step,
        "lowest_score": state.lowest_score,
        "lowest_step": state.lowest_step,
    }
    return {name: value for name, value in numbers.items() if value is not None}


def _compute_paired_error(cells: Sequence[float], others: Sequence[float]) -> float:
    """Standard error of the mean difference between two scores of each cell."""
    differences = np.subtract(cells, others)
    return float(differences.std(ddof=1) / len(differences) ** 0.5)


def _make_noise(trainer: Trainer, held_out: Batch) -> Noise:
    """The noise of a validation, the same at every step and on every rank."""
    shares = {"held out": held_out.n_cells}
    return Noise(trainer.setup.config.seed, 0, shares, lanes=1, device=held_out.observed.device)


def _average_over_pairs(
    shares: Mapping[str, tuple[list[int], np.ndarray]], n_cells: int
) -> list[float]:
    """A score for each cell with two modalities; their mean is the mean over pairs of modalities.

    Every pair of modalities weighs the same, however many cells have both.
    """
    scores, is_paired = np.zeros(n_cells), np.zeros(n_cells, bool)
    for cells, share in shares.values():
        scores[cells] += share / (len(cells) * len(shares))
        is_paired[cells] = True
    return (scores[is_paired] * is_paired.sum()).tolist()


class _PairedLatents(NamedTuple):
    """The cells that have both of a pair of modalities, each seen through one and the other."""

    cells: list[int]  # rows of the batch
    latents: tuple[Tensor, Tensor]  # (n cells, K * d) each


def _select_pairs(batch: Batch, latents: dict[str, Tensor]) -> dict[str, _PairedLatents]:
    """Select the cells of every pair of modalities that two cells or more have, by "rna-adt"."""
    pairs = {}
    for first, second in combinations(latents, 2):
        rows = {
            modality: {
                cell: row for row, cell in enumerate(batch.modalities[modality].rows.tolist())
            }
            for modality in (first, second)
        }
        cells = sorted(rows[first].keys() & rows[second].keys())
        if len(cells) > 1:  # a single cell is always its own nearest
            here, other = (
                latents[modality][[rows[modality][cell] for cell in cells]]
                for modality in (first, second)
            )
            pairs[f"{first}-{second}"] = _PairedLatents(cells, (here, other))
    return pairs
