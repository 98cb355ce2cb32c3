"""Exact nearest neighbours, found for a slice of the queries at a time.

Distances are Euclidean, in float64. Memory is O(N k) and never N x N; time is quadratic. Ranks
share the queries, and all of them get the neighbours of every query.
"""

from __future__ import annotations

import base64
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from clue_dist.errors import ConfigError, DataError
from clue_dist.ranks import Ranks

_FEW_KEYS = 4_096  # up to which the approximate search compares all
_LISTS_SEARCHED = 32  # of an approximate index
_KEYS_PER_LIST = 64  # that k-means of an approximate index sees
_SLICE_ELEMENTS = 2**21  # distances in memory at a time: 16 MiB, of which caches hold a good part


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
) -> Neighbours:
    """Find the nearest keys of each query; of keys as far away as the last, any may be taken.

    Args:
        queries: (N, D), on any device; every rank passes the same.
        n_neighbours: how many of them; all where there are fewer.
        keys: (M, D). By default the queries themselves, of which none is its own neighbour.
        ranks: processes that share the queries. All must call, and all get the result.

    Raises:
        DataError: values that are not finite.
    """
    ranks = ranks or Ranks()
    among_themselves = keys is None
    points = _require_finite_points(queries)
    targets = points if keys is None else _require_finite_points(keys)
    count = min(n_neighbours, len(targets) - among_themselves)
    part = ranks.slice_for_rank(len(points))
    query_square, key_square = (points**2).sum(1), (targets**2).sum(1)
    indices, distances = [np.empty((0, count), np.int64)], [np.empty((0, count))]
    for rows in _slice_queries(len(points), len(targets), part):
        # Half of how far the squared distance is below the query's own square. It orders keys as
        # the distance does, in one pass over the memory instead of three.
        closeness = torch.addmm(key_square / -2, points[rows], targets.T)
        if among_themselves:
            closeness.diagonal(rows.start).fill_(-torch.inf)
        nearest = closeness.topk(count)
        squares = query_square[rows, None] - 2 * nearest.values
        indices.append(nearest.indices.cpu().numpy())
        distances.append(squares.clamp_(min=0).sqrt().cpu().numpy())
    found = Neighbours(np.concatenate(indices), np.concatenate(distances))
    if ranks.world == 1:
        return found
    parts = [Neighbours.from_plain(value) for value in ranks.gather_values(found.to_plain())]
    return Neighbours(
        np.concatenate([neighbours.indices for neighbours in parts]),
        np.concatenate([neighbours.distances for neighbours in parts]),
    )


def find_approximate_neighbours(
    queries: np.ndarray | Tensor, n_neighbours: int, keys: np.ndarray | Tensor
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
        np.ascontiguousarray(_require_finite_points(u, torch.float32).cpu().numpy())
        for u in (queries, keys)
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
    squares, indices = index.search(points, min(n_neighbours, len(targets)))
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


def compute_distances(
    queries: Tensor, keys: Tensor, part: slice
) -> Iterator[tuple[Tensor, Tensor]]:
    """Compute squared distances, slice by slice.

    Args:
        queries: (N, D) float64.
        keys: (M, D) float64.
        part: which queries.

    Yields:
        Row numbers (n,) of queries, and their squared distances to all keys (n, M).
    """
    query_square, key_square = (queries**2).sum(1), (keys**2).sum(1)
    for rows in _slice_queries(len(queries), len(keys), part):
        product = (2 * queries[rows]) @ keys.T
        distances = query_square[rows, None] + key_square[None]
        distances = distances.sub_(product).clamp_(min=0)
        yield torch.arange(rows.start, rows.stop, device=distances.device), distances


def _slice_queries(n_queries: int, n_keys: int, part: slice) -> Iterator[slice]:
    """Slices of the queries of `part`, of a few distances each."""
    step = max(1, _SLICE_ELEMENTS // n_keys)
    start, stop, _ = part.indices(n_queries)
    for first in range(start, stop, step):
        yield slice(first, min(first + step, stop))


def scale_to_length_one(points: Tensor) -> Tensor:
    """Scale each row of (N, D) to length 1; a row of zeros stays as it is."""
    length: Tensor = points.norm(dim=1, keepdim=True)
    return points / length.clamp(min=1e-12)


def _require_finite_points(
    points: np.ndarray | Tensor, dtype: torch.dtype = torch.float64
) -> Tensor:
    """Points as a tensor, of which one that is not finite would have no neighbours."""
    tensor = torch.as_tensor(points).detach().to(dtype)
    n_wrong = int((~tensor.isfinite()).any(1).sum())
    if n_wrong:
        raise DataError(
            "the embedding is not finite", got=f"{n_wrong} of {len(tensor)} cells with NaN or Inf"
        )
    return tensor
