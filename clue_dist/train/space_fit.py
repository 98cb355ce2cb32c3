"""The common space is fitted: directions on training pairs, how far they hold on held-out pairs."""

from __future__ import annotations

from itertools import combinations, product

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import functional as F

from clue_dist.data.batch import Batch
from clue_dist.matching import compute_nearer_share
from clue_dist.model.clue import CLUE
from clue_dist.model.common_space import Directions, find_directions
from clue_dist.train.trainer import Trainer

# Encoders know their training pairs, so that these agree more than other cells will: the fewer the
# pairs, the more. Held-out pairs tell how much to smooth, and which power of a correlation holds.
RIDGES = 0.05, 0.3, 1.0
EXPONENTS = 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, 8.0
DEFAULT_RIDGE, DEFAULT_EXPONENT = 0.3, 2.0  # where no pair is held out
MOST_SCORED = 500  # held-out pairs of two modalities that choose, as the time grows with its square


@torch.no_grad()
def fit_common_space(trainer: Trainer, fitting: Batch | None, held_out: Batch | None) -> None:
    """Fit the common space to the present weights. Every rank must call, with the same cells.

    Args:
        trainer: what training works with.
        fitting: training cells with several modalities.
        held_out: the validation cells.
    """
    if fitting is None:
        return
    trainer.engine.eval()
    batches = [fitting, *([] if held_out is None else [held_out])]
    encoded = [
        (trainer.engine(batch, None, encode=True).cpu(), batch.observed.cpu()) for batch in batches
    ]
    trainer.engine.train()
    model: CLUE = trainer.engine.module.model
    if trainer.ranks.is_first:
        fitted = choose_directions(*encoded[0], *encoded[-1], chooses=held_out is not None)
        if fitted is not None:
            model.space.set_directions(*fitted)
    # Rounding may differ between ranks, which all have to score the same z.
    for values in model.space.buffers():
        dist.broadcast(values, 0)


def choose_directions(
    mean: Tensor, observed: Tensor, other_mean: Tensor, other_observed: Tensor, chooses: bool = True
) -> tuple[Directions, float] | None:
    """Choose the smoothing and the exponent with which held-out pairs find each other best.

    Args:
        mean: (N, K source, D), posterior means of training cells.
        observed: (N, K) bool.
        other_mean: (n, K source, D), of held-out cells.
        other_observed: (n, K) bool.
        chooses: whether there are held-out cells; else the defaults are taken.

    Returns:
        Directions and exponent; None if some modality has too few pairs.
    """
    found = {ridge: find_directions(mean, observed, ridge) for ridge in RIDGES}
    default = found[DEFAULT_RIDGE]
    if default is None:
        return None
    z = F.normalize(other_mean.double(), dim=-1)
    choices = {}
    for ridge, exponent in product(RIDGES, EXPONENTS) if chooses else ():
        directions = found[ridge]
        assert directions is not None
        score = _score_choice(z, other_observed, directions, exponent)
        if np.isfinite(score):
            choices[score] = directions, exponent
    return choices[min(choices)] if choices else (default, DEFAULT_EXPONENT)


def _score_choice(z: Tensor, observed: Tensor, directions: Directions, exponent: float) -> float:
    """FOSCTTM (eq. 18) of held-out pairs, averaged over pairs of modalities; NaN without pairs."""
    weight = directions.agreement**exponent
    scores = []
    for pair in map(list, combinations(range(z.shape[1]), 2)):
        cells = observed[:, pair].all(1).nonzero()[:, 0]
        cells = cells[:: -(-len(cells) // MOST_SCORED) or 1]
        if len(cells) > 1:
            first, second = (
                (z[cells, k] - directions.mean[k]) @ directions.rotation[k] * weight for k in pair
            )
            scores.append(compute_nearer_share(first, second).mean())
    return float(np.mean(scores)) if scores else float("nan")
