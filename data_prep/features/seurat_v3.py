"""Which genes vary more than their mean explains: the variance-stabilised ranking of Seurat v3, from sums.

Stuart et al., Cell 2019 (methods, "Feature selection for individual datasets" and "for integrated analysis"). In each
batch, log10 of the variance is regressed on log10 of the mean by local quadratics (loess, span 0.3); a gene's score
is the variance of its counts after they are standardised by the expected variance and clipped at sqrt(cells). Batches
are combined by how many of them rank a gene among their best, ties by its median rank there.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

SPAN = 0.3
VERTICES = 128  # where the regression is computed; in between it is interpolated by value and slope


@dataclass(frozen=True)
class VarianceTrend:
    """What a batch of `n` cells expects of each gene. mean, deviation: (genes,); varies: (genes,) bool."""

    n: int
    mean: np.ndarray
    deviation: np.ndarray
    varies: np.ndarray

    @property
    def limits(self) -> np.ndarray:
        """The count at which each gene is clipped, (genes,) float64."""
        return self.mean + self.deviation * np.sqrt(self.n)

    def scores(self, total: np.ndarray, squares: np.ndarray) -> np.ndarray:
        """Variance of the standardised counts, (genes,); total, squares: sums of the clipped counts, (genes,)."""
        around = squares - 2 * self.mean * total + self.n * self.mean**2
        return np.where(self.varies, around / ((self.n - 1) * self.deviation**2), 0.0)


def fit_trend(n: int, total: np.ndarray, squares: np.ndarray) -> VarianceTrend | None:
    """The trend of a batch of n cells; total, squares: sums of counts and of their squares, (genes,) integers.

    None where no gene varies, or there are fewer than two cells.
    """
    if n < 2:
        return None
    mean = total / n
    variance = np.maximum(squares - total * mean, 0.0) / (n - 1)
    varies = variance > 0
    if not varies.any():
        return None
    expected = np.zeros(len(mean))
    expected[varies] = smooth_by_loess(np.log10(mean[varies]), np.log10(variance[varies]))
    return VarianceTrend(n, mean, np.sqrt(10**expected), varies)


def smooth_by_loess(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Local quadratic regression of y on x, both (n,), evaluated at x, (n,)."""
    vertices = np.unique(np.quantile(x, np.linspace(0, 1, VERTICES)))
    fits = np.array([_local(x, y, at) for at in vertices])
    if len(vertices) == 1:
        return np.full(len(x), fits[0, 0])
    from scipy.interpolate import CubicHermiteSpline  # a tenth of a second, which few commands need

    return np.asarray(CubicHermiteSpline(vertices, fits[:, 0], fits[:, 1])(x))


def _local(x: np.ndarray, y: np.ndarray, at: float) -> tuple[float, float]:
    """Value and slope at one point of the quadratic that fits the nearest SPAN of all points, tricube weights."""
    distance = np.abs(x - at)
    nearest = min(len(x) - 1, max(int(SPAN * len(x)) - 1, 0))
    width = (
        np.partition(distance, nearest)[nearest] or 1.0
    )  # in a small batch, all the nearest may have one mean
    near = distance < width
    weight = np.sqrt((1 - (distance[near] / width) ** 3) ** 3)
    steps = (x[near] - at) / width
    design = np.stack([np.ones(len(steps)), steps, steps**2], axis=1)
    value, slope, _ = np.linalg.lstsq(design * weight[:, None], y[near] * weight, rcond=None)[0]
    return float(value), float(slope / width)


def rank_genes(scores: np.ndarray, top: int) -> np.ndarray:
    """Places of the `top` genes, ascending, (top,). scores: (batches, genes), 0 where a gene does not vary.

    By the number of batches in which a gene is among the `top` best, then its median rank in these; ties in order.
    """
    ranks = np.argsort(np.argsort(-scores, axis=1, kind="stable"), axis=1, kind="stable").astype(
        np.float64
    )
    ranks[ranks >= top] = np.nan
    times = (~np.isnan(ranks)).sum(axis=0)
    median = np.full(scores.shape[1], np.inf)
    median[times > 0] = np.nanmedian(ranks[:, times > 0], axis=0)
    return np.sort(np.lexsort((median, -times))[:top])
