"""The common space: its directions, cells of all patterns in it, and what held-out pairs choose."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor
from torch.nn import functional as F

from clue_dist.checkpoint.run_folder import WEIGHTS, load_weights
from clue_dist.data.batch import Batch
from clue_dist.errors import ResumeError
from clue_dist.losses.objective import EncodedCells, Objective
from clue_dist.model.common_space import (
    FEWEST_PAIRED,
    CommonSpace,
    find_directions,
    group_modalities,
)
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

N, D = 2000, 12


def make_trainer(model: Objective) -> Trainer:
    setup: Any = SimpleNamespace()
    return Trainer(DirectEngine(model), setup, Ranks(), torch.device("cpu"))


def encode_cells(trainer: Trainer, batch: Batch) -> EncodedCells:
    posterior = trainer.encode_batch(batch)
    return EncodedCells.select_aligned(posterior, batch, trainer.model.n_aligned)


def draw_modalities(n_cells: int = N, k: int = 2, noise: float = 0.3, seed: int = 0) -> Tensor:
    """(n_cells, k, D): four factors that all modalities tell, and two that each has of its own.

    What is its own is by far the larger part, so that raw neighbours come from one modality.
    """
    shared = draw(n_cells, 4, seed=seed)
    views = []
    for modality in range(k):
        rotation = torch.linalg.qr(draw(D, D, seed=100 + modality))[0]
        own = 6 * draw(n_cells, 2, seed=seed + 10 + modality)
        told = shared + noise * draw(n_cells, 4, seed=seed + 20 + modality)
        views.append(torch.cat([told, own, torch.zeros(n_cells, D - 6)], 1) @ rotation)
    return torch.stack(views, 1)


def fit_space(
    mean: Tensor, observed: Tensor, exponent: float = 2.0, ridge: float = 0.05, pole: float = 0.0
) -> CommonSpace:
    directions = find_directions(mean, observed, ridge)
    assert directions is not None
    space = CommonSpace(mean.shape[1], mean.shape[2])
    space.set_directions(directions, exponent, pole, torch.ones(mean.shape[1]))
    return space


def place_cells(space: CommonSpace, mean: Tensor) -> Tensor:
    """(B, K, R), of length 1."""
    coordinates, _ = space.project_experts(mean, torch.zeros_like(mean))
    return space.weigh_profiles(coordinates)


def share_of_other_modality(first: Tensor, second: Tensor, neighbours: int = 30) -> float:
    pool = torch.cat([first, second])
    modality = torch.arange(len(pool)) // len(first)
    distance = torch.cdist(pool, pool).fill_diagonal_(torch.inf)
    near = distance.topk(neighbours, largest=False).indices
    return float((modality[near] != modality[:, None]).double().mean())


def test_two_modalities_meet_in_canonical_correlations() -> None:
    mean, observed = draw_modalities(), torch.ones(N, 2, dtype=torch.bool)
    directions = find_directions(mean, observed, ridge=0.05)
    assert directions is not None
    z = mean.double().numpy()
    z /= np.linalg.norm(z, axis=-1, keepdims=True)
    roots = []
    for view in (z[:, 0], z[:, 1]):
        values, vectors = np.linalg.eigh(np.cov(view.T, bias=True))
        roots.append(vectors / np.sqrt(values + 0.05 * values.mean()) @ vectors.T)
    crossed = np.cov(z[:, 0].T, z[:, 1].T, bias=True)[:D, D:]
    expected = np.linalg.svd(roots[0] @ crossed @ roots[1], compute_uv=False)
    np.testing.assert_allclose(directions.agreement, expected, atol=1e-6)


@pytest.mark.parametrize("k", [2, 3])
def test_cells_that_lie_apart_by_modality_mix_in_the_space(k: int) -> None:
    mean = draw_modalities(600, k)
    space = fit_space(mean, torch.ones(600, k, dtype=torch.bool))
    unseen = draw_modalities(300, k, seed=50)
    placed = place_cells(space, unseen)
    for other in range(1, k):
        assert share_of_other_modality(unseen[:, 0], unseen[:, other]) < 0.2
        assert share_of_other_modality(placed[:, 0], placed[:, other]) > 0.42


def test_partners_find_each_other_in_the_space() -> None:
    mean = draw_modalities(600)
    space = fit_space(mean, torch.ones(600, 2, dtype=torch.bool))
    placed = place_cells(space, draw_modalities(300, seed=50))
    distance = torch.cdist(placed[:, 0], placed[:, 1])
    nearer = (distance < distance.diagonal()[:, None]).double().mean()
    assert nearer < 0.05


def test_modalities_that_no_cell_has_together_meet_by_way_of_a_third() -> None:
    mean, observed = draw_modalities(800, 3), torch.ones(800, 3, dtype=torch.bool)
    observed[:400, 1] = False
    observed[400:, 2] = False
    placed = place_cells(fit_space(mean, observed), draw_modalities(300, 3, seed=50))
    distance = torch.cdist(placed[:, 1], placed[:, 2])
    assert (distance < distance.diagonal()[:, None]).double().mean() < 0.08
    assert share_of_other_modality(placed[:, 1], placed[:, 2]) > 0.4


@pytest.mark.parametrize("n_cells", [1, 3, 30])
def test_few_cells_of_a_rare_pair_of_modalities_pull_nothing_towards_them(n_cells: int) -> None:
    """Agreement of few cells is chance, and would be the largest of all."""
    mean, observed = draw_modalities(800, 3), torch.ones(800, 3, dtype=torch.bool)
    observed[:400, 1] = False
    observed[400:, 2] = False
    observed[400 : 400 + n_cells, 2] = True
    observed[400 : 400 + n_cells, 0] = False
    directions = find_directions(mean, observed, 0.05)
    assert directions is not None
    assert directions.agreement.max() < 1
    placed = place_cells(fit_space(mean, observed), draw_modalities(300, 3, seed=50))
    distance = torch.cdist(placed[:, 0], placed[:, 1])
    assert (distance < distance.diagonal()[:, None]).double().mean() < 0.08


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


def test_a_joint_of_one_modality_is_that_modality() -> None:
    mean = draw_modalities(100)
    space = fit_space(mean, torch.ones(100, 2, dtype=torch.bool))
    coordinates, _ = space.project_experts(mean, draw(100, 2, D))
    observed = torch.tensor([[True, False]]).expand(100, 2)
    torch.testing.assert_close(space.join_experts(coordinates, observed), coordinates[:, 0])


def test_the_modality_that_tells_more_has_more_say() -> None:
    space = fit_space(draw_modalities(100), torch.ones(100, 2, dtype=torch.bool))
    space.expert_weight.copy_(torch.tensor([3.0, 1.0]))
    coordinates = draw(3, 2, D)
    observed = torch.tensor([[True, True], [True, False], [False, True]])
    joint = space.join_experts(coordinates, observed)
    expected = [coordinates[0].T @ torch.tensor([0.75, 0.25]), coordinates[1, 0], coordinates[2, 1]]
    torch.testing.assert_close(joint, torch.stack(expected))


@pytest.mark.parametrize("exponent", [0.5, 1.5])
def test_a_direction_counts_in_the_joint_by_the_root(exponent: float) -> None:
    mean, observed = draw_modalities(), torch.ones(N, 2, dtype=torch.bool)
    directions = find_directions(mean, observed, 0.05)
    assert directions is not None
    space = fit_space(mean, observed, exponent)
    agreement = directions.agreement[:-1].float()
    torch.testing.assert_close(space.weight[:-1], agreement**exponent)
    torch.testing.assert_close(space.joint_weight[:-1], agreement ** (exponent / 2))
    # The constant is as long as the other coordinates of a cell are on average.
    coordinates, _ = space.project_experts(mean, torch.zeros_like(mean))
    length = (coordinates[..., :-1] * space.joint_weight[:-1]).square().sum(-1).mean().sqrt()
    torch.testing.assert_close(space.joint_weight[-1], length, rtol=1e-3, atol=0)


@pytest.mark.parametrize("pole", [0.1, 2.0])
def test_profiles_are_weighed_anew_as_a_joint_of_their_own(pole: float) -> None:
    space = fit_space(draw_modalities(), torch.ones(N, 2, dtype=torch.bool), pole=pole)
    coordinates = draw(50, D, seed=1)
    found = space.reweigh_as_joint(space.weigh_profiles(coordinates))
    torch.testing.assert_close(found, space.weigh_joint(coordinates))
    assert (found - space.weigh_profiles(coordinates)).abs().max() > 0.1


def test_too_few_pairs_fit_nothing() -> None:
    observed = torch.ones(200, 2, dtype=torch.bool)
    observed[FEWEST_PAIRED - 1 :, 1] = False
    assert find_directions(draw_modalities(200), observed, 0.05) is None
    observed[FEWEST_PAIRED - 1, 1] = True
    assert find_directions(draw_modalities(200), observed, 0.05) is not None


def test_cells_of_an_unknown_batch_are_no_batch() -> None:
    mean, observed = draw_modalities(200), torch.ones(200, 2, dtype=torch.bool)
    mean[:50] += 2.0  # these lie apart
    code = torch.zeros(200, dtype=torch.int64)
    code[:50] = -1
    found, expected = (find_directions(mean, observed, 0.05, c) for c in (code, None))
    assert found is not None
    assert expected is not None
    assert torch.equal(found.rotation, expected.rotation)
    several = find_directions(mean, observed, 0.05, code + 1)
    assert several is not None
    assert not torch.equal(several.rotation, expected.rotation)


def test_groups_of_modalities_that_no_cell_links_are_not_one_space() -> None:
    observed = torch.zeros(200, 4, dtype=torch.bool)
    observed[:100, [0, 2]] = observed[100:, [1, 3]] = True
    mean = torch.cat([draw_modalities(200)] * 2, 1)
    assert find_directions(mean, observed, 0.05) is None
    assert group_modalities(observed) == [[0, 2], [1, 3]]
    batch = Batch(observed, torch.zeros(200, dtype=torch.int64), {})
    explanation = explain_missing_space(["rna", "atac", "adt", "meth"], batch)
    assert explanation is not None
    assert "link any two of the groups rna, adt | atac, meth;" in explanation
    observed[:FEWEST_PAIRED, 1] = True  # they link the first group to the second
    assert find_directions(mean, observed, 0.05) is not None
    assert group_modalities(observed) == [[0, 1, 2, 3]]


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


@pytest.mark.parametrize("known", [True, False])
def test_batches_mix_unless_they_are_not_known(known: bool) -> None:
    """Both modalities tell the batch, in a direction of its own."""
    batch = torch.arange(N) % 2
    shift = torch.zeros(N, 2, D)
    for modality in range(2):
        rotation = torch.linalg.qr(draw(D, D, seed=100 + modality))[0]
        shift[:, modality] = torch.where(batch[:, None] == 1, 6.0, -6.0) * rotation[8]
    mean, observed = draw_modalities() + shift, torch.ones(N, 2, dtype=torch.bool)
    directions = find_directions(mean, observed, 0.05, batch if known else None)
    assert directions is not None
    space = CommonSpace(2, D)
    space.set_directions(directions, 1.5, 0.0, torch.ones(2))
    z = place_cells(space, mean)
    mixing = share_of_other_modality(z[batch == 0, 0], z[batch == 1, 0])
    assert mixing > 0.4 if known else mixing < 0.1
    # Partners still find each other.
    assert share_of_other_modality(z[:, 0], z[:, 1]) > 0.4


def test_batches_of_few_cells_do_not_take_all_that_cells_tell() -> None:
    mean, observed = draw_modalities(), torch.ones(N, 2, dtype=torch.bool)
    alone = find_directions(mean, observed, 0.05, torch.arange(N))
    together = find_directions(mean, observed, 0.05)
    one = find_directions(mean, observed, 0.05, torch.full((N,), -1))
    assert alone is not None
    assert together is not None
    assert one is not None
    torch.testing.assert_close(one.rotation, together.rotation)
    assert alone.agreement[:4].min() > 0.5 * together.agreement[:4].min()


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


def test_with_the_constant_cells_of_which_little_is_told_lie_together() -> None:
    mean, observed = draw_modalities(), torch.ones(N, 2, dtype=torch.bool)
    coordinates = draw(200, D, seed=1)
    coordinates[:100] *= 1e-3
    spread = []
    for pole in (0.0, 1.0):
        space = fit_space(mean, observed, pole=pole)
        z = space.weigh_profiles(coordinates)
        torch.testing.assert_close(z.norm(dim=1), torch.ones(200))
        spread.append([float(torch.pdist(part).mean()) for part in (z[:100], z[100:])])
    (little_without, _), (little, much) = spread
    assert little_without > 0.5
    assert little < 0.01 < 0.3 < much


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


def test_weights_of_earlier_versions_have_no_space(tmp_path: Path) -> None:
    model, *_ = small_model()
    weights = {name: values.clone() for name, values in model.model.state_dict().items()}
    earlier = {name: values for name, values in weights.items() if not name.startswith("space.")}
    save_file(earlier, tmp_path / WEIGHTS)
    load_weights(model.model, tmp_path, "fix")
    assert not model.model.space.is_fitted
    del weights["space.rotation"]
    save_file(weights, tmp_path / WEIGHTS)
    with pytest.raises(ResumeError, match=r"space\.rotation"):
        load_weights(model.model, tmp_path, "fix")


def test_weights_of_experts_are_found_under_their_former_name() -> None:
    space = fit_space(draw_modalities(), torch.ones(N, 2, dtype=torch.bool))
    state = space.state_dict()
    state["root_nats"] = 3 * state.pop("expert_weight")
    state["weight"] = torch.ones(D)
    other = CommonSpace(2, D)
    other.load_state_dict(state)
    torch.testing.assert_close(other.expert_weight, torch.full((2,), 3.0))
    # The earlier version had no constant, whose place the last direction's weight had.
    torch.testing.assert_close(other.weight, torch.ones(D).index_fill(0, torch.tensor([D - 1]), 0))


def test_weights_of_the_joint_were_once_those_of_profiles() -> None:
    space = fit_space(draw_modalities(), torch.ones(N, 2, dtype=torch.bool))
    state = space.state_dict()
    del state["joint_weight"]
    state["covariance"] = torch.ones(2, 2, D)
    other = CommonSpace(2, D)
    other.load_state_dict(state)
    assert torch.equal(other.joint_weight, space.weight)
    profiles = space.weigh_profiles(draw(50, D))
    torch.testing.assert_close(other.reweigh_as_joint(profiles), profiles)


def test_the_variance_of_the_joint_is_that_of_modalities_that_err_together() -> None:
    """Against draws: a weighted mean, weighed by direction, of length 1."""
    torch.manual_seed(0)
    space = CommonSpace(2, 6)
    space.joint_weight.copy_(torch.tensor([0.9, 0.7, 0.5, 0.3, 0.2, 0.4]))
    space.expert_weight.copy_(torch.tensor([3.0, 1.0]))
    coordinates = torch.randn(3, 2, 6)
    variance = 1e-4 * (0.5 + torch.rand(3, 2, 6))
    observed = torch.tensor([[True, True], [True, False], [False, True]])
    found = space.estimate_variance(coordinates, variance, observed)
    errors = torch.randn(20_000, 3, 1, 6) * variance.sqrt()
    draws = [space.weigh_joint(space.join_experts(coordinates + e, observed)) for e in errors]
    torch.testing.assert_close(found, torch.stack(draws).var(0), rtol=0.05, atol=1e-9)
