"""Means, draws and expected logarithms of every likelihood are those of scipy's distributions."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy import stats

from clue_dist.model.likelihoods import LIKELIHOODS, LikelihoodParameters, compute_log1p_mean

COUNTS = ["nb", "zinb", "poisson", "bernoulli"]
DRAWS = 20_000


def make_parameters(name: str) -> LikelihoodParameters:
    """Four features of two cells, means from 0.02 to 30."""
    rate = torch.tensor([[-8.0, -5.0, -3.0, -1.0], [-7.0, -4.0, -2.0, -1.5]])
    if name == "bernoulli":  # odds are the library's times these
        rate = rate - 1
    gate = torch.full((2, 4), -0.5) if name == "zinb" else None
    theta = torch.tensor([-1.0, 0.0, 1.0, 9.0])
    return LikelihoodParameters(rate, theta, torch.tensor([[60.0], [120.0]]), gate)


def freeze_distribution(name: str, parameters: LikelihoodParameters):
    rate, theta, library = (values.double().numpy() for values in parameters[:3])
    mean, r = library / (1 + np.exp(-rate)), np.exp(np.minimum(theta, 7.0))
    if name == "normal":
        return stats.norm(rate, np.exp(theta))
    if name == "bernoulli":
        return stats.bernoulli(1 / (1 + np.exp(-rate - np.log(library))))
    return stats.poisson(mean) if name == "poisson" else stats.nbinom(r, r / (r + mean))


@pytest.mark.parametrize("name", LIKELIHOODS)
def test_mean_and_draws_follow_the_distribution(name):
    parameters, likelihood = make_parameters(name), LIKELIHOODS[name]
    expected = freeze_distribution(name, parameters)
    kept = 1 / (1 + np.exp(-0.5)) if name == "zinb" else 1.0
    mean = kept * expected.mean()
    variance = kept * (expected.var() + expected.mean() ** 2) - mean**2
    np.testing.assert_allclose(likelihood.compute_mean(parameters), mean, rtol=1e-5)
    generator = torch.Generator().manual_seed(0)
    rate, theta, library, gate = parameters
    many = LikelihoodParameters(
        rate.repeat(DRAWS, 1),
        theta,
        library.repeat(DRAWS, 1),
        None if gate is None else gate.repeat(DRAWS, 1),
    )
    draws = likelihood.draw_values(many, generator).view(DRAWS, 2, 4)
    error = np.abs(draws.double().mean(0).numpy() - mean) / np.sqrt(variance / DRAWS)
    assert error.max() < 4.5
    np.testing.assert_allclose(draws.double().var(0), variance, rtol=0.25)


@pytest.mark.parametrize("name", COUNTS)
@pytest.mark.parametrize("scale", [3.0, 200.0])
def test_expected_logarithm_is_the_sum_over_counts(name, scale):
    parameters = make_parameters(name)
    counts = np.arange(2000)[:, None, None]
    p = freeze_distribution(name, parameters).pmf(counts)
    kept = 1 / (1 + np.exp(-0.5)) if name == "zinb" else 1.0
    expected = kept * (p * np.log1p(scale * counts)).sum(0)
    found = compute_log1p_mean(LIKELIHOODS[name], parameters, torch.full((2, 1), scale))
    np.testing.assert_allclose(found, expected, rtol=1e-3, atol=1e-4)


def test_real_values_have_no_expected_logarithm():
    with pytest.raises(NotImplementedError, match="no distribution of counts"):
        compute_log1p_mean(LIKELIHOODS["normal"], make_parameters("normal"), torch.ones(2, 1))
