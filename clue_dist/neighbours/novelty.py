"""How unlike all types of a reference a cell is, compared with the reference's own cells.

One cell's distance to the nearest type is noisy: many cells of a new type lie no farther from a
known type than outliers of that type. But cells of a new type lie together. So where many cells are
asked about at once, each is judged together with the nearest among them.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from clue_dist.neighbours.nearest import find_neighbours

_SHRINKAGE = 0.1  # towards equal variances, of the covariance within types
_PRIOR_CELLS = 5  # by which the spread of a small type is drawn to that of all
_FEWEST_TOGETHER = 100  # cells that are judged as a set
_ALIGNED_QUANTILE = 0.25  # of distances, which few new cells change
_HELD_OUT_PARTS = 5  # of a reference, each compared with the types of the others
_FEWEST_HELD_OUT = 30  # cells of a reference that is cut into parts
_NEAREST = 15  # cells that a cell is judged together with
# Cells among which the nearest are searched. More cells are cut into even parts of at most so many,
# so that time grows with their number and not with its square.
_MOST_TOGETHER = 2**14


@dataclass(frozen=True, eq=False)
class TypeSpread:
    """Where each type lies, and how its cells are spread: all types alike, but for a factor."""

    means: Tensor  # (C, D), whitened
    whitening: Tensor  # (D, D)
    spread: Tensor  # (C,), median distance of a type's cells from their mean

    @classmethod
    def fit(cls, points: Tensor, codes: np.ndarray, n_types: int) -> TypeSpread:
        """Fit to labelled points (n, D)."""
        counts = torch.from_numpy(np.bincount(codes, minlength=n_types)).double()
        index = torch.from_numpy(codes)
        means = torch.zeros(n_types, points.shape[1], dtype=points.dtype)
        means.index_add_(0, index, points)
        means /= counts.clamp(min=1)[:, None]
        means[counts == 0] = torch.inf  # nobody is near a type without cells
        residual = points - means[index]
        covariance = residual.T @ residual / len(points)
        ridge = _SHRINKAGE * covariance.diagonal().mean() + 1e-12
        inverse = torch.linalg.inv(covariance + ridge * torch.eye(len(covariance)).double())
        whitening = torch.linalg.cholesky(inverse)
        distances = (residual @ whitening).norm(dim=1)
        middle = distances.median()
        spread = torch.stack(
            [
                (distances[index == code].median() * count + middle * _PRIOR_CELLS)
                / (count + _PRIOR_CELLS)
                if count
                else middle
                for code, count in enumerate(counts)
            ]
        )
        return cls(means @ whitening, whitening, spread.clamp(min=1e-12))

    def measure_distances(self, points: Tensor) -> np.ndarray:
        """Distance to the nearest type, and the same in units of each type's spread, (n, 2)."""
        filled = self.means.isfinite().all(1)
        distances = torch.cdist(points @ self.whitening, self.means[filled])
        relative = distances / self.spread[filled]
        return torch.stack([distances.amin(1), relative.amin(1)], 1).numpy()


@dataclass(frozen=True, eq=False)
class ReferenceRanks:
    """The distances of a reference's cells, among which those of others get a rank."""

    distances: np.ndarray  # (n, 2) ascending by column
    largest: np.ndarray  # (n,) ascending, the larger rank of each cell

    @classmethod
    def sort_distances(cls, distances: np.ndarray) -> ReferenceRanks:
        """Sort the distances (n, 2) of a reference."""
        ordered = np.sort(distances, axis=0)
        return cls(ordered, np.sort(_rank_largest(distances, ordered)))

    def rank_distances(self, distances: np.ndarray) -> np.ndarray:
        """Rank distances (n, 2): the share of the reference with smaller ones, (n,).

        It stays below 1, and cells beyond all of the reference keep their order.
        """
        largest = _rank_largest(distances, self.distances)
        beyond = np.maximum(largest / max(self.largest[-1], 1e-12) - 1, 0)
        n_smaller = np.searchsorted(self.largest, largest)
        return np.asarray((n_smaller + beyond / (1 + beyond)) / (len(self.largest) + 1))


