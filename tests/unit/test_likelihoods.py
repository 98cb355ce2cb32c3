"""Every likelihood equals scipy's, sparse equals dense, and random features are unbiased."""

from types import SimpleNamespace
from typing import get_args

import numpy as np
import pytest
import scipy.sparse as sp
import torch
from scipy import stats
from torch.nn import functional as F

from clue_dist.config import Config, DecoderConfig, LikelihoodName
from clue_dist.data.batch import SparseCounts, compute_library_size
from clue_dist.model import decoders
from clue_dist.model.decoders import Decoder, OutputLayer, SecondParameter, select_features
from clue_dist.model.likelihoods import LIKELIHOODS, LikelihoodParameters
from clue_dist.train.schedule import compute_learning_rate

N, M = 7, 23
COUNTS = ["nb", "zinb", "poisson", "bernoulli"]


def counts(seed: int = 0) -> np.ndarray:
    x = np.random.default_rng(seed).negative_binomial(0.5, 0.2, (N, M)).astype(np.float64)
    x[:, 0] += 1  # no cell is empty
    return x


def sparse(x: np.ndarray) -> SparseCounts:
    m = sp.csr_matrix(x)
    return SparseCounts(
        torch.tensor(m.indptr),
        torch.tensor(m.indices),
        torch.tensor(m.data, dtype=torch.float32),
        M,
    )


def params(name: str, x: np.ndarray) -> LikelihoodParameters:
    rng = np.random.default_rng(1)
    t = lambda *shape: torch.tensor(rng.normal(size=shape), dtype=torch.float32)  # noqa: E731
    return LikelihoodParameters(
        t(N, M) - 2,
        t(M),
        torch.tensor(x.sum(1, keepdims=True), dtype=torch.float32),
        t(N, M) if name == "zinb" else None,
    )


def oracle(name: str, x: np.ndarray, p: LikelihoodParameters) -> np.ndarray:
    """ln p per cell in float64, by scipy.stats, without the terms that hold no parameter."""
    rate, theta, library = (v.double().numpy() for v in p[:3])
    mu, r = library / (1 + np.exp(-rate)), np.exp(theta)
    factorial = stats.poisson.logpmf(x, 1.0) + 1.0  # ln 1 / x!
    if name == "poisson":
        return (stats.poisson.logpmf(x, mu) - factorial).sum(1)
    if name == "bernoulli":
        odds = library * np.exp(rate)
        return stats.bernoulli.logpmf(x > 0, odds / (1 + odds)).sum(1)
    if name == "normal":
        return (stats.norm.logpdf(x, rate, np.exp(theta)) + 0.5 * np.log(2 * np.pi)).sum(1)
    nb = stats.nbinom.logpmf(x, r, r / (r + mu))
    if name == "nb":
        return (nb - factorial).sum(1)
    gate = 1 / (1 + np.exp(-p.gate.double().numpy()))
    return np.where(
        x > 0, np.log1p(-gate) + nb - factorial, np.log(gate + (1 - gate) * np.exp(nb))
    ).sum(1)


def test_the_config_names_the_likelihoods_that_exist() -> None:
    assert set(get_args(LikelihoodName)) == set(LIKELIHOODS)


@pytest.mark.parametrize("name", [*COUNTS, "normal"])
def test_equals_scipy(name: str) -> None:
    x = counts() if name != "normal" else np.random.default_rng(2).normal(size=(N, M))
    p = params(name, np.abs(x))
    log_likelihood = LIKELIHOODS[name].score_profiles(torch.tensor(x, dtype=torch.float32), p)
    np.testing.assert_allclose(log_likelihood.numpy(), oracle(name, x, p), rtol=2e-5)


def test_values_far_from_zero_are_scored_as_in_float64() -> None:
    """Of `normal`, 1,000 deviations from zero."""
    p = params("normal", counts())
    p = p._replace(rate=p.rate.add(1000), theta=0.1 * p.theta)
    values = torch.randn(N, M, generator=torch.Generator().manual_seed(0)) + 1000
    found = LIKELIHOODS["normal"].score_profiles(values, p)
    np.testing.assert_allclose(found, oracle("normal", values.double().numpy(), p), rtol=1e-5)


