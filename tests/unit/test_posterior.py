"""Combining experts equals a slow float64 transcription of eq. 6, cell by cell."""

import numpy as np
import pytest
import torch

from clue_dist.model.posterior import (
    GeneralisedProduct,
    compute_kl_to_prior,
    mean_of_experts,
    product_of_experts,
)
from tests.unit.model_helpers import OBSERVED, B, D, K, draw, kl64


def test_kl_equals_torch_distributions() -> None:
    mean, log_var = draw(5, D), draw(5, D, seed=1)
    q = torch.distributions.Normal(mean, torch.exp(0.5 * log_var))
    want = torch.distributions.kl_divergence(q, torch.distributions.Normal(0.0, 1.0)).sum(-1)
    torch.testing.assert_close(compute_kl_to_prior(mean, log_var), want)


def test_product_of_experts_is_eq_6() -> None:
    mean, log_var = draw(B, K, K, D), 3 * draw(B, K, K, D, seed=1)
    got_mean, got_log_var = product_of_experts(mean, log_var, OBSERVED)
    for c in range(B):
        for j in range(K):
            precision = sum(
                np.exp(-log_var[c, k, j].double().numpy()) for k in range(K) if OBSERVED[c, k]
            )
            weighted = sum(
                np.exp(-log_var[c, k, j].double().numpy()) * mean[c, k, j].double().numpy()
                for k in range(K)
                if OBSERVED[c, k]
            )
            np.testing.assert_allclose(got_log_var[c, j], -np.log(precision), rtol=1e-4, atol=1e-5)
            np.testing.assert_allclose(got_mean[c, j], weighted / precision, rtol=1e-4, atol=1e-5)


def test_the_generalised_product_weighs_experts_by_the_cube_of_their_nats() -> None:
    combine = GeneralisedProduct(K).eval()
    combine.nats.copy_(torch.tensor([6.0, 3.0, 1.0]))
    mean, log_var = draw(B, K, K, D), 3 * draw(B, K, K, D, seed=1)
    got_mean, got_log_var = combine(mean, log_var, OBSERVED)
    for c in range(B):
        seen = [k for k in range(K) if OBSERVED[c, k]]
        share = {
            k: combine.nats[k].item() ** 3 / sum(combine.nats[s].item() ** 3 for s in seen)
            for k in seen
        }
        for j in range(K):
            precisions = {k: share[k] * np.exp(-log_var[c, k, j].double().numpy()) for k in seen}
            precision = sum(precisions.values())
            weighted = sum(precisions[k] * mean[c, k, j].double().numpy() for k in seen)
            np.testing.assert_allclose(got_log_var[c, j], -np.log(precision), rtol=1e-4, atol=1e-5)
            np.testing.assert_allclose(got_mean[c, j], weighted / precision, rtol=1e-4, atol=1e-5)


def test_the_generalised_product_learns_nats_in_training_alone() -> None:
    combine = GeneralisedProduct(K)
    mean, log_var, observed = draw(B, K, K, D), draw(B, K, K, D, seed=1), OBSERVED.clone()
    observed[:, 2] = False  # the third modality tells nothing of itself in this batch
    observed[:, 0] = True
    combine.eval()(mean, log_var, observed)
    assert combine.nats.tolist() == [1, 1, 1]
    for _ in range(1000):
        combine.train()(mean, log_var, observed)
    for k in range(2):
        rows = [c for c in range(B) if observed[c, k]]
        want = np.mean(
            [kl64(mean[c, k, k].double().numpy(), log_var[c, k, k].double().numpy()) for c in rows]
        )
        assert combine.nats[k].item() == pytest.approx(want, rel=1e-4)
    assert combine.nats[2].item() == 1


def test_mean_of_experts_has_the_moments_of_the_averaged_samples() -> None:
    mean, log_var = draw(1, K, K, D), draw(1, K, K, D, seed=1)
    observed = torch.tensor([[True, False, True]])
    got_mean, got_log_var = mean_of_experts(mean, log_var, observed)
    samples = mean + torch.exp(0.5 * log_var) * draw(200_000, K, K, D, seed=2)
    averaged = (samples[:, 0] + samples[:, 2]) / 2
    torch.testing.assert_close(got_mean[0], averaged.mean(0), atol=0.02, rtol=0)
    torch.testing.assert_close(got_log_var[0].exp(), averaged.var(0), atol=0.02, rtol=0.02)
