"""Matching scores equal a dense transcription of their definitions, and the protocol's script."""

from __future__ import annotations

import importlib.util
import json
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from clue_dist.errors import DataError
from clue_dist.metrics import matching
from clue_dist.metrics.partner_ranks import join_ranked_partners, rank_partners_both_ways
from clue_dist.neighbours import distance_tiles
from clue_dist.ranks import Ranks

PROTOCOL = Path(__file__).parents[3] / "shared" / "protocol" / "score.py"


def dense(u1: np.ndarray, u2: np.ndarray) -> dict[str, np.ndarray]:
    """Metric -> (forward, backward) of one group, cell by cell; of equals the first is nearest."""
    x, y = (u / np.maximum(np.linalg.norm(u, axis=1, keepdims=True), 1e-12) for u in (u1, u2))
    n = len(x)

    def distances(a, b):
        return np.array([[((p - q) ** 2).sum() for q in b] for p in a])

    def order(d):
        return np.argsort(d, axis=1, kind="stable")

    xy, yx = distances(x, y), distances(y, x)
    near = {"xy": order(xy)[:, 0], "yx": order(yx)[:, 0]}
    near |= {"xx": order(distances(x, x))[:, 0], "yy": order(distances(y, y))[:, 0]}
    jaccard = np.zeros((n, n))
    for i in range(n):
        for j in range(n):
            of_i = {("y", near["xy"][i]), ("x", near["xx"][i])}
            of_j = {("y", near["yy"][j]), ("x", near["yx"][j])}
            jaccard[i, j] = len(of_i & of_j) / len(of_i | of_j)
    normalised = [m / np.maximum(m.sum(1, keepdims=True), 1e-12) for m in (jaccard, jaccard.T)]
    return {
        "foscttm": np.array([np.mean([d[i] < d[i, i] for i in range(n)]) for d in (xy, yx)]),
        "match": np.array([np.diagonal(m).mean() for m in normalised]),
        "recall10": np.array(
            [np.mean([i in order(d)[i, :10] for i in range(n)]) for d in (xy, yx)]
        ),
    }


def dense_scores(
    u1: np.ndarray, u2: np.ndarray, batch: np.ndarray
) -> dict[str, dict[str, np.ndarray]]:
    scopes = {
        "global": [np.arange(len(u1))],
        "within_batch": [np.flatnonzero(batch == b) for b in np.unique(batch)],
    }
    out = {}
    for scope, groups in scopes.items():
        groups = [g for g in groups if len(g) > 1]
        each = [dense(u1[g], u2[g]) for g in groups]
        total = sum(len(g) for g in groups)
        out[scope] = {
            m: sum(len(g) * e[m] for g, e in zip(groups, each, strict=True)) / total
            for m in matching.METRICS
        }
    return out


def assert_equal_to_dense(u1: np.ndarray, u2: np.ndarray, batch: np.ndarray) -> None:
    expected, directed = dense_scores(u1, u2, batch), matching.score_directions(u1, u2, batch)
    both = matching.compute_scores(u1, u2, batch)
    for scope in matching.SCOPES:
        for metric in matching.METRICS:
            found = [directed[d][scope][metric] for d in matching.DIRECTIONS]
            np.testing.assert_allclose(
                found, expected[scope][metric], atol=1e-12, err_msg=f"{scope} {metric}"
            )
            assert both[scope][metric] == pytest.approx(np.mean(expected[scope][metric]), abs=1e-12)


def noisy_pair(n: int, width: int, seed: int, noise: float = 0.5) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    u = rng.normal(size=(n, width))
    return u + noise * rng.normal(size=u.shape), u + noise * rng.normal(size=u.shape)


