"""Partners across modalities: each method by hand or against a plain computation."""

from dataclasses import replace

import numpy as np
import pytest
import scipy.sparse as sp
from scipy.optimize import linear_sum_assignment

from clue_dist.errors import ConfigError, DataError
from clue_dist.metrics.matching import compute_scores
from clue_dist.neighbours import nearest, partners
from clue_dist.neighbours.nearest import Neighbours, find_approximate_neighbours, find_neighbours
from clue_dist.neighbours.partner_settings import PartnerSettings
from clue_dist.neighbours.partners import METHODS, find_partners, keep_best_partners


def make_profiles(n_cells: int = 60, noise: float = 0.6, seed: int = 0) -> list[np.ndarray]:
    """Two noisy looks at the same cells, (N, 8) each."""
    rng = np.random.default_rng(seed)
    cells = rng.normal(size=(n_cells, 8))
    return [cells + noise * rng.normal(size=cells.shape) for _ in range(2)]


def scale(points: np.ndarray) -> np.ndarray:
    return points / np.linalg.norm(points, axis=1, keepdims=True)


def score_diagonal(weights: sp.csr_array) -> float:
    """Eq. 17: the mean weight of the true partner."""
    return float(weights.diagonal().mean())


@pytest.mark.parametrize("method", METHODS)
def test_rows_sum_to_one_and_are_within_the_limit(method):
    weights = find_partners(*make_profiles(), PartnerSettings(method, n_partners=5))
    sums = np.asarray(weights.sum(1)).ravel()
    assert weights.shape == (60, 60)
    assert np.diff(weights.indptr).max() <= 5
    assert (weights.data > 0).all()
    filled = np.diff(weights.indptr) > 0
    assert filled.all() or method == "mutual"
    np.testing.assert_allclose(sums[filled], 1)


@pytest.mark.parametrize("method", METHODS)
def test_partners_of_clean_pairs_are_found(method):
    weights = find_partners(*make_profiles(noise=0.01), PartnerSettings(method))
    assert score_diagonal(weights) == 1


@pytest.mark.parametrize("method", METHODS)
def test_within_a_batch_no_partner_is_of_another(method):
    first, second = make_profiles()
    rng = np.random.default_rng(1)
    batches = rng.choice(["a", "b", "only first"], 60), rng.choice(["a", "b"], 60)
    weights = find_partners(first, second, PartnerSettings(method, n_partners=3), batches).tocoo()
    assert (batches[0][weights.row] == batches[1][weights.col]).all()
    assert not set(weights.row) & set(np.flatnonzero(batches[0] == "only first"))


def test_shared_neighbours_follow_eq_16():
    first, second = make_profiles(12)
    settings = PartnerSettings("shared", n_partners=1_000, n_neighbours=3)
    expected = np.zeros((12, 12))
    x, y = scale(first), scale(second)

    def choose(points: np.ndarray, keys: np.ndarray) -> list[set[int]]:
        return [set(row[:3]) for row in np.argsort(-points @ keys.T, axis=1).tolist()]

    to_second, to_first = choose(x, y), choose(y, x)
    in_first, in_second = choose(x, x), choose(y, y)
    for i in range(12):
        for j in range(12):
            both = len(to_second[i] & in_second[j]) + len(to_first[j] & in_first[i])
            either = len(to_second[i] | in_second[j]) + len(to_first[j] | in_first[i])
            expected[i, j] = both / either
    expected /= expected.sum(1, keepdims=True)
    np.testing.assert_allclose(find_partners(first, second, settings).toarray(), expected)


def test_shared_neighbours_have_the_matching_score_of_the_matching_room():
    first, second = make_profiles()
    settings = PartnerSettings("shared", n_partners=1_000, n_neighbours=1)
    scores = compute_scores(first, second, np.zeros(60))["global"]["match"]
    directions = find_partners(first, second, settings), find_partners(second, first, settings)
    assert np.mean([score_diagonal(weights) for weights in directions]) == pytest.approx(scores)


def test_mutual_neighbours_are_among_the_nearest_of_each_other():
    first, second = make_profiles()
    settings = PartnerSettings("mutual", n_partners=1_000, n_neighbours=4)
    cosines = scale(first) @ scale(second).T
    forward = cosines.argsort(1).argsort(1) >= 56
    backward = cosines.argsort(0).argsort(0) >= 56
    weights = find_partners(first, second, settings).toarray()
    np.testing.assert_array_equal(weights > 0, forward & backward)


def test_transport_has_the_marginals_and_the_kernel_of_entropic_transport():
    first, second = make_profiles()[0], make_profiles()[1][:40]
    settings = PartnerSettings("transport", n_partners=60, n_candidates=60, temperature=0.2)
    plan = partners.link_transport(
        partners.ProfilePair(
            *(partners.scale_to_length_one(partners.torch.tensor(u)) for u in (first, second)),
            settings,
        )
    ).toarray()
    np.testing.assert_allclose(plan.sum(0), 1 / 40, rtol=0.01)
    np.testing.assert_allclose(plan.sum(1), 1 / 60, rtol=0.01)
    # ln plan = f_i + g_j + cosine / temperature: nothing is left after both scales are removed.
    rest = np.log(plan) - scale(first) @ scale(second).T / 0.2
    rest = rest - rest.mean(0) - rest.mean(1, keepdims=True) + rest.mean()
    np.testing.assert_allclose(rest, 0, atol=1e-6)


