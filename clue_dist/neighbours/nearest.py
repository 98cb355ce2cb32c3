"""Nearest neighbours, exact ones and, by faiss, approximate ones.

Distances are Euclidean, in float64. Memory is O(N k) and never N x N; time is quadratic. Ranks
share the queries, and all of them get the neighbours of every query.
"""

from __future__ import annotations

import base64
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from clue_dist.errors import ConfigError, DataError
from clue_dist.neighbours.distance_kernels import collect_nearest, sort_heaps
from clue_dist.neighbours.distance_tiles import (
    Tile,
    bound_points,
    fold_tiles,
    is_symmetric,
)
from clue_dist.progress import Progress, show_progress
from clue_dist.ranks import Ranks

_SEARCH_TITLE = "searching neighbours"
_FEW_KEYS = 4_096  # up to which the approximate search compares all
_LISTS_SEARCHED = 32  # of an approximate index
_KEYS_PER_LIST = 64  # that k-means of an approximate index sees
_QUERIES_AT_ONCE = 2**14  # of an approximate search, between two looks at its progress


@dataclass(frozen=True)
class Neighbours:
    """The nearest keys of n queries, the nearest first."""

    indices: np.ndarray  # (n, k) int64, rows of the keys
    distances: np.ndarray  # (n, k) float64, float32 of an approximate search

    def to_plain(self) -> list[Any]:
        """Turn it into plain data, as ranks exchange it."""
        # Base64, as lists of numbers would be several times longer than their bytes.
        fields = (self.indices.astype("<i4"), self.distances.astype("<f8"))
        return [
            self.indices.shape,
            *(base64.b64encode(field.tobytes()).decode() for field in fields),
        ]

    @classmethod
    def from_plain(cls, value: list[Any]) -> Neighbours:
        """Make of it again what `to_plain` turned into plain data."""
        shape, *texts = value
        indices, distances = (
            np.frombuffer(base64.b64decode(text), dtype).reshape(shape)
            for text, dtype in zip(texts, ("<i4", "<f8"), strict=True)
        )
        return cls(indices.astype(np.int64), distances)


def find_neighbours(
    queries: np.ndarray | Tensor,
    n_neighbours: int,
    keys: np.ndarray | Tensor | None = None,
    ranks: Ranks | None = None,
    title: str = _SEARCH_TITLE,
) -> Neighbours:
    """Find the nearest keys of each query; of keys as far away, that of lowest index comes first.

    Args:
        queries: (N, D), on any device; every rank passes the same.
        n_neighbours: how many of them; all where there are fewer.
        keys: (M, D). By default the queries themselves, of which none is its own neighbour.
        ranks: processes that share the queries. All must call, and all get the result.
        title: under which the progress of a long search is shown; "" shows none.

    Raises:
        DataError: values that are not finite.
    """
    ranks = ranks or Ranks()
    points = _require_finite_points(queries)
    targets = points if keys is None else _require_finite_points(keys)
    count = min(n_neighbours, len(targets) - (keys is None))
    part = ranks.slice_for_rank(len(points))
    with show_progress(title, part.stop - part.start, is_shown=ranks.is_first) as progress:
        found = _collect_neighbours(points, targets, count, part, progress)
    if ranks.world == 1:
        return found
    parts = [Neighbours.from_plain(value) for value in ranks.gather_values(found.to_plain())]
    return Neighbours(
        np.concatenate([neighbours.indices for neighbours in parts]),
        np.concatenate([neighbours.distances for neighbours in parts]),
    )


