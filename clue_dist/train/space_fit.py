"""The common space is fitted: directions on training pairs, how far they hold on held-out pairs."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import functional as F

from clue_dist.data.batch import Batch
from clue_dist.errors import list_names
from clue_dist.integration import measure_mixing
from clue_dist.matching import compute_foscttm
from clue_dist.model.common_space import FEWEST_PAIRED, Directions, count_together, find_directions
from clue_dist.objective import EncodedCells
from clue_dist.train.trainer import Trainer

# Encoders know their training pairs, so that these agree more than other cells will: the fewer the
# pairs, the more. Held-out pairs tell how much to smooth, and which power of a correlation holds.
RIDGES = 0.05, 0.3, 1.0
EXPONENTS = 1.0, 1.5, 2.0, 3.0
FEWEST_CHOOSING = 50  # held-out pairs; with fewer the defaults are taken:
DEFAULT_EXPONENT = 1.5
SMOOTHING = 2.5  # the ridge where there are as many training pairs as dimensions
LEAST_MIXING = 0.01
MOST_SCORED = 500  # held-out pairs of two modalities that choose, as the time grows with its square


def fit_common_space(
    trainer: Trainer, fitting: Batch | None, held_out: EncodedCells | None
) -> None:
    """Fit the common space to the present weights. Every rank must call, with the same cells.

    Args:
        trainer: what training works with.
        fitting: training cells with several modalities.
        held_out: the validation cells.
    """
    if fitting is None:
        return
    posterior = trainer.encode_batch(fitting)
    model = trainer.model
    cells = EncodedCells.select_aligned(posterior, fitting.observed, model.n_aligned).to_cpu()
    others = None if held_out is None else held_out.to_cpu()
    # Weights that give NaN keep the space that they have; validation tells of them.
    if trainer.ranks.is_first and all(part is None or part.is_finite for part in (cells, others)):
        chosen = choose_directions(cells, others)
        if chosen is not None:
            model.space.set_directions(*chosen, _average_nats(cells, others))
    if dist.is_initialized():  # rounding may differ between ranks, which must score the same z
        for values in model.space.buffers():
            dist.broadcast(values, 0)


def explain_missing_space(modalities: Sequence[str], fitting: Batch | None) -> str | None:
    """Say why no common space can be fitted; None if one can, or if there is a single modality.

    Args:
        modalities: names, in model order.
        fitting: the training cells with several modalities.
    """
    if len(modalities) == 1:
        return None
    lacking = list(modalities)
    if fitting is not None:
        together = count_together(fitting.observed.cpu()).fill_diagonal_(0)
        lacking = [
            name for name, counts in zip(modalities, together, strict=True) if not counts.any()
        ]
    if not lacking:
        return None
    verb = "shares" if len(lacking) == 1 else "share"
    return (
        f"modalities are not brought to one space: {list_names(lacking)} {verb} fewer than "
        f"{FEWEST_PAIRED} training cells with any other; cells that were measured in both would "
        "change that"
    )


def choose_directions(
    cells: EncodedCells, held_out: EncodedCells | None
) -> tuple[Directions, float] | None:
    """Choose the smoothing and the exponent that serve held-out pairs best.

    Partners should find each other and modalities should mix, and both count alike: FOSCTTM
    (eq. 18) over the share of neighbours that come from the other modality is to be small.

    Args:
        cells: training cells, on which directions are found.
        held_out: cells that choose; with few pairs among them the defaults are taken.

    Returns:
        Directions and exponent; None if some modality has too few pairs.
    """
    n_pairs = int((cells.observed.sum(1) > 1).sum())
    # The noise of a covariance falls with the number of pairs, and grows with that of dimensions.
    ridge = SMOOTHING * cells.mean.shape[2] / max(n_pairs, 1)
    default = find_directions(cells.mean, cells.observed, ridge)
    if default is None:
        return None
    if (
        held_out is None
        or count_together(held_out.observed).fill_diagonal_(0).max() < FEWEST_CHOOSING
    ):
        return default, DEFAULT_EXPONENT
    found = [find_directions(cells.mean, cells.observed, ridge) for ridge in RIDGES]
    candidates = [directions for directions in found if directions is not None]
    # One after the other, as each score takes its time where modalities are many.
    directions = min(candidates, key=lambda d: _score_choice(held_out, d, DEFAULT_EXPONENT))
    return directions, min(EXPONENTS, key=lambda e: _score_choice(held_out, directions, e))


def _average_nats(cells: EncodedCells, held_out: EncodedCells | None) -> Tensor:
    """The nats that each modality tells, (K,), of held-out cells where there are enough.

    An encoder that has learnt its cells by heart tells more of them.
    """
    unseen = cells if held_out is None else held_out
    seen_mean, unseen_mean = (
        (part.nats * part.observed).sum(0) / part.observed.sum(0).clamp_min(1)
        for part in (cells, unseen)
    )
    return torch.where(unseen.observed.sum(0) >= FEWEST_PAIRED, unseen_mean, seen_mean)


def _score_choice(held_out: EncodedCells, directions: Directions, exponent: float) -> float:
    """FOSCTTM over mixing, means over the pairs of modalities with enough held-out cells."""
    z, observed = F.normalize(held_out.mean.double(), dim=-1), held_out.observed
    weight = directions.agreement**exponent
    scores = []
    for pair in map(list, combinations(range(z.shape[1]), 2)):
        cells = observed[:, pair].all(1).nonzero()[:, 0]
        if len(cells) >= FEWEST_CHOOSING:
            cells = thin_cells(cells)
            first, second = (
                (z[cells, k] - directions.mean[k]) @ directions.rotation[k] * weight for k in pair
            )
            scores.append([compute_foscttm(first, second), measure_mixing(first, second)])
    foscttm, mixing = np.mean(scores, 0)
    return float(foscttm / max(mixing, LEAST_MIXING))


def thin_cells(cells: Tensor) -> Tensor:
    """An even part of rows (n, ...), `MOST_SCORED` at most: times grow with their square."""
    return cells[:: max(1, -(-len(cells) // MOST_SCORED))]
