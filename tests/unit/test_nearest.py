"""Nearest neighbours equal those of a dense search, in slices and on several ranks."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch

from clue_dist.errors import DataError
from clue_dist.neighbours import distance_tiles
from clue_dist.neighbours.nearest import Neighbours, find_neighbours
from clue_dist.ranks import Ranks


def search_densely(
    queries: np.ndarray, keys: np.ndarray, leave_out_self: bool
) -> tuple[np.ndarray, np.ndarray]:
    """Indices and distances of all keys, the nearest first."""
    distances = np.linalg.norm(queries[:, None] - keys[None], axis=2)
    order = np.argsort(distances, axis=1)
    if leave_out_self:
        order = np.stack([row[row != query] for query, row in enumerate(order)])
    return order, np.take_along_axis(distances, order, 1)


@dataclass(frozen=True)
class RecordedRanks(Ranks):
    """A rank that has the values of the others already."""

    others: tuple[Any, ...] = ()  # by rank

    def gather_values(self, value: Any) -> list[Any]:
        values = [*self.others]
        values[self.rank] = json.loads(json.dumps(value))
        return values


@pytest.mark.parametrize(("tile", "n_threads"), [(1, 1), (12, 1), (1024, 1), (12, 3)])
def test_neighbours_are_those_of_a_dense_search(
    tile: int, n_threads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(distance_tiles, "TILE", tile)
    monkeypatch.setattr(torch, "get_num_threads", lambda: n_threads)
    generator = np.random.default_rng(0)
    queries, keys = generator.normal(size=(40, 5)), generator.normal(size=(30, 5))
    for others in (None, keys):
        found = find_neighbours(queries, 7, others)
        targets = queries if others is None else others
        indices, distances = search_densely(queries, targets, others is None)
        np.testing.assert_array_equal(found.indices, indices[:, :7])
        np.testing.assert_allclose(found.distances, distances[:, :7], atol=1e-7)


@pytest.mark.parametrize("is_among_themselves", [True, False])
def test_neighbours_in_tiles_of_several_chunks_are_those_of_a_dense_search(
    is_among_themselves: bool,
) -> None:
    points = np.random.default_rng(0).normal(size=(700, 3))
    others = None if is_among_themselves else points[:610] + 0.1
    targets = points if others is None else others
    found = find_neighbours(points, 4, others)
    indices, _ = search_densely(points, targets, is_among_themselves)
    np.testing.assert_array_equal(found.indices, indices[:, :4])


@pytest.mark.parametrize(("scale", "offset"), [(1e-150, 0.0), (1e100, 0.0), (1.0, 1e4)])
def test_neighbours_do_not_depend_on_the_scale_and_the_place_of_points(
    scale: float, offset: float
) -> None:
    points = np.random.default_rng(0).normal(size=(60, 5))
    expected = find_neighbours(points, 9)
    found = find_neighbours(scale * points + offset, 9)
    np.testing.assert_array_equal(found.indices, expected.indices)
    np.testing.assert_allclose(found.distances, scale * expected.distances, rtol=1e-5)


def test_of_keys_as_far_away_that_of_lowest_index_comes_first() -> None:
    points = np.tile(np.eye(3), (4, 1))  # each four times; the others are all as far away
    found = find_neighbours(points, 5)
    np.testing.assert_array_equal(found.indices[3], [0, 6, 9, 1, 2])
    keys = find_neighbours(points[:1], 5, points)
    np.testing.assert_array_equal(keys.indices, [[0, 3, 6, 9, 1]])


def test_points_among_themselves_are_compared_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(distance_tiles, "TILE", 10)
    sizes = []

    def watch_product(*factors: np.ndarray, out: np.ndarray) -> np.ndarray:
        sizes.append(out.size)
        return product(*factors, out=out)

    product = np.matmul
    monkeypatch.setattr(distance_tiles.np, "matmul", watch_product)
    find_neighbours(np.random.default_rng(0).normal(size=(50, 3)), 5)
    assert sum(sizes) == 50 * 60 / 2  # half of all pairs, and the tiles on the diagonal


def test_no_point_is_its_own_neighbour_even_where_points_are_equal() -> None:
    found = find_neighbours(np.ones((6, 2)), 90)
    assert found.indices.shape == (6, 5)
    assert all(cell not in row for cell, row in enumerate(found.indices))


def test_ranks_share_the_queries_and_all_have_every_neighbour() -> None:
    points = np.random.default_rng(1).normal(size=(31, 4))
    whole = find_neighbours(points, 6)
    plain: list[Any] = []
    for rank in range(3):
        part = Ranks(rank, 3).slice_for_rank(31)
        plain.append(Neighbours(whole.indices[part], whole.distances[part]).to_plain())
    for rank in range(3):
        found = find_neighbours(points, 6, ranks=RecordedRanks(rank, 3, 0, None, tuple(plain)))
        np.testing.assert_array_equal(found.indices, whole.indices)
        np.testing.assert_allclose(found.distances, whole.distances, atol=1e-9)
    # What a rank adds is its own part and no more.
    silent = tuple(Neighbours(whole.indices[:0], whole.distances[:0]).to_plain() for _ in range(3))
    alone = find_neighbours(points, 6, ranks=RecordedRanks(1, 3, 0, None, silent))
    np.testing.assert_array_equal(alone.indices, whole.indices[10:20])


def test_points_that_are_not_finite_are_refused() -> None:
    points = np.zeros((5, 2))
    points[3, 1] = np.nan
    with pytest.raises(DataError, match=r"not finite[\s\S]*1 of 5 cells"):
        find_neighbours(points, 2)
