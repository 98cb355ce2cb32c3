"""Normalisation, sparse projection and the SVD start equal plain NumPy."""

from pathlib import Path

import numpy as np
import pytest
import scipy.sparse as sp
import torch

from clue_dist import config as configs
from clue_dist import normalise as in_numpy
from clue_dist.config import DecoderConfig
from clue_dist.data.assembly import read_batch
from clue_dist.data.batch import SparseCounts
from clue_dist.model import trunk as trunks
from clue_dist.model.clue import CLUE
from clue_dist.model.decoders import Decoder
from clue_dist.model.initialise import (
    _set_decoder_start,
    compute_leading_svd,
    initialise_model,
    sample_cells,
)
from clue_dist.model.layers import Affine, Ensemble
from clue_dist.model.modality_spec import specify_modalities
from clue_dist.model.moments import INVERSE_DISPERSION_LIMITS
from clue_dist.model.trunk import Projection, compute_size_inputs, normalise_counts
from tests.stores import make_store

X = np.random.default_rng(0).poisson(0.7, (9, 15)).astype(np.float32) + np.eye(
    9, 15, dtype=np.float32
)


def sparse(x: np.ndarray) -> SparseCounts:
    m = sp.csr_matrix(x)
    return SparseCounts(
        torch.tensor(m.indptr), torch.tensor(m.indices), torch.tensor(m.data), x.shape[1]
    )


def plain(x: np.ndarray, how: str, idf: np.ndarray) -> np.ndarray:
    if how == "clr":
        return np.log1p(x) - np.log1p(x).mean(1, keepdims=True)
    if how == "log":
        return np.log1p(x)
    if how == "none":
        return x
    t = x * idf if how == "tfidf" else x
    return np.log1p(1e4 * t / t.sum(1, keepdims=True))