def _collect_neighbours(
    points: np.ndarray, targets: np.ndarray, count: int, part: slice, progress: Progress
) -> Neighbours:
    """Neighbours of the queries of a slice; none is its own where `targets` are the points."""
    queries, keys = bound_points(points, targets)
    distances = np.empty((len(points), count))  # half of the squares, as heaps; then sorted
    indices = np.empty((len(points), count), np.int64)
    distances[part], indices[part] = np.inf, len(targets)
    limits = np.full(len(points), np.inf, np.float32)

    def collect_tile(tile: Tile, by_column: bool) -> None:
        places = (by_column, tile.first_query, tile.first_key)
        both = (queries.exact, keys.exact, queries is keys)
        collect_nearest(tile.bounds, *places, *both, limits, distances, indices)

    if count:
        both_ways, mark_done = is_symmetric(queries, keys, part), progress.mark_done
        fold_tiles(queries, keys, part, collect_tile, both_ways=both_ways, mark_done=mark_done)
    found = Neighbours(indices[part], distances[part])
    sort_heaps(found.distances, found.indices)
    found.distances[:] *= 2
    np.sqrt(found.distances, out=found.distances)
    found.distances[:] /= queries.scale
    return found


def find_approximate_neighbours(
    queries: np.ndarray | Tensor,
    n_neighbours: int,
    keys: np.ndarray | Tensor,
) -> Neighbours:
    """Find keys among the nearest of each query by faiss, in less than quadratic time.

    Keys are sorted into the cells of k-means centres, and a query looks into the 32 cells whose
    centres are nearest. Of clustered points some 99% of the true neighbours are found; up to
    4,096 keys the search is exact.

    Args:
        queries: (N, D).
        n_neighbours: how many of them; all where there are fewer.
        keys: (M, D).

    Returns:
        Neighbours, whose index is -1 and distance infinite where too few were found.

    Raises:
        ConfigError: faiss is not installed.
        DataError: values that are not finite.
    """
    faiss = _import_faiss()
    points, targets = (
        np.ascontiguousarray(_require_finite_points(u, torch.float32)) for u in (queries, keys)
    )
    n_lists = int(4 * len(targets) ** 0.5)
    if len(targets) <= _FEW_KEYS:
        index = faiss.IndexFlatL2(targets.shape[1])
    else:
        index = faiss.index_factory(targets.shape[1], f"IVF{n_lists},Flat")
        sample = np.random.default_rng(0).permutation(len(targets))[: _KEYS_PER_LIST * n_lists]
        index.train(targets[np.sort(sample)])
        index.nprobe = _LISTS_SEARCHED
    index.add(targets)
    count = min(n_neighbours, len(targets))
    squares = np.empty((len(points), count), np.float32)
    indices = np.empty((len(points), count), np.int64)
    with show_progress(_SEARCH_TITLE, len(points)) as progress:
        for start in range(0, len(points), _QUERIES_AT_ONCE):
            part = slice(start, start + _QUERIES_AT_ONCE)
            index.search(points[part], count, D=squares[part], I=indices[part])
            progress.mark_done(len(points[part]))
    squares[indices < 0] = np.inf
    return Neighbours(indices, np.sqrt(np.maximum(squares, 0, out=squares), out=squares))


def _import_faiss() -> Any:
    try:
        import faiss
    except ImportError:
        raise ConfigError(
            "approximate neighbours need faiss, which is not installed",
            fix="pip install clue-dist[match], or search exactly",
        ) from None
    return faiss


def scale_to_length_one(points: Tensor) -> Tensor:
    """Scale each row of (N, D) to length 1; a row of zeros stays as it is."""
    length: Tensor = points.norm(dim=1, keepdim=True)
    return points / length.clamp(min=1e-12)


def _require_finite_points(
    points: np.ndarray | Tensor, dtype: torch.dtype = torch.float64
) -> np.ndarray:
    """Points on the CPU, of which one that is not finite would have no neighbours."""
    found: np.ndarray = torch.as_tensor(points).detach().to(dtype).cpu().numpy()
    # By NumPy, as torch would make a copy of all values for it.
    n_wrong = int((~np.isfinite(found)).any(1).sum())
    if n_wrong:
        raise DataError(
            "the embedding is not finite", got=f"{n_wrong} of {len(found)} cells with NaN or Inf"
        )
    return found
