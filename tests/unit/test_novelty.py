"""How unlike the types of a reference cells are: by themselves, and together with their nearest."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from clue_dist.neighbours import novelty
from clue_dist.neighbours.novelty import NoveltyScale


def draw_cells(n_cells: int, seed: int, width: int = 20) -> tuple[np.ndarray, np.ndarray]:
    """Cells of four types, (N, width), of which the last lies near the first, and their codes."""
    rng = np.random.default_rng(seed)
    centres = np.random.default_rng(7).normal(size=(4, width))
    centres[3] = centres[0] + np.random.default_rng(8).normal(size=width) * 0.7
    codes = rng.integers(4, size=n_cells)
    return centres[codes] + rng.normal(size=(n_cells, width)), codes


def fit_without_last(n_cells: int, width: int = 20) -> NoveltyScale:
    points, codes = draw_cells(n_cells, 0, width)
    known = codes < 3
    return NoveltyScale.fit(torch.from_numpy(points[known]), codes[known], 3)


def test_cells_of_a_new_type_are_found_together_where_one_alone_is_not() -> None:
    scale = fit_without_last(1_200)
    queries, codes = draw_cells(1_000, 1)
    together = scale.measure_novelty(queries) > 0.9
    parts = np.array_split(np.arange(len(queries)), 20)  # of 50 cells, each by itself
    alone = np.concatenate([scale.measure_novelty(queries[part]) for part in parts]) > 0.9
    assert alone[codes == 3].mean() < 0.6
    assert together[codes == 3].mean() > 0.9
    assert together[codes < 3].mean() < 0.2


def test_known_cells_are_kept_by_a_small_reference_of_many_dimensions() -> None:
    """Cells lie nearer to the mean of a type that they are part of than others do."""
    queries, codes = draw_cells(40, 1, width=60)
    found = fit_without_last(160, width=60).measure_novelty(queries[codes < 3])
    assert (found <= 0.9).mean() > 0.8


def test_many_cells_are_compared_part_by_part(monkeypatch: pytest.MonkeyPatch) -> None:
    queries, codes = draw_cells(1_001, 1)
    whole = fit_without_last(600).measure_novelty(queries)
    monkeypatch.setattr(novelty, "_MOST_TOGETHER", 300)
    found = fit_without_last(600).measure_novelty(queries)
    assert np.corrcoef(found, whole)[0, 1] > 0.7
    assert found[codes == 3].mean() > found[codes < 3].mean() + 0.2
    rows = np.concatenate([*novelty._deal_rows(1_001)])
    assert sorted(rows) == list(range(1_001))


def test_a_reference_of_two_cells_and_no_queries_are_possible() -> None:
    scale = NoveltyScale.fit(torch.eye(2, dtype=torch.float64), np.array([0, 1]), 2)
    assert scale.measure_novelty(np.empty((0, 2))).shape == (0,)
    assert scale.measure_novelty(np.eye(2)).shape == (2,)


def test_cells_beyond_all_of_the_reference_keep_their_order() -> None:
    far = np.zeros((6, 20))
    far[:, 0] = [50, 100, 200, 400, 800, 1_600]
    found = fit_without_last(400).measure_novelty(far)
    assert (np.diff(found) > 0).all()
    assert 0.99 < found[0] < found[-1] < 1
