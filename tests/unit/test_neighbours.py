"""Nearest neighbours equal those of a dense search, in slices and on several ranks."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest

from clue_dist import neighbours
from clue_dist.errors import DataError
from clue_dist.neighbours import Neighbours, find_neighbours
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


@pytest.mark.parametrize("slice_elements", [1, 200, 2**23])
def test_neighbours_are_those_of_a_dense_search(
    slice_elements: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(neighbours, "_SLICE_ELEMENTS", slice_elements)
    generator = np.random.default_rng(0)
    queries, keys = generator.normal(size=(40, 5)), generator.normal(size=(30, 5))
    for others in (None, keys):
        found = find_neighbours(queries, 7, others)
        targets = queries if others is None else others
        indices, distances = search_densely(queries, targets, others is None)
        np.testing.assert_array_equal(found.indices, indices[:, :7])
        np.testing.assert_allclose(found.distances, distances[:, :7], atol=1e-7)


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
