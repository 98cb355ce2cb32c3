"""The translation between modalities is fitted: on training pairs, its error on held-out pairs."""

from __future__ import annotations

from itertools import permutations
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from clue_dist.data.batch import Batch
from clue_dist.losses.predictive import choose_theta_shifts
from clue_dist.model.common_space import FEWEST_CHOOSING, FEWEST_PAIRED
from clue_dist.model.posterior_encoder import Posterior
from clue_dist.model.translation import LatentTranslation, Regression, fit_regressions
from clue_dist.ranks import Ranks
from clue_dist.train.trainer import Trainer

# Encoders know their training pairs: held-out pairs tell how much of a regression holds for others.
RIDGES = 0.003, 0.01, 0.03, 0.1, 0.3, 1.0
DEFAULT_RIDGE = 0.1  # with too few held-out pairs to choose one
LEAST_VARIANCE = 1e-6  # of an error, next to a variance of 1 that z has before any cell is seen


class TranslatedCells(NamedTuple):
    """What modalities say of cells, on the CPU, in float64."""

    mean: Tensor  # (N, K source, K target, d), posterior means of the experts
    # Mean and variance of z_k given everything observed, whose samples decoders read (eq. 8), each
    # (N, K, d).
    joint_mean: Tensor
    joint_variance: Tensor
    observed: Tensor  # (N, K) bool

    @classmethod
    def from_posterior(cls, posterior: Posterior, observed: Tensor) -> TranslatedCells:
        """Select what is needed of a posterior."""
        return cls(
            posterior.mean.cpu().double(),
            posterior.joint_mean.cpu().double(),
            posterior.joint_log_var.exp().cpu().double(),
            observed.cpu(),
        )

    def select_pairs(self, source: int, target: int) -> tuple[Tensor, Tensor]:
        """Inputs (n, K * d) and latents (n, d) of the cells that have both."""
        both = self.observed[:, source] & self.observed[:, target]
        return self.mean[both, source].flatten(1), self.joint_mean[both, target]

    def average_variance(self, source: int, target: int) -> Tensor:
        """Average the variance of z of the target, (d,), over the cells that have both."""
        both = self.observed[:, source] & self.observed[:, target]
        return self.joint_variance[both, target].mean(0)


def fit_translation(
    translation: LatentTranslation,
    cells: TranslatedCells,
    held_out: TranslatedCells | None,
    ranks: Ranks | None = None,
) -> None:
    """Fit the regression of every two modalities that enough training cells have together.

    Every rank must call, with the same cells: rank 0 fits, and the others take it over.

    Args:
        translation: to be changed.
        cells: training cells.
        held_out: other cells.
        ranks: this process among the others; by default it is alone.
    """
    ranks = ranks or Ranks()
    ranks.run_on_first(lambda: _fit_all_pairs(translation, cells, held_out))
    if ranks.world > 1:
        for values in translation.buffers():
            dist.broadcast(values, 0)


def fit_theta_shifts(trainer: Trainer, held_out: Batch, posterior: Posterior) -> None:
    """Fit how far counts scatter that the translation tells; every rank must call.

    Args:
        trainer: what training works with.
        held_out: the validation cells.
        posterior: what the model infers of them.
    """
    shifts = trainer.compute_in_engine(
        lambda objective: choose_theta_shifts(objective.model, held_out, posterior)
    )
    if trainer.ranks.world > 1:  # rounding may differ between ranks
        dist.broadcast(shifts, 0)
    trainer.model.translation.theta_shift.copy_(shifts)


def _fit_all_pairs(
    translation: LatentTranslation, cells: TranslatedCells, held_out: TranslatedCells | None
) -> None:
    """Fit the regressions in this process."""
    for source, target in permutations(range(cells.observed.shape[1]), 2):
        inputs, latents = cells.select_pairs(source, target)
        if len(inputs) < FEWEST_PAIRED:
            continue
        others = None if held_out is None else held_out.select_pairs(source, target)
        width = torch.diag(cells.average_variance(source, target))
        # Weights that give NaN keep the regression that they have; validation tells of them.
        if all(part.isfinite().all() for part in (inputs, latents, width, *(others or ()))):
            regression = _choose_regression(inputs, latents, others)
            regression = regression._replace(covariance=regression.covariance + width)
            translation.set_regression(source, target, regression)


def _choose_regression(
    inputs: Tensor, latents: Tensor, others: tuple[Tensor, Tensor] | None
) -> Regression:
    """The regression that serves held-out pairs best, with the covariance of its error alone.

    Errors correlate as they do in training cells, which are many. How large they are, held-out
    pairs say, by dimension.
    """
    can_choose = others is not None and len(others[0]) >= FEWEST_CHOOSING
    ridges = RIDGES if can_choose else (DEFAULT_RIDGE,)
    fitted = list(fit_regressions(inputs, latents, ridges))
    errors = [] if others is None else [_square_errors(*others, *found) for found in fitted]
    best = min(range(len(errors)), key=lambda i: float(errors[i].sum())) if can_choose else 0
    weight, offset = fitted[best]
    residual = latents - inputs @ weight - offset
    error = residual.T @ residual / len(residual)
    if can_choose:
        scale = (errors[best] / residual.square().mean(0).clamp_min(1e-12)).sqrt()
        error = scale[:, None] * error * scale
    return Regression(weight, offset, _shrink_covariance(error, len(residual)))


def _square_errors(inputs: Tensor, latents: Tensor, weight: Tensor, offset: Tensor) -> Tensor:
    """Mean square error of each dimension, (d,)."""
    return (latents - inputs @ weight - offset).square().mean(0)


def _shrink_covariance(covariance: Tensor, n_cells: int) -> Tensor:
    """Shrink what correlates by chance, the more the fewer cells, so that an inverse exists."""
    d = len(covariance)
    variance = covariance.diagonal().clamp_min(LEAST_VARIANCE)
    chance = d / (n_cells + d)
    return (1 - chance) * covariance + torch.diag(variance - (1 - chance) * covariance.diagonal())
