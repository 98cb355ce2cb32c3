"""Measures of one space equal a dense transcription of their definitions, and know extremes."""

from __future__ import annotations

import sys
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from sklearn.metrics import silhouette_samples

from clue_dist.metrics import integration
from clue_dist.neighbours.nearest import find_neighbours
from clue_dist.ranks import Ranks


def order_others(queries: np.ndarray, keys: np.ndarray) -> np.ndarray:
    """For each query the keys from the nearest on; where both are the same, without itself."""
    distances = ((queries[:, None] - keys[None]) ** 2).sum(2)
    if queries is keys:
        np.fill_diagonal(distances, np.inf)
    order = np.argsort(distances, axis=1)
    return order[:, : len(keys) - (queries is keys)]


def scale_rows(points: np.ndarray) -> np.ndarray:
    return points / np.maximum(np.linalg.norm(points, axis=1, keepdims=True), 1e-12)


def mix_densely(first: np.ndarray, second: np.ndarray) -> float:
    pool = np.concatenate([scale_rows(first), scale_rows(second)])
    order = order_others(pool, pool)[:, :30]
    is_second = np.arange(len(pool)) >= len(first)
    return float(np.mean([is_second[row] != is_second[i] for i, row in enumerate(order)]))


def find_islands_densely(latent: np.ndarray, patterns: list[str]) -> dict[str, float]:
    order = order_others(latent, latent)
    islands = {}
    for name in set(patterns):
        members = [cell for cell, pattern in enumerate(patterns) if pattern == name]
        same = [patterns[other] == name for cell in members for other in order[cell, :30]]
        islands[name] = np.mean(same) / ((len(members) - 1) / (len(patterns) - 1))
    return islands


def transfer_densely(first: np.ndarray, second: np.ndarray, labels: list[str]) -> float:
    kept = [cell for cell, label in enumerate(labels) if label not in ("", "nan")]
    units, names = [scale_rows(u[kept]) for u in (first, second)], [labels[c] for c in kept]
    right = []
    for queries, keys in (units, units[::-1]):
        for cell, row in enumerate(order_others(queries, keys)):
            votes = [names[other] for other in row if other != cell][:15]
            right.append(max(sorted(set(names)), key=votes.count) == names[cell])
    return float(np.mean(right))


