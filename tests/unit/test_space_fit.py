"""What a validation fits: the common space, and what held-out pairs choose of it."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from clue_dist.data.batch import Batch
from clue_dist.losses.objective import EncodedCells, Objective
from clue_dist.model.common_space import FEWEST_PAIRED, CommonSpace, find_directions
from clue_dist.ranks import Ranks
from clue_dist.train.space_fit import (
    DEFAULT_POLE,
    LEAST_COUNTED,
    FittedSpace,
    choose_directions,
    explain_missing_space,
    fit_common_space,
)
from clue_dist.train.trainer import Trainer
from tests.unit.model_helpers import DirectEngine, draw, repeat_cells, small_model
from tests.unit.space_helpers import D, draw_modalities, place_cells, share_of_other_modality


def make_trainer(model: Objective) -> Trainer:
    setup: Any = SimpleNamespace()
    return Trainer(DirectEngine(model), setup, Ranks(), torch.device("cpu"))


def encode_cells(trainer: Trainer, batch: Batch) -> EncodedCells:
    posterior = trainer.encode_batch(batch)
    return EncodedCells.select_aligned(posterior, batch, trainer.model.n_aligned)


def test_weights_that_give_nan_keep_the_space() -> None:
    model, batch, _ = small_model()
    trainer = make_trainer(model)
    fit_common_space(trainer, repeat_cells(batch, 8), encode_cells(trainer, batch))
    before = model.model.space.rotation.clone()
    assert model.model.space.is_fitted
    with torch.no_grad():
        model.model.heads.bias.fill_(torch.nan)
    fit_common_space(trainer, repeat_cells(batch, 8), None)
    torch.testing.assert_close(model.model.space.rotation, before)


def test_a_modality_that_explains_nothing_counts_for_less_in_the_joint() -> None:
    model, batch, _ = small_model()
    trainer, space = make_trainer(model), model.model.space
    cells = repeat_cells(batch, 8)
    fit_common_space(trainer, cells, None)
    before = space.expert_weight.clone()
    fit_common_space(trainer, cells, None, torch.tensor([-1.0, torch.inf, torch.inf]))
    expected = before * torch.tensor([LEAST_COUNTED, 1.0, 1.0])
    torch.testing.assert_close(space.expert_weight, expected)


def choose(train: Tensor, other: Tensor | None) -> FittedSpace:
    cells, held_out = (
        None
        if mean is None
        else EncodedCells(mean, torch.ones(n), torch.ones(n).bool(), torch.zeros(n[0]).long())
        for mean in (train, other)
        for n in [mean.shape[:2] if mean is not None else (0, 0)]
    )
    assert cells is not None
    chosen = choose_directions(cells, held_out)
    assert chosen is not None
    return chosen


def test_held_out_pairs_smooth_what_training_pairs_learnt_by_heart() -> None:
    """Both modalities know more of a training cell than of any other."""
    train = draw_modalities(400) + 1.5 * draw(400, 1, D, seed=7)
    unseen = draw_modalities(300, seed=60)
    chosen = choose(train, draw_modalities(300, seed=50))
    unsmoothed = find_directions(train, torch.ones(400, 2, dtype=torch.bool), 0.05)
    assert unsmoothed is not None
    scores = []
    for fitted in (chosen, FittedSpace(unsmoothed, 1.0, chosen.pole)):
        space = CommonSpace(2, D)
        space.set_directions(*fitted, torch.ones(2))
        placed = place_cells(space, unseen)
        distance = torch.cdist(placed[:, 0], placed[:, 1])
        nearer = (distance < distance.diagonal()[:, None]).double().mean()
        scores.append((float(nearer), share_of_other_modality(placed[:, 0], placed[:, 1])))
    (chosen_nearer, chosen_mixing), (nearer, mixing) = scores
    assert chosen_nearer < 0.9 * nearer
    assert chosen_mixing > mixing


def test_few_held_out_pairs_choose_nothing() -> None:
    mean = draw_modalities(100)
    fitted = choose(mean, None)
    # The default follows from 100 pairs and 12 dimensions.
    smooth = find_directions(mean, torch.ones(100, 2, dtype=torch.bool), ridge=8 * D / 100)
    assert smooth is not None
    torch.testing.assert_close(fitted.directions.agreement, smooth.agreement)
    assert (fitted.exponent, fitted.pole) == (1.0, DEFAULT_POLE)
    few = choose(mean, draw_modalities(49, seed=50))
    torch.testing.assert_close(few.directions.agreement, smooth.agreement)


@pytest.mark.parametrize("length_tells", [False, True])
def test_held_out_pairs_choose_whether_length_counts(length_tells: bool) -> None:
    """Of half of the cells little is told, or the same with a length that is chance."""

    def draw_views(n_cells: int, seed: int) -> Tensor:
        shared = draw(n_cells, 4, seed=seed)
        # What both tell of a cell is much or little; else each modality has a share of its own.
        amount = torch.rand(n_cells, 2, 1, generator=torch.Generator().manual_seed(seed)) ** 2
        amount = amount[:, :1].expand(-1, 2, -1) if length_tells else amount
        rest = 4 * (1 - amount**2).clamp_min(0).sqrt()  # z has length 1 whatever is told
        told = 4 * amount * F.normalize(shared, dim=-1)[:, None]
        return torch.cat([told, rest, torch.zeros(n_cells, 2, D - 5)], -1) + 0.2 * draw(
            n_cells, 2, D, seed=seed + 1
        )

    fitted = choose(draw_views(1000, 3), draw_views(300, 5))
    assert (fitted.pole >= 1) == length_tells


def test_validation_fits_the_space_and_embeddings_lie_in_it() -> None:
    model, batch, _ = small_model(private=0.5)
    clue = model.model
    trainer = make_trainer(model)
    before, _ = clue.eval().embed_batch(batch)
    held_out = encode_cells(trainer, batch)
    fit_common_space(trainer, None, held_out)
    assert not clue.space.is_fitted
    fit_common_space(trainer, batch, held_out)  # eight paired cells are too few
    assert not clue.space.is_fitted
    explanation = explain_missing_space(clue.modalities, batch)
    assert explanation is not None
    assert "m0 | m1 | m2" in explanation
    torch.testing.assert_close(clue.eval().embed_batch(batch)[0], before)
    many = repeat_cells(batch, 8)
    fit_common_space(trainer, many, held_out)
    assert clue.space.is_fitted
    assert model.training
    assert explain_missing_space(clue.modalities, many) is None
    joint, alone = clue.eval().embed_batch(batch)
    a = clue.n_aligned
    for z in (joint, *alone.values()):
        aligned = z.unflatten(1, (3, -1))[..., :a].flatten(1)
        torch.testing.assert_close(aligned.norm(dim=1), torch.ones(len(z)))
    # A cell of one modality lies in the joint where it lies by that modality, weighed otherwise.
    single = (batch.observed.sum(1) == 1) & batch.observed[:, 0]
    row = int(single.nonzero()[0])
    place = batch.modalities["m0"].rows.tolist().index(row)
    torch.testing.assert_close(joint[row], clue.reweigh_as_joint(alone["m0"])[place])
    assert not torch.allclose(joint[row], alone["m0"][place], atol=1e-3)


def test_a_run_says_why_modalities_are_not_brought_to_one_space() -> None:
    _, batch, _ = small_model()
    assert explain_missing_space(["rna"], None) is None
    explanation = explain_missing_space(["rna", "adt"], None)
    assert explanation is not None
    assert explanation.startswith("modalities are not brought to one space: fewer than 20")
    assert "link any two of the groups rna | adt;" in explanation
    observed = torch.ones(60, 3, dtype=torch.bool)
    observed[FEWEST_PAIRED - 1 :, 2] = False
    few = Batch(observed, torch.zeros(60, dtype=torch.int64), batch.modalities)
    explanation = explain_missing_space(["rna", "adt", "atac"], few)
    assert explanation is not None
    assert "rna, adt | atac" in explanation
