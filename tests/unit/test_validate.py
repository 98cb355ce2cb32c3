"""What validation reads of held-out cells: FOSCTTM, ELBOs and InfoNCE, by modality and by cell."""

from __future__ import annotations

import math
import re
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from clue_dist.checkpoint.run_folder import RunState
from clue_dist.data.batch import Batch, find_pair_rows
from clue_dist.losses.info_nce import compute_info_nce
from clue_dist.losses.objective import (
    HeldOutScores,
    compute_alignment,
    score_discriminator,
)
from clue_dist.metrics.integration import (
    measure_ilisi,
    measure_islands,
    measure_label_accuracy,
    measure_mixing,
)
from clue_dist.model.noise import Noise
from clue_dist.neighbours.nearest import find_neighbours
from clue_dist.ranks import Ranks
from clue_dist.train import validate
from clue_dist.train.trainer import Trainer, ValidationCells
from clue_dist.train.validate import Validation, score_held_out_cells, validate_model
from tests.pins import ROOT
from tests.unit.model_helpers import B, DirectEngine, repeat_cells, small_model


class RecordedLines:
    """Takes the place of the sinks."""

    def __init__(self) -> None:
        self.lines: list[dict[str, Any]] = []

    def write_numbers(self, split: str, step: int, numbers: dict[str, Any]) -> None:
        self.lines.append({"split": split, "step": step, **numbers})

    def write_event(self, event: str, step: int, numbers: dict[str, Any]) -> None:
        self.write_numbers("event", step, {"event": event, **numbers})


def make_trainer(has_paired_cells: bool = True, **objective: float) -> tuple[Trainer, Batch]:
    model, batch, _ = small_model(lambda_self=0.5, lambda_cross=0.25, **objective)
    setup: Any = SimpleNamespace(config=SimpleNamespace(seed=0), has_paired_cells=has_paired_cells)
    return Trainer(DirectEngine(model), setup, Ranks(), torch.device("cpu")), batch


def choose_cells(
    batch: Batch, fitting: Batch | None = None, labels: np.ndarray | None = None
) -> ValidationCells:
    unknown = np.full(batch.n_cells, "")
    return ValidationCells(batch, unknown if labels is None else labels, fitting, batch)


def score_batch(trainer: Trainer, batch: Batch) -> Validation:
    return score_held_out_cells(trainer, batch, choose_cells(batch))


def score_directly(trainer: Trainer, batch: Batch) -> HeldOutScores:
    with torch.no_grad():
        trainer.engine.eval()
        noise = Noise(0, 0, {"held out": B}, 1)
        return trainer.compute_in_engine(lambda objective: objective.score_held_out(batch, noise))


