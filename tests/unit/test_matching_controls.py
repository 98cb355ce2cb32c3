"""FOSCTTM inside types and without depth equals its definition, and knows extremes."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from clue_dist.metrics import matching, matching_controls


def test_only_types_of_twenty_cells_or_more_count_each_as_much_as_another() -> None:
    rng = np.random.default_rng(0)
    labels = np.repeat(["B", "NK", "T"], [60, 19, 20])
    u1, u2 = rng.normal(size=(2, 99, 4))
    u2[labels == "B"] = u1[labels == "B"]
    found = matching_controls.score_within_types(u1, u2, labels)
    within_t = matching.compute_foscttm(u1[labels == "T"], u2[labels == "T"])
    assert found == {"cells": 80, "types": 2, "foscttm": pytest.approx((0 + within_t) / 2)}
    assert within_t > 0.3
    assert matching_controls.score_within_types(u1[60:79], u2[60:79], labels[60:79]) == {}


def test_types_that_are_told_apart_do_not_match_cells_within_them() -> None:
    rng = np.random.default_rng(1)
    labels = np.repeat(["B", "T"], 100)
    centres = 10 * np.eye(2, 6)[np.unique(labels, return_inverse=True)[1]]
    u1, u2 = centres + rng.normal(size=(2, 200, 6))
    assert matching.compute_foscttm(u1, u2) < 0.3
    assert matching_controls.score_within_types(u1, u2, labels)["foscttm"] > 0.4


def test_matching_by_depth_alone_goes_with_depth_and_any_other_stays() -> None:
    rng = np.random.default_rng(2)
    depth = rng.normal(8, 1, 300)
    depths = np.stack([depth, depth + 0.05 * rng.normal(size=300)], axis=1)
    by_depth = [np.stack([np.full(300, 5.0), depths[:, i] - 8], axis=1) for i in (0, 1)]
    noisy = [np.hstack([u, 0.1 * rng.normal(size=(300, 6))]) for u in by_depth]
    assert matching.compute_foscttm(*noisy) < 0.15
    found = matching_controls.score_without_depth(*noisy, depths)
    assert found["cells"] == 300
    assert 0.45 < found["foscttm"] < 0.55
    other = rng.normal(size=(300, 6))
    assert matching_controls.score_without_depth(other, other, depths)["foscttm"] == 0


def test_a_regression_keeps_means_and_leaves_nothing_that_a_line_explains() -> None:
    draw = torch.Generator().manual_seed(0)
    depth = torch.randn(50, 2, generator=draw, dtype=torch.float64)
    points = torch.randn(50, 3, generator=draw, dtype=torch.float64) + depth[:, :1]
    residual = matching_controls.regress_out_depth(points, depth)
    torch.testing.assert_close(residual.mean(0), points.mean(0))
    centred = depth - depth.mean(0)
    torch.testing.assert_close(centred.T @ residual, torch.zeros(2, 3, dtype=torch.float64))
    constant = torch.ones(50, 2, dtype=torch.float64)
    torch.testing.assert_close(matching_controls.regress_out_depth(points, constant), points)
