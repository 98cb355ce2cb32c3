"""What latents explain of unseen profiles, and what a modality counts for by it."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from clue_dist.data.batch import Batch
from clue_dist.losses import explained as explained_module
from clue_dist.losses.explained import FEWEST_EXPLAINED, measure_explained
from clue_dist.model.clue import CLUE
from clue_dist.model.likelihoods import LIKELIHOODS, LikelihoodParameters
from clue_dist.model.posterior_encoder import Posterior
from clue_dist.train.space_fit import LEAST_COUNTED, bound_nats
from tests.unit.model_helpers import draw, repeat_cells, small_model


def make_cells(is_explained: bool) -> tuple[CLUE, Batch, Posterior]:
    """Profiles of m0 as its z decodes them, or those of other cells; other modalities are noise."""
    objective, batch, _ = small_model()
    batch, model = repeat_cells(batch, 10), objective.model.eval()
    with torch.no_grad():
        for name in model.modalities:
            model.get_decoder(name).rate.weight.mul_(20)  # so that profiles follow z
        posterior = model.encode_batch(batch)
        posterior = posterior._replace(log_var=torch.full_like(posterior.log_var, -20.0))
        observed, decoder = batch.modalities["m0"], model.get_decoder("m0")
        z, library = posterior.mean[observed.rows, 0, 0], torch.ones(len(observed.rows), 1)
        levels = decoder.find_levels(batch.batch_code[observed.rows])
        rate = decoder.compute_parameters(z, levels, library).rate
    profiles = rate if is_explained else rate.roll(1, 0)
    return (
        model,
        replace(batch, modalities=batch.modalities | {"m0": replace(observed, profiles=profiles)}),
        posterior,
    )


def test_a_latent_explains_the_profiles_that_it_decodes_to_and_not_those_of_others() -> None:
    own, of_others = (float(measure_explained(*make_cells(known))[0]) for known in (True, False))
    assert own > 0 > of_others


def test_a_latent_that_is_not_decoded_explains_nothing() -> None:
    model, batch, posterior = make_cells(True)
    with torch.no_grad():
        model.get_decoder("m0").rate.weight.zero_()
    assert float(measure_explained(model, batch, posterior)[0]) == pytest.approx(0, abs=1e-4)


def test_of_few_cells_nothing_is_said() -> None:
    model, batch, posterior = make_cells(True)
    few = FEWEST_EXPLAINED - 1
    observed = batch.modalities["m0"]
    fewer = replace(observed, rows=observed.rows[:few], profiles=observed.counts[:few])
    batch = replace(batch, modalities=batch.modalities | {"m0": fewer})
    explained = measure_explained(model, batch, posterior)
    assert torch.isinf(explained[0])
    assert explained[1:].isfinite().all()


def test_fewer_features_estimate_all_of_them(monkeypatch: pytest.MonkeyPatch) -> None:
    model, batch, posterior = make_cells(True)
    whole = float(measure_explained(model, batch, posterior)[0])
    n_cells = len(batch.modalities["m0"].rows)
    monkeypatch.setattr(explained_module, "MOST_SCORED_VALUES", 5 * n_cells)  # of six features
    part = float(measure_explained(model, batch, posterior)[0])
    assert part != whole
    assert part == pytest.approx(whole, rel=0.5)


@pytest.mark.parametrize("name", ["nb", "poisson", "normal"])
def test_the_average_of_cells_has_their_mean_profile(name: str) -> None:
    likelihood = LIKELIHOODS[name]
    parameters = LikelihoodParameters(draw(7, 5), draw(5, seed=1), torch.full((7, 1), 100.0))
    mean = likelihood.compute_mean(parameters)
    average = likelihood.compute_mean(likelihood.average_cells(parameters))
    torch.testing.assert_close(average, mean.mean(0, keepdim=True).expand_as(mean))


@pytest.mark.parametrize("name", sorted(LIKELIHOODS))
def test_all_cells_get_the_same_average(name: str) -> None:
    likelihood = LIKELIHOODS[name]
    # Of the last two features all probabilities round to 0 or 1.
    shift = torch.tensor([0.0, 0.0, 0.0, -200.0, 40.0])
    gate = draw(7, 5, seed=2) + shift if likelihood.has_gate else None
    parameters = LikelihoodParameters(draw(7, 5) + shift, draw(5, seed=1), torch.ones(7, 1), gate)
    average = likelihood.average_cells(parameters)
    varied = [values for values in (average.rate, average.gate) if values is not None]
    for values in varied:
        torch.testing.assert_close(values, values[:1].expand(7, 5))
        assert values.isfinite().all()


@pytest.mark.parametrize(
    ("explained", "counted"),
    [
        (50.0, 8.0),  # it explains more than it claims
        (3.0, 3.0),
        (-4.0, LEAST_COUNTED * 8.0),
        (torch.inf, 8.0),  # too few cells
        (torch.nan, 8.0),
    ],
)
def test_a_modality_counts_for_no_more_than_it_explains(explained: float, counted: float) -> None:
    nats: Tensor = bound_nats(torch.tensor([8.0, 2.0]), torch.tensor([explained, torch.inf]))
    assert nats.tolist() == pytest.approx([counted, 2.0])