def test_modalities_count_for_what_they_explain_of_the_held_out_cells(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    trainer, batch = make_trainer()
    cells, weights = choose_cells(batch, repeat_cells(batch, 8)), trainer.model.space.expert_weight
    monkeypatch.setattr(validate, "measure_explained", lambda *_: torch.full((3,), torch.inf))
    score_held_out_cells(trainer, batch, cells)
    claimed = weights.clone()
    explained = torch.tensor([0.5, torch.inf, 2.0]) * claimed
    monkeypatch.setattr(validate, "measure_explained", lambda *_: explained)
    score_held_out_cells(trainer, batch, cells)
    torch.testing.assert_close(weights, torch.tensor([0.5, 1.0, 1.0]) * claimed)


def test_validation_scores_every_modality_and_every_pair() -> None:
    trainer, batch = make_trainer()
    parts = score_batch(trainer, batch).parts
    pairs = ("m0-m1", "m0-m2", "m1-m2")
    assert set(parts) == {
        *(
            f"{score}/{pair}"
            for score in ("foscttm", "mixing", "contrastive", "mse")
            for pair in pairs
        ),
        *(f"{term}/m{k}" for term in ("self", "cross", "d") for k in range(3)),
        "islands",
    }
    assert not any(" " in name for name in parts)
    assert trainer.engine.module.training  # it goes on


def test_the_mean_of_the_cells_is_the_mean_over_pairs_of_modalities() -> None:
    trainer, batch = make_trainer()
    validation = score_batch(trainer, batch)
    foscttm = [value for name, value in validation.parts.items() if name.startswith("foscttm")]
    assert len(validation.cells) == 8  # of twelve, those of two modalities or more
    assert math.fsum(validation.cells) / 8 == pytest.approx(math.fsum(foscttm) / 3)


def test_mixing_is_that_of_the_held_out_cells_with_both_modalities() -> None:
    trainer, batch = make_trainer()
    parts = score_batch(trainer, batch).parts
    _, latents = trainer.model.read_latents(batch, score_directly(trainer, batch).posterior)
    rows = [batch.modalities[name].rows.tolist() for name in ("m0", "m2")]
    both = sorted(set(rows[0]) & set(rows[1]))
    first, second = (
        latents[name][[places.index(cell) for cell in both]]
        for name, places in zip(("m0", "m2"), rows, strict=True)
    )
    assert parts["mixing/m0-m2"] == pytest.approx(measure_mixing(first, second))


def test_latents_are_those_that_embedding_gives() -> None:
    trainer, batch = make_trainer()
    scores = score_directly(trainer, batch)
    joint, alone = trainer.model.read_latents(batch, scores.posterior)
    expected_joint, expected = trainer.model.eval().embed_batch(batch)
    torch.testing.assert_close(joint, expected_joint, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(alone, expected, rtol=1e-5, atol=1e-6)


def test_held_out_cells_are_encoded_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """The space is fitted with what is scored."""
    trainer, batch = make_trainer()
    fitting = repeat_cells(batch, 8)
    seen, infer = [], trainer.model._infer_posterior

    def infer_posterior(cells: Batch, *rest: Any) -> Any:
        seen.append(cells)
        return infer(cells, *rest)

    monkeypatch.setattr(trainer.model, "_infer_posterior", infer_posterior)
    cells = ValidationCells(batch, np.full(B, ""), fitting, None)
    score_held_out_cells(trainer, batch, cells)
    assert trainer.model.space.is_fitted
    assert [id(cells) for cells in seen] == [id(batch), id(fitting)]


def test_rank_0_alone_compares_cells(monkeypatch: pytest.MonkeyPatch) -> None:
    trainer, batch = make_trainer()
    found = ([0.5, 0.25], {"foscttm/m0-m1": 0.5})
    monkeypatch.setattr(Ranks, "run_on_first", lambda *_: found)
    monkeypatch.setattr(validate, "compute_nearer_share", None)
    assert score_batch(trainer, batch) == Validation(*found)


def test_validation_tells_how_the_joint_z_lies(monkeypatch: pytest.MonkeyPatch) -> None:
    trainer, batch = make_trainer()
    code = torch.arange(B) % 2
    code[-1] = -1  # of an unknown batch
    batch = replace(batch, batch_code=code)
    labels = np.array(["T", "B", "", "T"] * 3)
    cells = choose_cells(batch, labels=labels)
    # Nine labelled cells would all vote for the label of each.
    assert "accuracy" not in score_held_out_cells(trainer, batch, cells).parts
    monkeypatch.setattr(validate, "LEAST_LABELLED", 9)
    parts = score_held_out_cells(trainer, batch, cells).parts
    joint, _ = trainer.model.eval().embed_batch(batch)
    patterns = np.array([str(row) for row in batch.observed.tolist()])
    islands = measure_islands(find_neighbours(joint, 30), patterns)
    assert parts["islands"] == pytest.approx(max(islands.values()))
    known = labels != ""
    accuracy = measure_label_accuracy(find_neighbours(joint[known], 15), labels[known])
    assert parts["accuracy"] == pytest.approx(accuracy)
    assert parts["ilisi"] == pytest.approx(
        measure_ilisi(find_neighbours(joint[:-1], 90), np.arange(B - 1) % 2)
    )


def test_elbos_by_modality_are_the_terms_of_eq_13_and_14() -> None:
    """Weighted by modality and by the cells that have it, they add up to the cells' ELBOs."""
    trainer, batch = make_trainer()
    objective, n_cells = trainer.engine.module, batch.observed.sum(0).tolist()
    objective.config = objective.config.model_copy(update={"lambda_cross": 0.0})
    scores = score_directly(trainer, batch)
    by_modality = [scores.terms[f"self/m{k}"] * n_cells[k] for k in range(3)]
    assert float(scores.minus_elbo.sum()) == pytest.approx(0.5 * float(sum(by_modality)), rel=1e-5)
    assert not any(name.startswith("cross") for name in scores.terms)


def test_info_nce_of_a_pair_is_that_of_its_two_modalities(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """On any number of ranks: each of them has all held-out cells."""

    def gather(*_: Tensor) -> None:
        raise AssertionError("held-out cells are not gathered")

    monkeypatch.setattr("clue_dist.losses.info_nce._gather_ranks", gather)
    trainer, batch = make_trainer()
    scores = score_directly(trainer, batch)
    with torch.no_grad():
        output = trainer.model(batch, Noise(0, 0, {"held out": B}, 1))
    contrast = output.contrast[:, :, [0, 2]]
    info_nce = compute_info_nce(
        contrast,
        find_pair_rows(batch.observed[:, [0, 2]]),
        batch.batch_code,
        output.log_scale,
        None,
        1.0,
        False,
    )
    assert float(scores.terms["contrastive/m0-m2"]) == pytest.approx(float(info_nce))


def test_of_many_cells_info_nce_takes_some_of_every_stratum(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("clue_dist.losses.objective.MOST_CONTRASTED", 5)
    trainer, batch = make_trainer()
    scores = score_directly(trainer, batch)
    with torch.no_grad():
        output = trainer.model(batch, Noise(0, 0, {"held out": B}, 1))
    some = slice(None, None, 3)  # four of twelve cells
    contrast, pair_rows = output.contrast[:, some, :2], find_pair_rows(batch.observed[some, :2])
    info_nce = compute_info_nce(
        contrast, pair_rows, batch.batch_code[some], output.log_scale, None, 1.0, False
    )
    assert float(scores.terms["contrastive/m0-m1"]) == pytest.approx(float(info_nce))


def test_without_pairs_the_score_is_the_weighted_elbo_of_each_cell() -> None:
    trainer, batch = make_trainer(has_paired_cells=False)
    validation = score_batch(trainer, batch)
    assert validation.cells == pytest.approx(score_directly(trainer, batch).minus_elbo.tolist())


def test_a_second_validation_of_the_same_weights_gives_the_same_bits() -> None:
    trainer, batch = make_trainer()
    assert score_batch(trainer, batch) == score_batch(trainer, batch)


@pytest.mark.parametrize("wrong", ["score", "self/m0"])
def test_what_is_not_finite_is_told_and_logged_nowhere(
    wrong: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer, batch = make_trainer()
    validation = Validation([math.nan if wrong == "score" else 0.5] * 3, {"self/m0": math.inf})
    monkeypatch.setattr(validate, "score_held_out_cells", lambda *_: validation)
    sinks: Any = RecordedLines()
    state = validate_model(trainer, choose_cells(batch), RunState(8, 1, ""), sinks)
    event, *lines = sinks.lines
    assert event["event"] == "validation not finite"
    assert wrong in event["found"]
    assert (state.bad, state.best_step) == ((1, 0) if wrong == "score" else (0, 8))
    assert [line["score"] for line in lines] == ([] if wrong == "score" else [0.5])
    assert all("self/m0" not in line for line in lines)


def test_latents_that_are_not_finite_are_a_score_that_is_not() -> None:
    trainer, batch = make_trainer()
    with torch.no_grad():
        trainer.model.heads.weight.fill_(math.nan)
    assert all(map(math.isnan, score_batch(trainer, batch).cells))


def test_lines_of_validation_have_keys_without_blanks_that_the_page_explains() -> None:
    trainer, batch = make_trainer()
    sinks: Any = RecordedLines()
    state = validate_model(trainer, choose_cells(batch), RunState(8, 1, ""), sinks)
    again = validate_model(trainer, choose_cells(batch), replace(state, step=9), sinks)
    assert (again.lowest_step, again.best_step, again.best_score) == (8, 9, state.lowest_score)
    page = (ROOT / "docs" / "training.md").read_text()
    for name in sinks.lines[-1].keys() - {"split", "step"}:
        assert " " not in name
        assert re.search(f"`{name.split('/')[0]}[/`]", page), name


def test_distance_and_discriminator_of_held_out_cells_are_those_of_eq_9_and_12() -> None:
    trainer, batch = make_trainer()
    scores = score_directly(trainer, batch)
    with torch.no_grad():
        output = trainer.model(batch, Noise(0, 0, {"held out": B}, 1))
    some = [0, 2]
    distance = compute_alignment(output.z.flatten(2)[:, some], batch.observed[:, some])
    assert float(scores.terms["mse/m0-m2"]) == pytest.approx(float(distance))
    for k in range(3):
        rows = batch.observed[:, k]
        alone = torch.zeros_like(batch.observed)
        alone[:, k] = True
        ln_q = score_discriminator(output.logits[rows], alone[rows])
        assert float(scores.terms[f"d/m{k}"]) == pytest.approx(float(ln_q))
