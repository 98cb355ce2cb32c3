"""Bounds of distances hold, however points lie, and are close where float32 can tell."""

from __future__ import annotations

import numpy as np
import pytest

from clue_dist.neighbours.distance_kernels import compute_half_distance
from clue_dist.neighbours.distance_tiles import bound_points, iterate_tiles


@pytest.mark.parametrize(
    ("scale", "offset", "width"),
    [(1.0, 0.0, 64), (1.0, 100.0, 5), (1e30, 0.0, 3), (1e-30, 0.0, 1), (1e-3, 1.0, 200)],
)
def test_bounds_are_below_the_distances_by_no_more_than_the_slack(
    scale: float, offset: float, width: int
) -> None:
    generator = np.random.default_rng(width)
    first, second = (
        scale * generator.normal(size=(n_points, width)) + offset for n_points in (40, 30)
    )
    first[3] *= 1e-9
    queries, keys = bound_points(first, second)
    [tile] = iterate_tiles(queries, keys, slice(0, 40))
    differences = queries.exact[:, None, :-1] - keys.exact[None, :, :-1]
    halves = (differences**2).sum(2) / 2
    slack = queries.slack[:, None] + keys.slack
    assert (tile.bounds <= halves).all()
    assert (halves <= tile.bounds.astype(float) + 2 * slack).all()
    exact = compute_half_distance(queries.exact, keys.exact, 5, 7)
    assert exact == pytest.approx(halves[5, 7], rel=1e-6)
    assert exact == compute_half_distance(keys.exact, queries.exact, 7, 5)
    assert slack[5, 7] < 1e-4 * halves[5, 7]


def test_ranks_of_one_set_share_its_rows() -> None:
    points = np.random.default_rng(0).normal(size=(20, 3))
    bounded, same = bound_points(points, points)
    assert bounded is same
    shares = [list(iterate_tiles(bounded, bounded, part)) for part in (slice(0, 7), slice(7, 20))]
    assert [tile.bounds.shape for tiles in shares for tile in tiles] == [(7, 20), (13, 20)]