@pytest.mark.parametrize("how", ["log_cp10k", "tfidf", "none", "log", "clr"])
@pytest.mark.parametrize("multiply", ["_multiply_rows_on_cpu", "_multiply_rows"])
def test_normalise(monkeypatch: pytest.MonkeyPatch, multiply: str, how: str) -> None:
    monkeypatch.setattr(trunks, "_multiply_rows_on_cpu", getattr(trunks, multiply))
    idf = np.random.default_rng(1).uniform(1, 9, 15).astype(np.float32)
    want = plain(X, how, idf)
    dense = normalise_counts(torch.tensor(X), how, torch.tensor(idf))
    np.testing.assert_allclose(dense, want, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(in_numpy.normalise_rows(X, how, idf), want, rtol=1e-5, atol=1e-6)
    if how != "clr":  # would not stay sparse
        normalised = normalise_counts(sparse(X), how, torch.tensor(idf))
        assert isinstance(normalised, SparseCounts)
        np.testing.assert_allclose(
            sp.csr_matrix(
                (normalised.values, normalised.indices, normalised.indptr), X.shape
            ).toarray(),
            want,
            rtol=1e-5,
        )
        np.testing.assert_allclose(
            in_numpy.normalise_rows(sp.csr_matrix(X), how, idf).toarray(), want, rtol=1e-5
        )


def test_projection_of_sparse_equals_dense_with_its_gradient() -> None:
    torch.manual_seed(0)
    projection = Projection(15, 4, lr_scale=1.0)
    grads, values = [], []
    for x in (torch.tensor(X), sparse(X)):
        projection.zero_grad()
        out = projection(x)
        (out**2).sum().backward()
        values.append(out.detach())
        grads.append(projection.weight.grad.clone())
    torch.testing.assert_close(*values)
    torch.testing.assert_close(*grads)


@pytest.mark.parametrize("features", [40, 700])
def test_leading_svd_is_exact_where_noise_is_nearly_as_strong(features: int) -> None:
    rng = np.random.default_rng(0)
    x = rng.normal(size=(500, 5)) @ rng.normal(size=(5, features)) * 0.1 + rng.normal(
        size=(500, features)
    )
    mean, scale = x.mean(0), x.std(0)
    _, want, v = np.linalg.svd((x - mean) / scale, full_matrices=False)
    for given in (x, sp.csr_matrix(x)):
        right, singular = compute_leading_svd(given, mean, scale, 20, seed=0)
        np.testing.assert_allclose(singular, want[:20], rtol=1e-6)
        np.testing.assert_allclose(np.abs(np.sum(right * v[:20].T, 0)), 1, atol=1e-6)


def test_initialised_projection_is_pca_of_the_training_cells(tmp_path: Path) -> None:
    store = make_store(
        tmp_path / "s.zarr", cells={"rna+adt": 120, "rna": 60}, features={"rna": 30, "adt": 8}
    )
    config = configs.Config(model={"trunk": {"projection": 6}})
    model = CLUE(specify_modalities(store.manifest.modalities, config), 2, config.model)
    n_train = {"rna+adt": 100, "rna": 60}
    initialise_model(model, store, n_train, svd=True, seed=0)
    counts, _ = sample_cells(store, n_train, "rna")
    assert counts.shape == (160, 30)  # held-out cells have no part in it
    x = plain(counts.toarray(), "log_cp10k", np.ones(30))
    standard = (x - x.mean(0)) / x.std(0) ** 0.75
    left, singular, _ = np.linalg.svd(standard, full_matrices=False)
    batch = read_batch(store, "rna", np.arange(60))
    trunk = model.get_trunk("rna")
    reduced = (
        trunk.projection(
            normalise_counts(batch.modalities["rna"].counts, trunk.normalisation, trunk.idf)
        )
        .detach()
        .numpy()
    )
    want = (left * singular)[100:, :6]
    want = want * (160 * 6 / (singular[:6] ** 2).sum()) ** 0.5  # of mean square one
    # Three cell types make two clear components; the others are noise of near-equal strength.
    clear = slice(0, 2)
    np.testing.assert_allclose(
        np.abs(reduced[:, clear]), np.abs(want[:, clear]), rtol=0.01, atol=0.01
    )


def test_more_components_than_cells_is_fine(tmp_path: Path) -> None:
    store = make_store(tmp_path / "s.zarr", cells={"rna+adt": 20}, features={"rna": 200, "adt": 8})
    config = configs.Config()
    model = CLUE(specify_modalities(store.manifest.modalities, config), 2, config.model)
    initialise_model(model, store, {"rna+adt": 20}, svd=True, seed=0)
    joint, alone = model.embed_batch(read_batch(store, "rna+adt", np.arange(20)))
    assert joint.isfinite().all()
    assert set(alone) == {"rna", "adt"}


def test_size_is_total_and_detected_features_sparse_or_dense() -> None:
    want = np.log(np.stack([X.sum(1), (X > 0).sum(1)], 1))
    for x in (torch.tensor(X), sparse(X)):
        np.testing.assert_allclose(compute_size_inputs(x), want, rtol=1e-6)


def test_a_constant_feature_does_not_outweigh_all_others() -> None:
    decoder = Decoder("normal", 4, 1, 3, DecoderConfig(hidden=4))
    values = np.random.default_rng(0).normal(size=(50, 4))
    values[:, 2] = 7
    with torch.no_grad():
        _set_decoder_start(decoder, values)
    floor = 0.01 * np.median(values[:, [0, 1, 3]].std(0))
    assert decoder.theta.weight[2].item() == pytest.approx(np.log(floor), abs=1e-4)
    values[:] = 7
    with torch.no_grad():
        _set_decoder_start(decoder, values)
    torch.testing.assert_close(decoder.theta.weight.detach(), torch.zeros(4))


@pytest.mark.parametrize("likelihood", ["nb", "zinb"])
@pytest.mark.parametrize("dense", [True, False])
def test_inverse_dispersions_start_at_what_the_moments_say(dense: bool, likelihood: str) -> None:
    rng = np.random.default_rng(0)
    # Many features, as those that make up a cell's total depend on each other.
    r = np.concatenate([[0.5, 2.0, 8.0, 1e9], np.full(300, 5.0)])
    mean = np.concatenate([[2.0, 4.0, 4.0, 2.0], np.full(300, 2.0)])
    size = rng.lognormal(0, 0.5, (20_000, 1))
    counts = rng.poisson(rng.gamma(r, size * mean / r)).astype(np.float32)
    counts[:, -1] = 0
    decoder = Decoder(likelihood, len(r), 1, 3, DecoderConfig(hidden=4))
    with torch.no_grad():
        _set_decoder_start(decoder, counts if dense else sp.csr_matrix(counts))
    dispersion = decoder.theta.weight.detach().exp().numpy()
    np.testing.assert_allclose(dispersion[:3], r[:3], rtol=0.1)
    assert dispersion[3] > 50
    assert np.isfinite(dispersion).all()


@pytest.mark.parametrize("x", [np.zeros((5, 4)), np.diag([9.0, 9, 9, 9]).repeat(20, 0)])
def test_inverse_dispersions_stay_within_limits(x: np.ndarray) -> None:
    # No counts at all, and features of which each holds all of a cell's counts, or none.
    decoder = Decoder("nb", 4, 1, 3, DecoderConfig(hidden=4))
    with torch.no_grad():
        _set_decoder_start(decoder, x)
    low, high = np.log(INVERSE_DISPERSION_LIMITS)
    assert ((decoder.theta.weight >= low - 1e-6) & (decoder.theta.weight <= high + 1e-6)).all()
    assert (decoder.theta.weight < 0).all()


def test_squares_of_large_integer_counts_do_not_overflow() -> None:
    counts = np.random.default_rng(0).gamma(2.0, 35_000, (200, 4)).round()
    starts = []
    for x in (sp.csr_matrix(counts.astype(np.int32)), counts.astype(np.float64)):
        decoder = Decoder("nb", 4, 1, 3, DecoderConfig(hidden=4))
        with torch.no_grad():
            _set_decoder_start(decoder, x)
        starts.append(decoder.theta.weight.detach())
    torch.testing.assert_close(*starts)
    assert (starts[0].abs() < 2.5).all()  # overdispersed, and not at a limit


def test_initialised_size_is_standardised_over_the_training_cells(tmp_path: Path) -> None:
    store = make_store(tmp_path / "s.zarr", cells={"rna+adt": 120}, features={"rna": 30, "adt": 8})
    config = configs.Config(model={"trunk": {"projection": 6}})
    model = CLUE(specify_modalities(store.manifest.modalities, config), 2, config.model)
    initialise_model(model, store, {"rna+adt": 120}, svd=True, seed=0)
    batch = read_batch(store, "rna+adt", np.arange(120))
    size = model.get_trunk("rna").compute_components(batch.modalities["rna"].counts)[:, -2:]
    np.testing.assert_allclose(size.mean(0), 0, atol=1e-5)
    np.testing.assert_allclose(size.std(0, correction=0), 1, atol=1e-4)
    without = configs.Config(model={"trunk": {"projection": 6, "size_input": False}})
    plain = CLUE(specify_modalities(store.manifest.modalities, without), 2, without.model)
    assert plain.get_trunk("rna").compute_components(batch.modalities["rna"].counts).shape == (
        120,
        6,
    )
    initialise_model(plain, store, {"rna+adt": 120}, svd=True, seed=0)
    torch.testing.assert_close(plain.get_trunk("rna").size, model.get_trunk("rna").size)
    detected = batch.modalities["rna"].counts.count_detected()
    found = float(plain.get_trunk("rna").typical_density)
    assert found == pytest.approx(float(detected.log().mean().exp()) / 30, rel=1e-5)


def test_units_that_hardly_differ_give_no_nan() -> None:
    """Their variance, a difference of two large numbers, may round to less than 0."""
    torch.manual_seed(0)
    ensemble = Ensemble(2, 4, 8, 2, 0.0)
    with torch.no_grad():
        ensemble.layers[0].weight.mul_(1e-4)
        ensemble.layers[0].bias.fill_(10)
    affine = Affine(torch.ones(1, 1, 4), torch.zeros(1, 1, 4))
    heads = torch.randn(2, 8, 3), torch.zeros(2, 1, 3)
    found = ensemble.infer_linear(torch.randn(500, 4), lambda: affine, *heads)
    assert found.isfinite().all()