def draw_cells(seed: int, n_cells: int = 140) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Two noisy views of cells of four labels, one of which says nothing; and the labels."""
    generator = np.random.default_rng(seed)
    labels = generator.choice(["", "B", "NK", "T", "nan"], n_cells)
    centres = np.unique(labels, return_inverse=True)[1]
    shared = generator.normal(size=(n_cells, 6)) + 1.2 * np.eye(5, 6)[centres]
    first, second = (shared + 0.7 * generator.normal(size=shared.shape) for _ in range(2))
    second[:, 0] += 0.8
    return first, second, labels


@pytest.mark.parametrize("seed", range(3))
def test_measures_equal_their_dense_definitions(seed: int) -> None:
    first, second, labels = draw_cells(seed)
    scores = integration.score_mixing(first, second)
    assert scores["mixing"] == pytest.approx(mix_densely(first, second), abs=1e-9)
    assert integration.measure_mixing(first, second) == scores["mixing"]
    assert 0 < scores["mixing_ilisi"] < 1
    transferred = integration.transfer_labels(first, second, labels)
    assert transferred == pytest.approx(transfer_densely(first, second, list(labels)), abs=1e-9)
    patterns = np.random.default_rng(seed).choice(["adt", "rna", "rna+adt"], len(first))
    islands = integration.measure_islands(find_neighbours(first, 90), patterns)
    assert islands == pytest.approx(find_islands_densely(first, list(patterns)), abs=1e-9)


def test_two_modalities_that_cannot_be_told_apart_mix_and_two_clouds_do_not() -> None:
    generator = np.random.default_rng(0)
    first, second = generator.normal(size=(2, 1000, 4))
    mixed = integration.score_mixing(first, second)
    assert mixed["mixing"] == pytest.approx(0.5, abs=0.01)
    assert mixed["mixing_ilisi"] > 0.9
    away = np.array([100.0, 0, 0, 0])
    assert integration.score_mixing(first + away, second - away) == {
        "mixing": 0.0,
        "mixing_ilisi": pytest.approx(0.0, abs=1e-9),
    }


def test_a_pattern_that_lies_apart_is_an_island() -> None:
    generator = np.random.default_rng(0)
    latent, patterns = generator.normal(size=(2000, 3)), np.repeat(["adt", "rna"], [500, 1500])
    patterns = generator.permutation(patterns)
    mixed = integration.measure_islands(find_neighbours(latent, 30), patterns)
    assert mixed == pytest.approx({"adt": 1, "rna": 1}, abs=0.06)
    latent[patterns == "adt"] += 100
    apart = integration.measure_islands(find_neighbours(latent, 30), patterns)
    assert apart == pytest.approx({"adt": 1999 / 499, "rna": 1999 / 1499})
    alone = integration.measure_islands(find_neighbours(latent, 30), np.array(["x"] + ["y"] * 1999))
    assert list(alone) == ["y"]


@pytest.mark.parametrize("n_batches", [2, 4])
def test_ilisi_is_near_one_where_batches_mix_and_zero_where_they_do_not(n_batches: int) -> None:
    latent, batch = np.random.default_rng(0).normal(size=(800, 5)), np.arange(800) % n_batches
    mixed = integration.measure_ilisi(find_neighbours(latent, 90), batch)
    latent += 100.0 * batch[:, None]
    apart = find_neighbours(latent, 90)
    assert mixed > 0.75  # of about 30 neighbours, so never quite alike
    assert integration.measure_ilisi(apart, batch) == pytest.approx(0, abs=1e-9)
    assert integration.measure_clisi(apart, batch) == pytest.approx(1, abs=1e-9)


def test_cells_are_weighed_in_slices(monkeypatch: pytest.MonkeyPatch) -> None:
    generator = np.random.default_rng(0)
    neighbours, batch = find_neighbours(generator.normal(size=(300, 3)), 40), np.arange(300) % 3
    whole, sizes = integration.measure_ilisi(neighbours, batch), []
    weigh = integration._weigh_neighbours

    def watch_slice(distances: np.ndarray, entropy: float) -> np.ndarray:
        sizes.append(len(distances))
        return weigh(distances, entropy)

    monkeypatch.setattr(integration, "_CELLS_AT_ONCE", 128)
    monkeypatch.setattr(integration, "_weigh_neighbours", watch_slice)
    assert integration.measure_ilisi(neighbours, batch) == whole
    assert sizes == [128, 128, 44]


def test_no_embedding_mixes_uneven_batches_further_than_batches_dealt_at_random() -> None:
    generator = np.random.default_rng(0)
    latent = generator.normal(size=(2000, 3))
    batch = np.repeat([0, 1, 2], [1200, 600, 200])
    latent[batch == 2] += 5
    scores = integration.score_joint_latent(latent, batch * 0, batch, np.full(2000, ""))
    expected = (1 / np.square([0.6, 0.3, 0.1]).sum() - 1) / 2
    assert scores["ilisi_random"] == pytest.approx(expected, abs=0.06)
    assert scores["ilisi"] < scores["ilisi_random"] - 0.1


def test_ilisi_of_an_uneven_mixture_is_the_inverse_simpson_index_of_its_shares() -> None:
    generator = np.random.default_rng(0)
    batch = (generator.random(2000) < 0.2).astype(int)
    expected = 1 / (0.2**2 + 0.8**2) - 1  # over two batches, so that the scale is one
    found = integration.measure_ilisi(find_neighbours(generator.normal(size=(2000, 3)), 90), batch)
    assert found == pytest.approx(expected, abs=0.08)


def test_ilisi_is_that_of_scib_metrics_on_any_scale() -> None:
    generator = np.random.default_rng(3)
    latent, batch = generator.normal(size=(300, 6)), generator.choice(3, 300, p=[0.5, 0.3, 0.2])
    latent[:, 0] += 0.7 * batch
    # `ilisi_knn` of scib-metrics 0.5.10 on sklearn's neighbours, the cell itself and 90 others
    for scale in (1, 1e3):
        found = integration.measure_ilisi(find_neighbours(scale * latent, 90), batch)
        assert found == pytest.approx(0.6447145938873291, abs=1e-5)


def test_the_joint_latent_is_scored_by_what_is_known_of_its_cells(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(integration, "_import_scib", lambda: None)
    latent, _, labels = draw_cells(5)
    patterns, batches = np.tile(["rna", "rna+adt"], 70), np.tile([0, 0, 1, 1], 35)
    known = np.isin(labels, ["B", "NK", "T"])
    scores = integration.score_joint_latent(latent, patterns, batches, labels)
    assert set(scores) == {
        *(
            "cells",
            "islands",
            "ilisi",
            "ilisi_random",
            "labelled_cells",
            "accuracy",
            "clisi",
            "asw",
        ),
    }
    assert (scores["cells"], scores["labelled_cells"]) == (140, known.sum())
    members, names = latent[known], labels[known]
    order = order_others(members, members)[:, :15]
    votes = [[list(names[row]).count(name) for name in ("B", "NK", "T")] for row in order]
    accuracy = np.mean(np.array(["B", "NK", "T"])[np.argmax(votes, 1)] == names)
    assert scores["accuracy"] == pytest.approx(accuracy)
    silhouette = silhouette_samples(members, names).mean()
    assert scores["asw"] == pytest.approx((silhouette + 1) / 2)
    nothing = np.full(140, "")
    assert integration.score_joint_latent(latent, nothing, nothing, nothing) == {"cells": 140}


def test_scib_metrics_gets_our_neighbours_with_the_cell_itself_first(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    taken: dict[str, np.ndarray] = {}

    def count_kbet(neighbours: np.ndarray, batches: np.ndarray) -> tuple[float, int, int]:
        taken["kbet"] = neighbours
        return 0.25, 0, 0

    def cluster(neighbours: np.ndarray, labels: np.ndarray) -> dict[str, float]:
        taken["leiden"] = neighbours
        return {"nmi": 0.5, "ari": 0.75}

    scib: Any = SimpleNamespace(kbet=count_kbet, nmi_ari_cluster_labels_leiden=cluster)
    module = SimpleNamespace(NeighborsResults=lambda indices, distances: indices)
    monkeypatch.setattr(integration, "_import_scib", lambda: scib)
    monkeypatch.setitem(sys.modules, "scib_metrics.nearest_neighbors", module)
    latent, _, labels = draw_cells(6)
    batches, patterns = np.tile([0, 1], 70), np.full(140, "rna")
    scores = integration.score_joint_latent(latent, patterns, batches, labels)
    assert {name: scores[name] for name in integration.SCIB_MEASURES} == {
        "kbet": 0.25,
        "nmi": 0.5,
        "ari": 0.75,
    }
    assert taken["kbet"].shape == (140, 50)
    assert taken["leiden"].shape == (scores["labelled_cells"], 15)
    np.testing.assert_array_equal(taken["kbet"][:, 0], np.arange(140))
    np.testing.assert_array_equal(taken["kbet"][:, 1:], order_others(latent, latent)[:, :49])


def test_scib_metrics_itself_agrees_where_it_is_installed() -> None:
    scib = pytest.importorskip("scib_metrics")
    latent, _, labels = draw_cells(7, 400)
    batches = np.tile([0, 1], 200)
    labels = np.where(labels == "nan", "", labels)
    scores = integration.score_joint_latent(latent, np.full(400, ""), batches, labels)
    assert scores["kbet"] > 0.8
    known = labels != ""
    neighbours = find_neighbours(latent[known], 90)
    given = integration._list_scib_neighbours(neighbours, 91)
    assert scores["clisi"] == pytest.approx(scib.clisi_knn(given, labels[known]), abs=1e-4)
    assert scores["asw"] == pytest.approx(
        scib.silhouette_label(latent[known], labels[known]), abs=1e-4
    )
    assert 0 < scores["ari"] < scores["nmi"] < 1


def test_labels_that_say_nothing_give_no_transfer() -> None:
    points = np.random.default_rng(0).normal(size=(9, 2))
    labels = np.array(["B", *["nan", ""] * 4])
    assert np.isnan(integration.transfer_labels(points, points, labels, Ranks()))
