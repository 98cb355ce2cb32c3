"""Which validation's weights are kept: the latest that cannot be told from the lowest score."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from clue_dist.checkpoint.run_folder import RunState, read_state
from clue_dist.train import loop
from clue_dist.train.setup import is_run_finished
from clue_dist.train.validate import choose_weights, format_best_weights

# Cells differ far more than two validations of the same cell do.
EASY_AND_HARD = np.linspace(0.0, 0.4, 101)
NOISE = [*np.resize([0.01, -0.01], 100).tolist(), 0.0]


def score_cells(shift: float, noise: float = 1.0) -> list[float]:
    """Scores of 101 cells that lie by `shift` above those of the others, give or take `noise`."""
    return (EASY_AND_HARD + shift + noise * np.array(NOISE)).tolist()


def choose_among(validations: list[list[float]], patience: int = 0) -> tuple[RunState, list[int]]:
    """The state after one validation a step, and the steps whose weights were kept."""
    config = SimpleNamespace(train=SimpleNamespace(patience=patience))
    setup: Any = SimpleNamespace(config=config, total_steps=len(validations) + 1)
    state, kept_steps = RunState(0, 1, ""), []
    for step, cells in enumerate(validations, 1):
        state, _ = choose_weights(replace(state, step=step), cells)
        if state.best_step == step:
            kept_steps.append(step)
            assert state.best_score == pytest.approx(np.mean(cells))
        if is_run_finished(setup, state):
            break
    return state, kept_steps


def test_the_error_is_that_of_the_difference_cell_by_cell() -> None:
    lowest, worse = score_cells(0.0, noise=-1.0), score_cells(0.005)
    state, _ = choose_weights(RunState(1, 1, ""), lowest)
    state, error = choose_weights(replace(state, step=2), worse)
    assert error == pytest.approx(np.std(np.subtract(worse, lowest), ddof=1) / 101**0.5)
    assert error < 0.002 < np.std(lowest) / 101**0.5  # the error of either score alone
    assert state.best_step == 1  # though it lies within the error of either score
    state, _ = choose_weights(replace(state, step=3), score_cells(0.001))
    assert state.best_step == 3


def test_overfitting_is_seen_on_a_small_set() -> None:
    """Scores that fall and then rise, a little at a time: not the last weights are kept."""
    state, kept_steps = choose_among(
        [score_cells(0.0008 * abs(step - 10), noise=(-1) ** step) for step in range(40)]
    )
    assert state.lowest_step == 11
    assert kept_steps[-1] < 20


def test_later_weights_win_where_scores_cannot_be_told_apart() -> None:
    shifts = (0.1, 0.0, 0.05, 0.003, 0.005)  # one and a half, and two and a half errors
    state, kept_steps = choose_among(
        [score_cells(shift, noise=1.0 if shift else -1.0) for shift in shifts]
    )
    assert kept_steps == [1, 2, 4]
    assert (state.lowest_step, state.best_step, state.bad) == (2, 4, 3)
    assert state.lowest_score == pytest.approx(0.2)
    assert state.best_score == pytest.approx(0.203)


def test_the_lowest_score_is_the_measure_however_slowly_scores_rise() -> None:
    validations = [score_cells(0.0015 * step, noise=(-1) ** step) for step in range(12)]
    state, kept_steps = choose_among(validations)
    assert kept_steps == [1, 2]  # the third differs from the first in every cell alike
    assert state.lowest_score == pytest.approx(0.2)


def test_patience_counts_from_the_lowest() -> None:
    validations = [score_cells(shift) for shift in (0.1, 0.12, 0.13, 0.05)]
    state, kept_steps = choose_among(validations, patience=2)
    assert (state.step, state.bad) == (3, 2)
    assert kept_steps == [1]


def test_what_is_said_of_a_run_names_the_score_of_the_kept_weights() -> None:
    state = replace(
        RunState(1000, 1, ""),
        lowest_score=0.0732,
        lowest_step=864,
        best_score=0.0735,
        best_step=966,
    )
    assert loop.TrainingResult(state, True).format_ending() == (
        "finished at step 1000, kept the weights of step 966: validation score 0.0735 "
        "(lowest 0.0732, at step 864)"
    )
    best = replace(state, best_score=0.0732, best_step=864)
    assert format_best_weights(best).endswith("of step 864: validation score 0.0732, the lowest")
    setup: Any = SimpleNamespace(
        total_steps=2000, config=SimpleNamespace(train=SimpleNamespace(patience=1))
    )
    explanation = loop._explain_early_end(setup, replace(state, bad=1))
    assert explanation == "no lower validation score since step 864: stopping early"


def test_a_resumed_run_chooses_as_an_unbroken_one(tmp_path: Path) -> None:
    """The scores of the cells come back to the bit."""
    state, _ = choose_weights(RunState(1, 1, ""), score_cells(1 / 3))
    (tmp_path / "state.json").write_text(json.dumps(asdict(state)))
    (tmp_path / "rank-00000.safetensors").touch()
    assert read_state(tmp_path) == state
    assert len(state.lowest_cells) == 101


def test_a_state_of_an_earlier_version_goes_on_with_its_lowest_score(tmp_path: Path) -> None:
    before = {"step": 40, "world": 1, "fingerprint": "f", "best": 0.2, "best_step": 30, "bad": 1}
    (tmp_path / "state.json").write_text(json.dumps(before))
    (tmp_path / "rank-00000.safetensors").touch()
    state = read_state(tmp_path)
    assert (state.lowest_score, state.best_step) == (0.2, 30)
    assert loop.TrainingResult(state, True).format_ending() == "finished at step 40"
    # Its cells were not kept, so that no error can be told: only as low a score takes over.
    state, _ = choose_weights(replace(state, step=41), score_cells(0.001))
    assert (state.best_step, state.bad) == (30, 2)
    state, _ = choose_weights(replace(state, step=42), score_cells(-0.01))
    assert (state.best_step, state.lowest_step) == (42, 42)
