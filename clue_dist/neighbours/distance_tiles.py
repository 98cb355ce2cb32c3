"""All distances between two sets of points, a tile at a time, each a bound in float32.

A product of matrices in float32 takes half as long as one in float64, and how far rounding can
move it is known. What it leaves open is decided in float64 by `distance_kernels`, so that results
are exact. A tile serves both directions, from its rows to its columns and back. Memory is O(N).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from threading import Lock

import numpy as np
import torch
from threadpoolctl import threadpool_limits

TILE = 512  # points on either side of a tile, of 1 MiB, which a core's own cache holds
_UNIT32, _UNIT64 = 2.0**-24, 2.0**-53  # how far rounding moves a number, relatively
_LEAST_SLACK = 2.0**-100  # more than what rounding of the smallest numbers comes to
_SMALLEST_EXPONENT = -1_000  # so that 2 ** 1000, by which points are scaled, is a number


@dataclass(frozen=True)
class BoundedPoints:
    """N points, and a copy in float32 whose products bound their distances."""

    exact: np.ndarray  # (N, D + 1) float64; the last column is half the square of a point's length
    bounding: np.ndarray  # (N, D + 2) float32: the centred point, 1, half its square less the slack
    slack: np.ndarray  # (N,) float64, half of what a point adds to how far a bound may be too low
    scale: float  # the points are the caller's, times this power of two


@dataclass(frozen=True)
class Tile:
    """Bounds on half the squared distances of some queries to some keys."""

    first_query: int
    first_key: int
    # (n, m) float32. A bound is at most half the squared distance, and above it less twice the
    # slack of both points.
    bounds: np.ndarray


def bound_points(first: np.ndarray, second: np.ndarray) -> tuple[BoundedPoints, BoundedPoints]:
    """Prepare two sets of points, which may be the same one, for `fold_tiles`.

    Args:
        first: (N, D) float64, finite.
        second: (M, D) float64.
    """
    # A power of two changes no digit, and keeps squares within the range of float32.
    largest = max(np.abs(points).max(initial=0.0) for points in (first, second))
    exponent = max(float(np.ceil(np.log2(largest))), _SMALLEST_EXPONENT) if largest else 0.0
    scale = 2.0**-exponent
    keys = _append_half_square(second, scale)
    queries = keys if first is second else _append_half_square(first, scale)
    # Distances stay, while squares, and with them what rounding does, become small.
    centre = keys[:, :-1].mean(0) if len(keys) else np.zeros(second.shape[1])
    bounded = _bound_points(keys, centre, scale)
    return bounded if first is second else _bound_points(queries, centre, scale), bounded


def _append_half_square(points: np.ndarray, scale: float) -> np.ndarray:
    count, width = points.shape
    exact = np.empty((count, width + 1))
    np.multiply(points, scale, out=exact[:, :width])
    exact[:, width] = np.einsum("ij,ij->i", exact[:, :width], exact[:, :width]) / 2
    return exact


def _bound_points(exact: np.ndarray, centre: np.ndarray, scale: float) -> BoundedPoints:
    count, width = len(exact), len(centre)
    bounding = np.empty((count, width + 2), np.float32)
    points = bounding[:, :width]
    np.subtract(exact[:, :width], centre, out=points, casting="same_kind")
    square = np.einsum("ij,ij->i", points, points, dtype=np.float64)
    # Added in any order, n products are off by n roundings of the sum of their sizes, which is at
    # most that of both squares. Some more roundings were made before, of the factors.
    n_roundings = bounding.shape[1] + 8
    slack = n_roundings * (_UNIT32 * square + 8 * _UNIT64 * exact[:, width]) + _LEAST_SLACK
    bounding[:, width] = 1
    bounding[:, width + 1] = square / 2 - slack
    return BoundedPoints(exact, bounding, slack, scale)


def fold_tiles(
    queries: BoundedPoints,
    keys: BoundedPoints,
    part: slice,
    fold: Callable[[Tile, bool], object],
    *,
    both_ways: bool,
    mark_done: Callable[[int], object] = lambda n_queries: None,
) -> None:
    """Fold all distances of queries and keys, tile by tile, into what is known of the points.

    Threads share the queries. Two never fold into the same points at once. Where all points of one
    set are asked for each other, tiles below the diagonal are left out.

    Args:
        queries: N points.
        keys: M points.
        part: which queries.
        fold: takes a tile, and whether its columns are the points to fold into, or its rows.
        both_ways: whether columns are folded into, too.
        mark_done: takes how many more queries have met all keys.
    """
    first, last, _ = part.indices(len(queries.exact))
    starts = range(first, last, TILE)
    locks = {start: Lock() for start in (*starts, *range(0, len(keys.exact), TILE))}
    is_same = is_symmetric(queries, keys, part)

    def fold_queries(start: int) -> None:
        asked = slice(start, min(start + TILE, last))
        for tile in iterate_tiles(queries, keys, asked, start if is_same else 0):
            with locks[start]:
                fold(tile, False)
            # A tile beside the diagonal is the only one to hold the distances of its points.
            if both_ways and not (is_same and tile.first_key == start):
                with locks[tile.first_key]:
                    fold(tile, True)
        mark_done(asked.stop - start)

    count = torch.get_num_threads()
    if count == 1:
        for start in starts:
            fold_queries(start)
        return
    # Each thread multiplies its own tiles: small products gain little from threads of their own.
    with threadpool_limits(1, "blas"), ThreadPoolExecutor(count) as pool:
        list(pool.map(fold_queries, starts))


def iterate_tiles(
    queries: BoundedPoints, keys: BoundedPoints, asked: slice, first_key: int = 0
) -> Iterator[Tile]:
    """Bound half the squared distances of some queries and all keys, tile by tile.

    Args:
        queries: N points.
        keys: M points.
        asked: which queries, TILE at most.
        first_key: from which key on.

    Yields:
        Tiles, each of which overwrites the one before.
    """
    width = queries.exact.shape[1] - 1
    # So a product is the sum of both half squares, less the product of both points.
    asking = queries.bounding[asked].copy()
    asking[:, :width] *= -1
    asking[:, [width, width + 1]] = asking[:, [width + 1, width]]
    buffer = np.empty(len(asking) * TILE, np.float32)
    for start in range(first_key, len(keys.exact), TILE):
        met = keys.bounding[start : start + TILE]
        bounds = buffer[: len(asking) * len(met)].reshape(len(asking), len(met))
        np.matmul(asking, met.T, out=bounds)
        yield Tile(asked.start, start, bounds)


def is_symmetric(queries: BoundedPoints, keys: BoundedPoints, part: slice) -> bool:
    """Whether all points of one set are asked for each other."""
    return queries is keys and part.indices(len(queries.exact)) == (0, len(keys.exact), 1)