@pytest.mark.parametrize("name", COUNTS)
def test_sparse_equals_dense_with_its_gradient(name: str) -> None:
    x = counts()
    grads, values = [], []
    for profile in (torch.tensor(x, dtype=torch.float32), sparse(x)):
        p = params(name, x)
        p = p._replace(rate=p.rate.requires_grad_(), theta=p.theta.requires_grad_())
        value = LIKELIHOODS[name].score_profiles(profile, p)
        value.sum().backward()
        values.append(value.detach())
        grads.append((p.rate.grad, p.theta.grad))
    torch.testing.assert_close(*values, rtol=1e-5, atol=1e-4)
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


def test_at_most_probable_counts_the_likelihood_peaks() -> None:
    # A wrong sign shared with the oracle fails here: the data's mean beats a shifted one.
    x = counts()
    library = torch.tensor(x.sum(1, keepdims=True), dtype=torch.float32)
    share = torch.tensor((x.sum(0) + 0.5) / (x.sum() + 0.5 * M), dtype=torch.float32)
    best = torch.logit(share).expand(N, M)
    for name in ("nb", "poisson"):
        p = LikelihoodParameters(best, torch.zeros(M), library)
        near, far = (
            LIKELIHOODS[name].score_profiles(sparse(x), p),
            LIKELIHOODS[name].score_profiles(sparse(x), p._replace(rate=best + 1.5)),
        )
        assert near.sum() > far.sum()


@pytest.mark.slow
@pytest.mark.parametrize("name", LIKELIHOODS)
def test_random_features_estimate_the_whole_sum_without_bias(name: str) -> None:
    torch.manual_seed(0)
    x = counts()
    decoder = Decoder(name, M, 1, 4, DecoderConfig(hidden=8, features_per_step=5))
    z, code = torch.randn(N, 4), torch.zeros(N, dtype=torch.int64)
    profile = sparse(x)
    with torch.no_grad():
        whole = decoder(z, code, profile)
        draws = [
            decoder(z, code, profile, features=torch.randperm(M)[:5].sort().values)
            for _ in range(2000)
        ]
    mean, error = torch.stack(draws).mean(0), torch.stack(draws).std(0) / 2000**0.5
    assert ((mean - whole).abs() < 5 * error + 1e-3).all()


@pytest.mark.slow
def test_a_short_training_finds_the_dispersions() -> None:
    """Moments take two kinds of cells, far apart, for noise: the noise of one kind is far less."""
    rng, n_cells, r = np.random.default_rng(0), 2000, 20.0
    kinds = rng.dirichlet(np.full(M, 0.5), 2) * 0.98 + 0.02 / M
    mean = 1000 * kinds[rng.integers(0, 2, n_cells)]
    x = rng.poisson(rng.gamma(r, mean / r))
    _, start = LIKELIHOODS["nb"].estimate_start(sp.csr_matrix(x))
    assert np.median(np.log(r) - start) > 1
    theta = SecondParameter(M, LIKELIHOODS["nb"].theta_learning_rate)
    theta.weight.data.copy_(torch.tensor(start))
    optimizer = torch.optim.AdamW(theta.parameters(), weight_decay=0.0)
    setup = SimpleNamespace(config=Config(), total_steps=300)
    values, share = torch.tensor(x).float(), torch.tensor(mean / 1000).float()
    for step in range(300):
        optimizer.param_groups[0]["lr"] = compute_learning_rate(setup, step) * theta.lr_scale
        rows = torch.tensor(rng.integers(0, n_cells, 128))
        p = LikelihoodParameters(share[rows].logit(), theta(None), torch.full((128, 1), 1000.0))
        optimizer.zero_grad()
        (-LIKELIHOODS["nb"].score_profiles(values[rows], p).mean()).backward()
        optimizer.step()
    found = theta.weight.detach().numpy()
    assert np.abs(np.median(found) - np.log(r)) < 0.1


