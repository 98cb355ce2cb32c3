"""Moments of a sample of cells: where decoders and projections start."""

from __future__ import annotations

import numpy as np

from clue_dist.normalise import Rows, compute_deviation, sum_columns

INVERSE_DISPERSION_LIMITS = 0.1, 100.0  # limits of an initial negative binomial


def compute_moments(values: Rows) -> tuple[np.ndarray, np.ndarray]:
    """Mean and standard deviation of each feature, each (features,), of values (n, features)."""
    n_cells = values.shape[0]
    mean = sum_columns(values) / n_cells
    return mean, compute_deviation(mean, sum_columns(values, np.square) / n_cells)


def compute_feature_shares(counts: Rows) -> np.ndarray:
    """The share of all counts that each feature has, (features,), above 0 and at most 0.999."""
    total = np.maximum(sum_columns(counts), 0.5)
    return np.minimum(total / total.sum(), 0.999)


def estimate_inverse_dispersions(counts: Rows, share: np.ndarray) -> np.ndarray:
    """Estimate r of each feature, (features,), from variances mu + mu^2 / r.

    mu is the feature's share (features,) of the cell's counts. Whatever else differs from cell to
    cell lowers r, which training mends. A feature with too few counts to show a dispersion gets
    the largest r, which makes it nearly a Poisson.
    """
    size = np.asarray(counts.sum(1), np.float64).ravel()  # (n,)
    # In float64, as the squares of large integers would overflow.
    squares = sum_columns(counts, lambda v: np.square(v, dtype=np.float64))
    products = np.asarray(counts.T @ size, np.float64).ravel()
    squared_mean = share**2 * np.square(size).sum()
    # The sum over cells of (x - mu)^2 - mu.
    excess = squares - 2 * share * products + squared_mean - share * size.sum()
    return np.clip(squared_mean / np.maximum(excess, 1e-9), *INVERSE_DISPERSION_LIMITS)