@settings(max_examples=40, deadline=None)
@given(
    n=st.integers(2, 40),
    width=st.integers(1, 20),
    batches=st.integers(1, 4),
    seed=st.integers(0, 2**20),
)
def test_scores_follow_their_definitions(n, width, batches, seed):
    if width == 1:  # on a line the normalised rows are all ties
        width = 2
    batch = np.arange(n) % min(batches, n // 2)  # no group of one
    assert_equal_to_dense(*noisy_pair(n, width, seed), batch)


@settings(max_examples=40, deadline=None)
@given(n=st.integers(2, 30), kinds=st.integers(1, 4), seed=st.integers(0, 2**20))
def test_ties_go_to_the_first(n, kinds, seed):
    # Unit vectors and zeros: every distance is 0, 1, 2 or 4 exactly, so that most of them are ties.
    rng = np.random.default_rng(seed)
    u1, u2 = (
        np.eye(kinds)[rng.integers(0, kinds, n)] * rng.choice([-1.0, 0.0, 1.0], (n, 1))
        for _ in range(2)
    )
    assert_equal_to_dense(u1, u2, np.zeros(n, int))


def protocol() -> ModuleType:
    if not PROTOCOL.exists():
        pytest.skip(
            "the protocol's score.py is not beside this repository "
            f"({PROTOCOL.parent.parent.name}/ is absent)"
        )
    spec = importlib.util.spec_from_file_location("protocol_score", PROTOCOL)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(
    ("n", "width", "noise"), [(2, 3, 0.1), (9, 4, 0.5), (300, 8, 0.4), (400, 40, 2.0)]
)
def test_scores_equal_the_protocol_script(n, width, noise, monkeypatch):
    score = protocol()
    monkeypatch.setattr(score, "round", lambda v, _digits: v, raising=False)
    u1, u2 = noisy_pair(n, width, seed=n, noise=noise)
    batch = np.array([f"b{i % 3}" if i % 50 else "alone" if i == 50 else "b0" for i in range(n)])
    if n == 2:
        batch[:] = "b"
    expected, found = score.scores(u1, u2, batch), matching.compute_scores(u1, u2, batch)
    for scope in matching.SCOPES:
        for metric in matching.METRICS:
            assert found[scope][metric] == pytest.approx(expected[scope][metric], abs=1e-9), (
                scope,
                metric,
            )


def test_groups_of_one_are_left_out():
    u1, u2 = noisy_pair(7, 3, seed=1)
    batch = np.array([0, 0, 0, 1, 1, 1, 2])
    without = matching.compute_scores(u1[:6], u2[:6], batch[:6])
    assert matching.compute_scores(u1, u2, batch)["within_batch"] == pytest.approx(
        without["within_batch"]
    )
    assert np.isnan(matching.compute_scores(u1, u2, np.arange(7))["within_batch"]["foscttm"])


def test_cells_of_an_unknown_batch_are_left_out_within_batches():
    u1, u2 = noisy_pair(9, 3, seed=1)
    batch = np.array(["a", "a", "", "b", "b", "", "b", "", "a"])
    known = batch != ""
    expected = matching.compute_scores(u1[known], u2[known], batch[known])["within_batch"]
    found = matching.compute_scores(u1, u2, batch)
    assert found["within_batch"] == pytest.approx(expected)
    assert found["global"] == matching.compute_scores(u1, u2, np.zeros(9))["global"]
    chance = matching.compute_chance(batch)["within_batch"]
    assert chance == matching.compute_chance(batch[known])["within_batch"]
    unknown = matching.compute_scores(u1, u2, np.full(9, ""))  # all cells are of one batch then
    assert unknown["within_batch"] == unknown["global"]


@pytest.mark.parametrize("world", [2, 3, 5])
def test_slices_add_up(world):
    x, y = noisy_pair(23, 5, seed=world)
    x[11], y[19] = x[4], y[4]  # ties, of which the lowest index counts as the nearer
    slices = [Ranks(rank, world).slice_for_rank(23) for rank in range(world)]
    parts = [rank_partners_both_ways(x, y, part) for part in slices]
    for whole, found in zip(
        rank_partners_both_ways(x, y, slice(0, 23)), zip(*parts, strict=True), strict=True
    ):
        joined = join_ranked_partners(part.to_plain() for part in found)
        for name in ("nearer", "ties", "nearest", "least"):
            np.testing.assert_array_equal(getattr(joined, name), getattr(whole, name))


class NotYetSentError(Exception):
    """Other ranks have not sent their values yet."""


@dataclass(frozen=True)
class RecordedRanks(Ranks):
    """A rank that gets what ranks before it have sent, and is the last to send."""

    sent: list[Any] = field(default_factory=list)

    def gather_values(self, value: Any) -> list[Any]:
        self.sent.append(json.loads(json.dumps(value)))
        if len(self.sent) < self.world:
            raise NotYetSentError
        return self.sent


def test_ranks_share_the_pairs():
    (u1, u2), batch = make_hard_pair(41, 0), np.arange(41) % 3
    sent: list[Any] = []
    for rank in range(2):
        with pytest.raises(NotYetSentError):
            matching.score_directions(u1, u2, batch, RecordedRanks(rank, 3, 0, None, sent))
    found = matching.score_directions(u1, u2, batch, RecordedRanks(2, 3, 0, None, sent))
    assert found == matching.score_directions(u1, u2, batch)


def make_hard_pair(n_cells: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Equal cells, and cells nearer to each other than float32 can tell."""
    rng = np.random.default_rng(seed)
    u1, u2 = (rng.normal(size=(n_cells, 5)) for _ in range(2))
    u1[::7] = u1[0]
    u2[::5] = u2[0]
    u1[1::4] = u2[1] + 1e-5 * rng.normal(size=u1[1::4].shape)
    u2[1::4] = u2[1] + 1e-5 * rng.normal(size=u1[1::4].shape)
    return u1, u2


@pytest.mark.parametrize("n_threads", [1, 3])
@pytest.mark.parametrize("seed", range(3))
def test_tiles_and_threads_give_the_dense_scores(n_threads, seed, monkeypatch):
    monkeypatch.setattr(distance_tiles, "TILE", 9)
    monkeypatch.setattr(torch, "get_num_threads", lambda: n_threads)
    assert_equal_to_dense(*make_hard_pair(31, seed), np.arange(31) % 2)


def test_tiles_of_several_chunks_rank_as_a_dense_search():
    first, second = noisy_pair(700, 4, seed=0)
    distances = ((first[:, None] - second[None]) ** 2).sum(2)
    ranked = rank_partners_both_ways(first, second, slice(0, 700))
    for found, expected in zip(ranked, (distances, distances.T), strict=True):
        nearer = (expected < expected.diagonal()[:, None]).sum(1)
        np.testing.assert_array_equal(found.nearer, nearer)
        np.testing.assert_array_equal(found.nearest, expected.argmin(1))


def test_profiles_of_all_cells_are_not_copied(monkeypatch):
    pairs, scale = [], matching._scale_embeddings

    def record_pair(x, y, *others):
        pairs.append((x, y))
        return rank_partners_both_ways(x, y, *others)

    def record_scaled(u1, u2):
        scaled.extend(scale(u1, u2))
        return scaled

    scaled: list[np.ndarray] = []
    monkeypatch.setattr(matching, "_scale_embeddings", record_scaled)
    monkeypatch.setattr(matching, "rank_partners_both_ways", record_pair)
    matching.compute_scores(*noisy_pair(20, 4, seed=0), np.arange(20) % 2)
    assert [np.shares_memory(x, scaled[0]) for x, _ in pairs] == [True, False, False]


def test_each_distance_is_computed_once_and_few_are_in_memory(monkeypatch):
    sizes = []

    def watch_product(*factors, out):
        sizes.append(out.size)
        return product(*factors, out=out)

    product = np.matmul
    monkeypatch.setattr(distance_tiles, "TILE", 16)
    monkeypatch.setattr(distance_tiles.np, "matmul", watch_product)
    matching.compute_scores(*noisy_pair(50, 4, seed=0), np.zeros(50))
    assert sum(sizes) == 50 * 50
    assert max(sizes) == 16 * 16


def test_what_each_pair_adds_to_foscttm():
    u1 = np.array([[1.0, 0.0], [0.0, 1.0], [-1.0, 0.0]])
    u2 = np.array([[1.0, 0.1], [1.0, 0.0], [-1.0, 0.1]])
    by_hand = []
    for i in range(3):
        unit = [u / np.linalg.norm(u, axis=1, keepdims=True) for u in (u1, u2)]
        forth = ((unit[0][i] - unit[1]) ** 2).sum(1)
        back = ((unit[1][i] - unit[0]) ** 2).sum(1)
        by_hand.append(((forth < forth[i]).sum() + (back < back[i]).sum()) / 6)
    np.testing.assert_allclose(matching.compute_nearer_share(u1, u2), by_hand)
    assert len(set(by_hand)) == 3


def test_foscttm_alone_is_the_global_foscttm():
    u1, u2 = noisy_pair(60, 5, seed=3)
    expected = matching.compute_scores(u1, u2, np.zeros(60))["global"]["foscttm"]
    assert matching.compute_foscttm(torch.from_numpy(u1), torch.from_numpy(u2)) == pytest.approx(
        expected
    )
    assert matching.compute_foscttm(u1, u1) == 0
    single = matching.compute_foscttm(
        torch.from_numpy(u1).float().requires_grad_(), torch.from_numpy(u2).float()
    )
    assert single == pytest.approx(expected, abs=1e-3)


def test_knowing_nothing_scores_chance():
    rng = np.random.default_rng(0)
    batch = np.arange(600) % 3
    found = matching.compute_scores(rng.normal(size=(600, 10)), rng.normal(size=(600, 10)), batch)
    expected = matching.compute_chance(batch)
    for scope in matching.SCOPES:
        assert found[scope]["foscttm"] == pytest.approx(0.5, abs=0.03)
        assert found[scope]["recall10"] == pytest.approx(expected[scope]["recall10"], rel=0.5)
    assert expected["global"] == {"foscttm": 0.5, "match": 1 / 600, "recall10": 10 / 600}
    assert expected["within_batch"] == {"foscttm": 0.5, "match": 3 / 600, "recall10": 30 / 600}


def test_a_bad_embedding_is_refused():
    u1, u2 = noisy_pair(5, 3, seed=0)
    u2[3, 1] = np.nan
    with pytest.raises(DataError, match=r"second embedding is not finite[\s\S]*1 of 5"):
        matching.compute_scores(u1, u2, np.zeros(5))
    with pytest.raises(DataError, match="same cells"):
        matching.compute_foscttm(u1, u1[:4])


def test_cells_of_one_batch_are_ranked_once(monkeypatch):
    calls = []

    def count_calls(*arguments):
        calls.append(1)
        return original(*arguments)

    original = matching.rank_partners_both_ways
    monkeypatch.setattr(matching, "rank_partners_both_ways", count_calls)
    points = np.random.default_rng(0).normal(size=(2, 20, 3))
    scores = matching.compute_scores(*points, np.zeros(20))
    assert len(calls) == 1
    assert scores["within_batch"] == scores["global"]