@pytest.mark.parametrize("shape", [(N, 4), (2, N, 4)])
def test_cells_without_any_of_the_scored_features_are_scored(shape: tuple[int, ...]) -> None:
    x = counts()
    x[:, :5] = 0
    decoder = Decoder("nb", M, 1, 4, DecoderConfig(hidden=8, features_per_step=5))
    z, code, features = torch.randn(shape), torch.zeros(N, dtype=torch.int64), torch.arange(5)
    scores = decoder(z, code, sparse(x), features=features)
    expected = decoder(z, code, torch.tensor(x, dtype=torch.float32), features=features)
    torch.testing.assert_close(scores, expected)
    scores.sum().backward()
    assert decoder.rate.weight.grad[:5].any()


def test_a_gradient_that_is_kept_gets_rows_as_a_fresh_one_does() -> None:
    layer, h = OutputLayer(4, M), torch.randn(3, 4)
    subsets = [torch.randperm(M)[:5].sort().values for _ in range(3)]
    plain = sum(((h @ layer.weight[rows].T + layer.bias[rows]) ** 2).sum() for rows in subsets)
    expected = torch.autograd.grad(plain, layer.weight)[0]
    for kept in (None, torch.zeros(M, 4)):
        layer.weight.grad = kept
        for rows in subsets:
            (layer(h, rows) ** 2).sum().backward()
        assert kept is None or layer.weight.grad is kept
        torch.testing.assert_close(layer.weight.grad, expected)


@pytest.mark.parametrize("select", ["_copy_selected", "_pick_selected"])
def test_only_takes_the_columns_asked_for(select: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """By the kernel, and as on a GPU."""
    monkeypatch.setattr(decoders, "_copy_selected", getattr(decoders, select))
    x = counts()
    keep = torch.tensor([0, 3, 4, 20])
    selected = select_features(sparse(x), keep)
    dense = torch.sparse_csr_tensor(
        selected.indptr, selected.indices, selected.values, (N, 4)
    ).to_dense()
    np.testing.assert_array_equal(dense.numpy(), x[:, keep.numpy()])
    torch.testing.assert_close(
        compute_library_size(sparse(x)), torch.tensor(x.sum(1), dtype=torch.float32)
    )


def test_batch_covariates_reach_the_decoder_and_an_unknown_batch_is_finite() -> None:
    torch.manual_seed(0)
    decoder = Decoder("nb", M, 3, 4, DecoderConfig(hidden=8))
    z = torch.randn(1, 4).expand(N, 4)
    same = torch.tensor(counts()[:1].repeat(N, 0), dtype=torch.float32)
    out = decoder(z, torch.tensor([0, 1, 2, -1, 0, 0, 0]), same)
    assert out.isfinite().all()
    assert out[0] == out[4]
    assert len({round(float(v), 4) for v in out[:4]}) == 4


@pytest.mark.parametrize("name", ["nb", "zinb"])
@pytest.mark.parametrize("theta", [8.0, 20.0, 90.0])
def test_without_overdispersion_it_is_a_poisson_and_its_dispersion_rests(
    name: str, theta: float
) -> None:
    # What is left to learn of so large an r is less than the rounding of float32.
    x = torch.tensor(counts(), dtype=torch.float32)
    gate = torch.full((N, M), -30.0) if name == "zinb" else None
    log_r = torch.full((M,), theta, requires_grad=True)
    rate, library = torch.full((N, M), -3.0), torch.full((N, 1), 20.0)
    log_likelihood = LIKELIHOODS[name].score_profiles(
        x, LikelihoodParameters(rate, log_r, library, gate)
    )
    want = LIKELIHOODS["poisson"].score_profiles(x, LikelihoodParameters(rate, log_r, library))
    torch.testing.assert_close(log_likelihood, want, rtol=0.01, atol=0.3)
    log_likelihood.sum().backward()
    assert (log_r.grad == 0).all()


def test_softplus_form_stays_finite_for_extreme_rates() -> None:
    p = LikelihoodParameters(
        torch.tensor([[-200.0, 200.0]]), torch.tensor([-10.0, 10.0]), torch.tensor([[1e6]])
    )
    for name in ("nb", "poisson", "bernoulli"):
        assert LIKELIHOODS[name].score_profiles(torch.tensor([[0.0, 5.0]]), p).isfinite().all()
    assert F.logsigmoid(torch.tensor(-200.0)).isfinite()
