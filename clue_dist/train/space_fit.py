"""The common space is fitted: directions on training pairs, how far they hold on held-out pairs."""

from __future__ import annotations

from itertools import combinations, product

import numpy as np
import torch
import torch.distributed as dist
from torch.nn import functional as F

from clue_dist.data.batch import Batch
from clue_dist.matching import compute_nearer_share
from clue_dist.model.clue import CLUE
from clue_dist.model.common_space import Directions, find_directions
from clue_dist.objective import EncodedCells
from clue_dist.train.trainer import Trainer

# Encoders know their training pairs, so that these agree more than other cells will: the fewer the
# pairs, the more. Held-out pairs tell how much to smooth, and which power of a correlation holds.
RIDGES = 0.05, 0.3, 1.0
EXPONENTS = 1.0, 1.5, 2.0, 3.0
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
    cells = trainer.engine(fitting, None, encode=True).to_cpu()
    others = cells
    if held_out is not None:
        others = trainer.engine(held_out, None, encode=True).to_cpu()
    trainer.engine.train()
    model: CLUE = getattr(trainer.engine, "module", trainer.engine).model
    if trainer.ranks.is_first:
        chosen = choose_directions(cells, None if held_out is None else others)
        if chosen is not None:
            # Of cells that were not trained on: an encoder that has learnt its cells by heart
            # tells more of them.
            nats = (others.nats * others.observed).sum(0) / others.observed.sum(0).clamp_min(1)
            model.space.set_directions(*chosen, nats)
    if dist.is_initialized():  # rounding may differ between ranks, which must score the same z
        for values in model.space.buffers():
            dist.broadcast(values, 0)


def choose_directions(
    cells: EncodedCells, held_out: EncodedCells | None
) -> tuple[Directions, float] | None:
    """Choose smoothing and exponent by how held-out pairs find each other (FOSCTTM, eq. 18).

    Of the choices that are within a standard error of the best, the one that counts the fewest
    directions is taken: the fewer, the better do the modalities mix.

    Args:
        cells: training cells, on which directions are found.
        held_out: cells that choose; without them the defaults are taken.

    Returns:
        Directions and exponent; None if some modality has too few pairs.
    """
    found = {ridge: find_directions(cells.mean, cells.observed, ridge) for ridge in RIDGES}
    default = found[DEFAULT_RIDGE]
    if default is None:
        return None
    choices: list[tuple[Directions, float]] = []
    shares = []
    for directions, exponent in product(found.values(), EXPONENTS) if held_out else ():
        assert directions is not None
        assert held_out is not None
        choices.append((directions, exponent))
        shares.append(_score_pairs(held_out, directions, exponent))
    if not shares or len(shares[0]) < 2:
        return default, DEFAULT_EXPONENT
    best = shares[int(np.argmin([share.mean() for share in shares]))]
    close = [
        choice
        for choice, share in zip(choices, shares, strict=True)
        if (share - best).mean() <= (share - best).std(ddof=1) / len(best) ** 0.5
    ]
    return min(close, key=lambda choice: _count_directions(*choice))


def _count_directions(directions: Directions, exponent: float) -> float:
    """The effective number of directions: the participation ratio of their squared weights."""
    squared = directions.agreement ** (2 * exponent)
    return float(squared.sum() ** 2 / (squared**2).sum())


def _score_pairs(held_out: EncodedCells, directions: Directions, exponent: float) -> np.ndarray:
    """What held-out pairs of all pairs of modalities add to FOSCTTM, (pairs,)."""
    z, observed = F.normalize(held_out.mean.double(), dim=-1), held_out.observed
    weight = directions.agreement**exponent
    shares = [np.empty(0)]
    for pair in map(list, combinations(range(z.shape[1]), 2)):
        cells = observed[:, pair].all(1).nonzero()[:, 0]
        cells = cells[:: -(-len(cells) // MOST_SCORED) or 1]
        if len(cells) > 1:
            first, second = (
                (z[cells, k] - directions.mean[k]) @ directions.rotation[k] * weight for k in pair
            )
            shares.append(compute_nearer_share(first, second))
    return np.concatenate(shares)