@dataclass(frozen=True, eq=False)
class NoveltyScale:
    """The cells of a reference, with which others are compared."""

    spread: TypeSpread
    alone: ReferenceRanks  # of each cell by itself
    together: ReferenceRanks  # of each cell together with its nearest

    @classmethod
    def fit(cls, points: Tensor, codes: np.ndarray, n_types: int) -> NoveltyScale:
        """Fit to a reference (n, D) of cells of known types (n,)."""
        spread = TypeSpread.fit(points, codes, n_types)
        distances = _measure_held_out(points, codes, n_types)
        shared = _average_nearest(points, distances, spread.whitening)
        return cls(spread, *map(ReferenceRanks.sort_distances, (distances, shared)))

    def measure_novelty(self, queries: np.ndarray) -> np.ndarray:
        """Measure of cells (n, D) the share of the reference that lies nearer to a type, (n,).

        Of 100 cells or more, each is judged together with its nearest, as those of the reference
        are. And as cells that a model was trained on spread more or less than new ones do, their
        distances are scaled until their lower quartiles are, on average, those of the reference.
        """
        points, distances = torch.as_tensor(queries), np.empty((len(queries), 2))
        for rows in _deal_rows(len(points)):
            distances[rows] = self.spread.measure_distances(points[rows].double())
        if len(points) < _FEWEST_TOGETHER:
            return self.alone.rank_distances(distances)
        shared = _average_nearest(points, distances, self.spread.whitening)
        # Both distances get one factor: where they differ says what is beside a narrow type.
        expected, found = (
            np.log(np.maximum(np.quantile(values, _ALIGNED_QUANTILE, axis=0), 1e-12)).mean()
            for values in (self.together.distances, shared)
        )
        return self.together.rank_distances(shared * np.exp(expected - found))


def _measure_held_out(points: Tensor, codes: np.ndarray, n_types: int) -> np.ndarray:
    """Distances of a reference's cells to types without them, (n, 2).

    A cell lies nearer to the mean of cells that it is one of than others do.
    """
    if len(points) < _FEWEST_HELD_OUT:
        return TypeSpread.fit(points, codes, n_types).measure_distances(points)
    distances = np.empty((len(points), 2))
    parts = np.random.default_rng(0).permutation(len(points)) % _HELD_OUT_PARTS
    for part in range(_HELD_OUT_PARTS):
        is_held_out = parts == part
        spread = TypeSpread.fit(points[~is_held_out], codes[~is_held_out], n_types)
        distances[is_held_out] = spread.measure_distances(points[is_held_out])
    return distances


def _average_nearest(points: Tensor, distances: np.ndarray, whitening: Tensor) -> np.ndarray:
    """Distances (n, 2), averaged over each point (n, D) and its nearest, where types are round."""
    means = np.empty_like(distances)
    for rows in _deal_rows(len(points)):
        found = find_neighbours(points[rows].double() @ whitening, _NEAREST).indices
        part = distances[rows]
        means[rows] = (part + part[found].sum(1)) / (1 + found.shape[1])
    return means


def _deal_rows(n_rows: int) -> Iterator[np.ndarray]:
    """Deal rows to as few parts of at most _MOST_TOGETHER as there can be."""
    n_parts = -(-n_rows // _MOST_TOGETHER)
    for part in range(n_parts):
        yield np.arange(part, n_rows, n_parts)


def _rank_largest(distances: np.ndarray, ordered: np.ndarray) -> np.ndarray:
    """The larger of the ranks that both distances (n, 2) have among ordered ones (m, 2).

    Of two types one may be wide and the other narrow: the first distance misses what is new beside
    a narrow type, and the second what is new within reach of a wide one. Beyond the largest ranks
    grow on, so that the farthest cells keep their order.
    """
    ranks = [
        np.searchsorted(ordered[:, column], distances[:, column]) / len(ordered)
        + np.maximum(distances[:, column] / max(ordered[-1, column], 1e-12) - 1, 0)
        for column in range(2)
    ]
    return np.asarray(np.maximum(*ranks))
