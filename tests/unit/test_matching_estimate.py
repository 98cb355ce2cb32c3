"""Estimates of matching: exact where all cells are asked, within their error where few are."""

import numpy as np
import pytest

from clue_dist.errors import DataError
from clue_dist.metrics import matching_estimate
from clue_dist.metrics.integration import measure_mixing
from clue_dist.metrics.matching import compute_scores
from clue_dist.metrics.matching_estimate import EstimatedScore, estimate_matching


def draw_pairs(n_cells: int, noise: float = 0.5) -> list[np.ndarray]:
    """Two noisy looks at the same cells, (N, 6) each."""
    rng = np.random.default_rng(0)
    cells = rng.normal(size=(n_cells, 6))
    return [(cells + noise * rng.normal(size=cells.shape)).astype(np.float32) for _ in range(2)]


def test_all_cells_give_the_exact_scores(monkeypatch):
    monkeypatch.setattr(matching_estimate, "_KEYS_AT_ONCE", 64)
    first, second = draw_pairs(300)
    found = estimate_matching(first, second, n_queries=300)
    exact = compute_scores(first, second, np.zeros(300))["global"]
    assert found["foscttm"].value == pytest.approx(exact["foscttm"], abs=1e-6)
    assert found["recall10"].value == pytest.approx(exact["recall10"])
    assert found["mixing"].value == pytest.approx(measure_mixing(first, second), abs=1e-6)
    assert found["foscttm"].standard_error == found["mixing"].standard_error == 0


@pytest.mark.parametrize("noise", [0.1, 0.5, 2.0])
def test_all_cells_give_the_exact_matching_score(noise, monkeypatch):
    monkeypatch.setattr(matching_estimate, "_KEYS_AT_ONCE", 64)
    monkeypatch.setattr(matching_estimate, "_SAMPLE", 50)
    monkeypatch.setattr(matching_estimate, "_PART_MATCHED", 1)
    first, second = draw_pairs(300, noise)
    found = estimate_matching(first, second)["match"]
    exact = compute_scores(first, second, np.zeros(300))["global"]["match"]
    assert found.value == pytest.approx(exact, abs=1e-9)
    assert found.standard_error == 0


def test_estimates_are_as_far_off_as_their_error_says():
    first, second = draw_pairs(1_500)
    exact = compute_scores(first, second, np.zeros(1_500))["global"]
    exact["mixing"] = measure_mixing(first, second)
    estimates = [estimate_matching(first, second, 150, seed) for seed in range(30)]
    for name, value in exact.items():
        scores = [estimate[name] for estimate in estimates]
        errors = [(score.value - value) / score.standard_error for score in scores]
        assert 0.5 < np.std(errors) < 1.6, name
        assert abs(np.mean(errors)) < 0.7, name


def test_profiles_on_the_disk_are_read_in_parts(tmp_path):
    first, second = draw_pairs(200)
    np.save(tmp_path / "first.npy", first)
    mapped = np.load(tmp_path / "first.npy", mmap_mode="r")
    assert estimate_matching(mapped, second, 50) == estimate_matching(first, second, 50)


def test_equal_profiles_are_not_nearer_than_the_partner():
    points = np.tile(np.array([[1.0, 2.0, 3.0]]), (20, 1))
    assert estimate_matching(points, points * 1.7)["foscttm"] == EstimatedScore(0.0, 0.0)


def test_what_does_not_fit_is_refused():
    first, second = draw_pairs(20)
    with pytest.raises(DataError, match="same cells"):
        estimate_matching(first, second[:10])
    second[3] = np.nan
    with pytest.raises(DataError, match="1 cell with NaN"):
        estimate_matching(first, second)