def test_bipartite_is_the_best_assignment():
    first, second = make_profiles()[0][:50], make_profiles()[1]
    weights = find_partners(first, second, PartnerSettings("bipartite"))
    rows, columns = linear_sum_assignment(scale(first) @ scale(second).T, maximize=True)
    np.testing.assert_array_equal(weights.tocoo().row, rows)
    np.testing.assert_array_equal(weights.tocoo().col, columns)


def test_bipartite_in_blocks_gives_every_cell_at_most_one_partner(monkeypatch):
    monkeypatch.setattr(partners, "_BIPARTITE_BLOCK", 16)
    weights = find_partners(*make_profiles(noise=0.01), PartnerSettings("bipartite"))
    assert weights.sum(0).max() == 1
    assert weights.sum(1).max() == 1
    assert score_diagonal(weights) > 0.8


def test_scaled_cosines_leave_aside_a_profile_that_is_near_everything():
    rng = np.random.default_rng(0)
    centre, cells = 3 * np.eye(8)[0], 0.3 * rng.normal(size=(80, 8))
    first = centre + cells
    second = centre + cells + 0.25 * rng.normal(size=cells.shape)
    second[0] = centre
    chosen = {
        method: find_partners(first, second, PartnerSettings(method)).tocoo().col
        for method in ("nearest", "scaled")
    }
    assert (chosen["nearest"] == 0).sum() > 5
    assert (chosen["scaled"] == 0).sum() < (chosen["nearest"] == 0).sum() / 2


def test_the_best_partners_are_kept_and_scaled():
    weights = keep_best_partners(sp.csr_array([[4.0, 1, 3], [0, 0, 0], [2, 2, 2]]), 2)
    expected = [[4 / 7, 0, 3 / 7], [0, 0, 0], [0.5, 0.5, 0]]
    np.testing.assert_allclose(weights.toarray(), expected)


def test_candidates_compared_in_slices_are_the_same(monkeypatch):
    first, second = make_profiles()
    settings = PartnerSettings("scaled", n_partners=3)
    whole = find_partners(first, second, settings)
    monkeypatch.setattr(partners, "_ROWS_AT_ONCE", 7)
    np.testing.assert_array_equal(find_partners(first, second, settings).toarray(), whole.toarray())


def test_an_approximate_search_in_slices_finds_the_same(monkeypatch):
    pytest.importorskip("faiss")
    points = np.random.default_rng(0).normal(size=(90, 6))
    whole = find_approximate_neighbours(points, 5, points[:80])
    monkeypatch.setattr(nearest, "_QUERIES_AT_ONCE", 20)
    found = find_approximate_neighbours(points, 5, points[:80])
    np.testing.assert_array_equal(found.indices, whole.indices)
    np.testing.assert_allclose(found.distances, whole.distances, atol=1e-5)


def test_approximate_neighbours_are_nearly_those_of_the_exact_search():
    pytest.importorskip("faiss")
    rng = np.random.default_rng(0)
    points = rng.normal(size=(50, 6))[rng.integers(50, size=6_000)] + rng.normal(size=(6_000, 6))
    exact = find_neighbours(points[:300], 10, points).indices
    found = find_approximate_neighbours(points[:300], 10, points).indices
    recall = np.mean([len(set(a) & set(b)) / 10 for a, b in zip(exact, found, strict=True)])
    assert 0.95 < recall <= 1


@pytest.mark.parametrize("method", METHODS)
def test_neighbours_that_faiss_does_not_find_are_no_partners(method, monkeypatch):
    """It then gives -1 for their index, and an infinite distance."""

    def lose_last(queries, count, keys):
        found = find_neighbours(queries, count, keys)
        indices, distances = found.indices.copy(), found.distances.copy()
        indices[:, -1], distances[:, -1] = -1, np.inf
        return Neighbours(indices, distances)

    monkeypatch.setattr(partners, "find_approximate_neighbours", lose_last)
    settings = PartnerSettings(method, n_candidates=5, n_neighbours=5, n_partners=3)
    approximate = replace(settings, approximate=True)
    first, second = make_profiles()
    found = find_partners(first, second, approximate)
    if method == "transport":  # candidates that are left are those of a search for fewer
        expected = find_partners(first, second, replace(settings, n_candidates=4))
        np.testing.assert_allclose(found.toarray(), expected.toarray(), atol=1e-9)
    assert found.shape == (60, 60)
    assert found.indices.min() >= 0


def test_cells_of_unknown_batches_get_no_partner():
    first, second = make_profiles()
    batches = np.where(np.arange(60) % 2, "a", "")
    found = find_partners(first, second, batches=(batches, batches))
    has_partner = np.diff(found.indptr) > 0
    np.testing.assert_array_equal(has_partner, batches == "a")


def test_without_faiss_the_error_says_what_to_install(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "faiss", None)
    with pytest.raises(ConfigError, match=r"pip install clue-dist\[match\]"):
        find_partners(*make_profiles(), PartnerSettings("nearest", approximate=True))


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"method": "guess"}, "nearest, scaled, shared, mutual, transport, bipartite"),
        ({"n_partners": 1_001}, "1 or more, 1,000 at most"),
        ({"n_partners": 1.5}, "a whole number"),
        ({"temperature": 0.0}, "above 0"),
    ],
)
def test_settings_that_cannot_work_are_refused(settings, words):
    with pytest.raises(ConfigError, match=words):
        PartnerSettings(**settings)


def test_profiles_of_different_spaces_are_refused():
    with pytest.raises(DataError, match="in one space"):
        find_partners(np.ones((3, 4)), np.ones((3, 5)))


def test_batches_without_both_modalities_are_refused():
    with pytest.raises(DataError, match="no batch has cells of both"):
        find_partners(*make_profiles(), None, (np.zeros(60), np.ones(60)))
