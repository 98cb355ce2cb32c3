"""Which validation's weights are kept: the latest that cannot be told from the best."""

from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from clue_dist.checkpoint.run_folder import RunState
from clue_dist.ranks import Ranks
from clue_dist.train import validate
from clue_dist.train.setup import is_run_finished
from clue_dist.train.trainer import Trainer


@dataclass
class LoggedLines:
    """Takes the place of the sinks."""

    lines: list[dict[str, Any]]

    def write_numbers(self, _split: str, _step: int, numbers: dict[str, Any]) -> None:
        self.lines.append(numbers)


def kept(
    scores: list[tuple[float, float]], monkeypatch: pytest.MonkeyPatch, patience: int = 0
) -> tuple[RunState, list[int]]:
    """The state after validations of (score, error), one a step, and the steps that are kept."""
    kept_steps: list[int] = []
    looks = iter(scores)
    monkeypatch.setattr(
        validate,
        "score_held_out_cells",
        lambda *_: dict(zip(("score", "error"), next(looks), strict=True)),
    )
    held_out: Any = SimpleNamespace()
    config = SimpleNamespace(train=SimpleNamespace(patience=patience))
    setup: Any = SimpleNamespace(config=config, total_steps=len(scores) + 1)
    trainer = Trainer(None, setup, Ranks(), torch.device("cpu"))
    state, sinks = RunState(0, 1, ""), LoggedLines([])
    for step in range(1, len(scores) + 1):
        state = replace(state, step=step)
        state = validate.validate_model(trainer, held_out, state, sinks)  # type: ignore[arg-type]
        if state.best_step == step:
            kept_steps.append(step)
        assert sinks.lines[-1]["best_step"] == state.best_step == kept_steps[-1]
        if is_run_finished(setup, state):
            break
    return state, kept_steps


def test_later_weights_win_where_scores_cannot_be_told_apart(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    scores = [(0.20, 0.02), (0.10, 0.02), (0.15, 0.02), (0.119, 0.02), (0.11, 0.005)]
    state, saved = kept(scores, monkeypatch)
    assert saved == [1, 2, 4]
    assert (state.best, state.best_step, state.bad) == (0.10, 4, 3)


def test_the_lowest_score_is_the_measure_however_slowly_scores_rise(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    state, saved = kept([(0.10 + 0.008 * i, 0.02) for i in range(10)], monkeypatch)
    assert saved == [1, 2, 3]
    assert state.best == 0.10


def test_without_an_error_only_a_score_as_low_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    assert kept([(3.0, 0.0), (2.0, 0.0), (2.0, 0.0), (2.5, 0.0)], monkeypatch)[1] == [1, 2, 3]


def test_patience_counts_from_the_lowest(monkeypatch: pytest.MonkeyPatch) -> None:
    state, saved = kept(
        [(0.1, 0.05), (0.12, 0.05), (0.13, 0.05), (0.05, 0.01)], monkeypatch, patience=2
    )
    assert (state.step, state.bad) == (3, 2)
    assert saved == [1, 2, 3]
