"""The common space is fitted: directions on training pairs, how far they hold on held-out pairs."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from clue_dist.data.batch import Batch
from clue_dist.errors import list_names
from clue_dist.losses.objective import EncodedCells
from clue_dist.metrics.integration import measure_mixing
from clue_dist.metrics.matching import compute_foscttm
from clue_dist.model.common_space import (
    FEWEST_CHOOSING,
    FEWEST_PAIRED,
    CommonSpace,
    Directions,
    count_together,
    find_directions,
    group_modalities,
)
from clue_dist.model.posterior_encoder import Posterior
from clue_dist.train.trainer import Trainer

# Encoders know their training pairs, so that these agree more than other cells will: the fewer the
# pairs, the more. Held-out pairs tell how much to smooth: a ridge, and the power of the agreement
# that a direction counts by. With a large ridge agreement is no correlation any more but a
# covariance, which grows with the variance of the direction, too, so that a smaller power will do.
SMOOTHINGS = (0.05, 1.5), (0.3, 1.5), (1.0, 1.5), (3.0, 1.0), (10.0, 0.5)
# Lengths of the constant coordinate, see `CommonSpace.weigh_profiles`. The least hardly counts, but
# tells how long a cell's coordinates were, see `CommonSpace.reweigh_as_joint`.
POLES = 0.1, 1.0, 2.0
# With too few held-out pairs nothing is chosen, and the defaults are taken. The noise of a
# covariance falls with the number of pairs and grows with that of dimensions, so the ridge does.
DEFAULT_RIDGE = 8.0  # where there are as many training pairs as dimensions
DEFAULT_EXPONENT = 1.0
DEFAULT_POLE = 1.0
LEAST_MIXING = 0.01  # else a space in which nothing mixes would divide by 0
LEAST_COUNTED = 0.25  # share of its nats that a modality counts for, if it explains nothing
MOST_SCORED = 500  # held-out pairs of two modalities that choose, as the time grows with its square


class FittedSpace(NamedTuple):
    """What `CommonSpace.set_directions` takes."""

    directions: Directions
    exponent: float
    pole: float


def fit_common_space(
    trainer: Trainer,
    fitting: Batch | None,
    held_out: EncodedCells | None,
    explained: Tensor | None = None,
) -> Posterior | None:
    """Fit the common space to the present weights. Every rank must call, with the same cells.

    Args:
        trainer: what training works with.
        fitting: training cells with several modalities.
        held_out: the validation cells.
        explained: (K,), of the validation cells, see `measure_explained`.

    Returns:
        What the model infers of the fitting cells.
    """
    if fitting is None:
        return None
    posterior = trainer.encode_batch(fitting)
    model = trainer.model
    cells = EncodedCells.select_aligned(posterior, fitting, model.n_aligned).to_cpu()
    others = None if held_out is None else held_out.to_cpu()
    # Weights that give NaN keep the space that they have; validation tells of them.
    if trainer.ranks.is_first and all(part is None or part.is_finite for part in (cells, others)):
        chosen = choose_directions(cells, others)
        if chosen is not None:
            nats = _average_nats(cells, others)
            if explained is not None:
                nats = bound_nats(nats, explained.cpu())
            model.space.set_directions(*chosen, nats)
    if dist.is_initialized():  # rounding may differ between ranks, which must score the same z
        for values in model.space.buffers():
            dist.broadcast(values, 0)
    return posterior


def explain_missing_space(modalities: Sequence[str], fitting: Batch | None) -> str | None:
    """Say why no common space can be fitted; None if one can, or if there is a single modality.

    Args:
        modalities: names, in model order.
        fitting: the training cells with several modalities.
    """
    groups = [[number] for number in range(len(modalities))]
    if fitting is not None:
        groups = group_modalities(fitting.observed.cpu())
    if len(groups) == 1:
        return None
    named = " | ".join(list_names([modalities[number] for number in group]) for group in groups)
    return (
        f"modalities are not brought to one space: fewer than {FEWEST_PAIRED} training cells link "
        f"any two of the groups {named}; cells that were measured in both would change that"
    )


def choose_directions(cells: EncodedCells, held_out: EncodedCells | None) -> FittedSpace | None:
    """Choose the smoothing, then the pole, that serve held-out pairs best.

    Partners should find each other and modalities should mix, and both count alike: FOSCTTM
    (eq. 18) over the share of neighbours that come from the other modality is to be small.

    Args:
        cells: training cells, on which directions are found.
        held_out: cells that choose; with few pairs among them the defaults are taken.

    Returns:
        What is to be set; None if modalities are not linked.
    """
    n_pairs = max(1, int((cells.observed.sum(1) > 1).sum()))
    ridge = DEFAULT_RIDGE * cells.mean.shape[2] / n_pairs
    smoothings: Sequence[tuple[float, float]] = [(ridge, DEFAULT_EXPONENT)]
    poles: Sequence[float] = [DEFAULT_POLE]
    if held_out is not None and _count_most_pairs(held_out) >= FEWEST_CHOOSING:
        smoothings, poles = SMOOTHINGS, POLES
    candidates = []
    for ridge, exponent in smoothings:
        directions = find_directions(cells.mean, cells.observed, ridge, cells.batch_code)
        if directions is None:
            return None
        candidates.append(FittedSpace(directions, exponent, DEFAULT_POLE))
    best = _choose_best(candidates, held_out)
    return _choose_best([best._replace(pole=pole) for pole in poles], held_out)


def _count_most_pairs(cells: EncodedCells) -> float:
    """How many cells the two modalities have that most cells have together."""
    return float(count_together(cells.observed).fill_diagonal_(0).max())


def _choose_best(candidates: list[FittedSpace], held_out: EncodedCells | None) -> FittedSpace:
    """The candidate that serves held-out pairs best; the only one, if there is but one."""
    if len(candidates) == 1 or held_out is None:
        return candidates[0]
    return min(candidates, key=lambda candidate: _score_candidate(held_out, candidate))


def _average_nats(cells: EncodedCells, held_out: EncodedCells | None) -> Tensor:
    """The nats that each modality tells, (K,), of held-out cells where there are enough.

    An encoder that has learnt its cells by heart tells more of them.
    """
    unseen = cells if held_out is None else held_out
    seen_mean, unseen_mean = (
        part.nats.masked_fill(~part.observed, 0).sum(0) / part.observed.sum(0).clamp_min(1)
        for part in (cells, unseen)
    )
    return torch.where(unseen.observed.sum(0) >= FEWEST_PAIRED, unseen_mean, seen_mean)


def bound_nats(nats: Tensor, explained: Tensor) -> Tensor:
    """Let no modality count for more nats than it explains of cells that were not trained on.

    Nor for less than a share of its own: contrast teaches an encoder, too, and what it knows by
    that its decoder may not have learnt.

    Args:
        nats: (K,), that each modality claims to tell of its own z_k.
        explained: (K,), see `measure_explained`; where it is no number nothing is bound.
    """
    bound = torch.where(explained.isnan(), torch.inf, explained)
    return torch.minimum(nats, torch.maximum(bound, LEAST_COUNTED * nats))


def _score_candidate(held_out: EncodedCells, candidate: FittedSpace) -> float:
    """FOSCTTM over mixing, means over the pairs of modalities with enough held-out cells."""
    mean, observed = held_out.mean.double(), held_out.observed
    space = CommonSpace(*mean.shape[1:]).double()
    space.set_directions(*candidate, torch.ones(mean.shape[1]))
    scores = []
    for pair in map(list, combinations(range(mean.shape[1]), 2)):
        cells = observed[:, pair].all(1).nonzero()[:, 0]
        if len(cells) >= FEWEST_CHOOSING:
            cells = thin_cells(cells)
            coordinates, _ = space.project_experts(mean[cells], torch.zeros_like(mean[cells]))
            first, second = space.weigh_profiles(coordinates)[:, pair].unbind(1)
            scores.append([compute_foscttm(first, second), measure_mixing(first, second)])
    foscttm, mixing = np.mean(scores, 0)
    return float(foscttm / max(mixing, LEAST_MIXING))


def thin_cells(cells: Tensor) -> Tensor:
    """An even part of rows (n, ...), `MOST_SCORED` at most: times grow with their square."""
    return cells[:: max(1, -(-len(cells) // MOST_SCORED))]
