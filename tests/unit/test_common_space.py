"""The common space: its directions, and cells of all patterns in it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from clue_dist.checkpoint.run_folder import WEIGHTS, load_weights
from clue_dist.data.batch import Batch
from clue_dist.errors import ResumeError
from clue_dist.model.common_space import (
    FEWEST_PAIRED,
    CommonSpace,
    find_directions,
    group_modalities,
)
from clue_dist.train.space_fit import explain_missing_space
from tests.unit.model_helpers import draw, small_model
from tests.unit.space_helpers import (
    D,
    N,
    draw_modalities,
    fit_space,
    place_cells,
    share_of_other_modality,
)


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
