"""Which validation's weights are kept: the latest that cannot be told from the best."""

from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from clue_dist.checkpoint.run_folder import RunState
from clue_dist.ranks import Ranks
from clue_dist.train import loop, validate


@dataclass
class Said:
    """Takes the place of the sinks."""

    lines: list[dict[str, Any]]

    def write(self, _kind: str, _step: int, values: dict[str, Any]) -> None:
        self.lines.append(values)

    def say(self, _text: str) -> None:
        pass


def kept(
    scores: list[tuple[float, float]], monkeypatch: pytest.MonkeyPatch, patience: int = 0
) -> tuple[RunState, list]:
    """The state after validations of (score, error), one a step, and the steps whose weights were saved."""
    saved: list[int] = []
    looks = iter(scores)
    saver: Any = SimpleNamespace(best=lambda state: saved.append(state.step))
    monkeypatch.setattr(
        validate,
        "score_held_out_cells",
        lambda *_: dict(zip(("score", "error"), next(looks), strict=True)),
    )
    held_out: Any = SimpleNamespace(n_cells=1, observed=torch.ones(1, 1))
    config = SimpleNamespace(run="run", seed=0, train=SimpleNamespace(patience=patience))
    setup: Any = SimpleNamespace(config=config, has_paired_cells=True, total_steps=len(scores) + 1)
    state, said = RunState(0, 1, ""), Said([])
    for step in range(1, len(scores) + 1):
        state = RunState(**{**vars(state), "step": step})
        state = loop._validate(None, setup, Ranks(), held_out, state, said, saver)  # type: ignore[arg-type]
        assert said.lines[-1]["best_step"] == state.best_step == saved[-1]
        if loop._finished(state, setup):
            break
    return state, saved


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
