"""Which genes vary more than their mean explains: the ranking of Seurat v3, from sums.

Stuart et al., Cell 2019 (methods, "Feature selection for individual datasets" and "for integrated
analysis"). In each batch, log10 of the variance is regressed on log10 of the mean by local
quadratics (loess, span 0.3). The score of a gene is the variance of its counts after they are
standardised by the expected variance and clipped at sqrt(cells). Batches are combined by how many
of them rank a gene among their best, ties by its median rank in these.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

SPAN = 0.3  # the share of all points that a local regression fits
VERTICES = 128  # where the regression is computed; in between it is interpolated by value and slope


@dataclass(frozen=True)
class VarianceTrend:
    """What the trend of a batch expects of each gene."""

    n_cells: int
    mean: np.ndarray  # (genes,)
    deviation: np.ndarray  # (genes,), expected of a gene with this mean
    varies: np.ndarray  # (genes,) bool, whether the counts of a gene differ at all

    @property
    def limits(self) -> np.ndarray:
        """The count at which each gene is clipped, (genes,) float64."""
        return self.mean + self.deviation * np.sqrt(self.n_cells)

    def score_genes(self, total: np.ndarray, squares: np.ndarray) -> np.ndarray:
        """Compute the variance of the standardised counts.

        Args:
            total: sums of the clipped counts, (genes,).
            squares: sums of their squares, (genes,).

        Returns:
            (genes,) float64, 0 where a gene does not vary.
        """
        deviations = squares - 2 * self.mean * total + self.n_cells * self.mean**2
        variance = deviations / ((self.n_cells - 1) * self.deviation**2)
        return np.where(self.varies, variance, 0.0)


def fit_trend(n_cells: int, total: np.ndarray, squares: np.ndarray) -> VarianceTrend | None:
    """Fit the trend of a batch.

    Args:
        n_cells: cells of the batch.
        total: sums of counts, (genes,) integers.
        squares: sums of their squares, (genes,) integers.

    Returns:
        None where no gene varies, or there are fewer than two cells.
    """
    if n_cells < 2:
        return None
    mean = total / n_cells
    variance = np.maximum(squares - total * mean, 0.0) / (n_cells - 1)
    varies = variance > 0
    if not varies.any():
        return None
    expected = np.zeros(len(mean))
    expected[varies] = smooth_by_loess(np.log10(mean[varies]), np.log10(variance[varies]))
    return VarianceTrend(n_cells, mean, np.sqrt(10**expected), varies)


def smooth_by_loess(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Regress y on x, both (n,), by local quadratics; return the values at x, (n,)."""
    vertices = np.unique(np.quantile(x, np.linspace(0, 1, VERTICES)))
    fits = np.array([_fit_local_quadratic(x, y, vertex) for vertex in vertices])
    if len(vertices) == 1:
        return np.full(len(x), fits[0, 0])
    from scipy.interpolate import CubicHermiteSpline  # a tenth of a second, which few commands need

    return np.asarray(CubicHermiteSpline(vertices, fits[:, 0], fits[:, 1])(x))


def _fit_local_quadratic(x: np.ndarray, y: np.ndarray, vertex: float) -> tuple[float, float]:
    """Fit the nearest SPAN of all points by tricube weights; return value and slope at a vertex."""
    distance = np.abs(x - vertex)
    nearest = min(len(x) - 1, max(int(SPAN * len(x)) - 1, 0))
    width = np.partition(distance, nearest)[nearest]
    if width == 0:
        width = 1.0  # in a small batch, all the nearest points may have one mean
    is_near = distance < width
    weight = np.sqrt((1 - (distance[is_near] / width) ** 3) ** 3)
    steps = (x[is_near] - vertex) / width
    design = np.stack([np.ones(len(steps)), steps, steps**2], axis=1)
    weighted = design * weight[:, None], y[is_near] * weight
    value, slope, _ = np.linalg.lstsq(*weighted, rcond=None)[0]
    return float(value), float(slope / width)


def rank_genes(scores: np.ndarray, top: int) -> np.ndarray:
    """Choose the genes that the batches rank best.

    A gene counts by the number of batches in which it is among the `top` best, then by its median
    rank in these. Of equal genes the first counts more.

    Args:
        scores: (batches, genes), 0 where a gene does not vary.
        top: how many to choose.

    Returns:
        Places of the genes chosen, ascending, (top,) or fewer where there are not so many.
    """
    order = np.argsort(-scores, axis=1, kind="stable")
    ranks = np.argsort(order, axis=1, kind="stable").astype(np.float64)
    ranks[ranks >= top] = np.nan
    times = (~np.isnan(ranks)).sum(axis=0)
    median = np.full(scores.shape[1], np.inf)
    median[times > 0] = np.nanmedian(ranks[:, times > 0], axis=0)
    return np.sort(np.lexsort((median, -times))[:top])
