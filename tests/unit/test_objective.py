"""Each loss term equals a slow float64 transcription of its equation, on three modalities."""

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from clue_dist.config import Config
from clue_dist.losses.objective import (
    compute_alignment,
    compute_elbo_cross,
    compute_elbo_self,
    score_discriminator,
)
from clue_dist.model.clue import CLUE, CLUEOutput
from clue_dist.model.likelihoods import DISPERSION_LEARNING_RATE
from clue_dist.model.modality_spec import ModalitySpec
from clue_dist.model.noise import Noise
from clue_dist.model.posterior import (
    product_of_experts,
    select_own_latent,
)
from clue_dist.model.posterior_encoder import Posterior
from clue_dist.train.engine import LARGEST_BUCKET, group_parameters, make_deepspeed_config
from tests.unit.model_helpers import OBSERVED, B, D, K, draw, kl64, small_model


def output(seed: int = 0) -> CLUEOutput:
    mean, log_var = draw(B, K, K, D, seed=seed), draw(B, K, K, D, seed=seed + 1)
    posterior = Posterior(mean, log_var, *product_of_experts(mean, log_var, OBSERVED))
    ln = [draw(B, K, seed=seed + i) * OBSERVED for i in (2, 3)]
    logits, contrast = draw(B, K, K, seed=seed + 5), draw(1, B, K, K * D, seed=seed + 6)
    return CLUEOutput(
        posterior,
        draw(B, K, K, D, seed=seed + 4),
        *ln,
        logits,
        contrast,
        torch.zeros(B).long(),
        torch.tensor(1.5),
    )


def test_elbo_self_is_eq_5() -> None:
    out, weight, beta = output(), torch.tensor([1.0, 0.5, 0.1]), 0.7
    elbo = compute_elbo_self(out, OBSERVED, weight, beta)
    p = out.posterior
    for c in range(B):
        want = sum(
            float(weight[k])
            * (
                float(out.ln_self[c, k])
                - beta * kl64(p.mean[c, k, k].double().numpy(), p.log_var[c, k, k].double().numpy())
            )
            for k in range(K)
            if OBSERVED[c, k]
        )
        assert float(elbo[c]) == pytest.approx(want, rel=1e-5, abs=1e-5)


def test_elbo_cross_is_eq_8() -> None:
    out, weight, beta = output(), torch.tensor([1.0, 0.5, 0.1]), 0.7
    elbo = compute_elbo_cross(out, OBSERVED, weight, beta)
    p = out.posterior
    for c in range(B):
        want = 0.0
        for k in range(K):  # the KL runs over all k, the reconstruction over the observed
            reconstruction = float(out.ln_cross[c, k]) if OBSERVED[c, k] else 0.0
            kl = kl64(p.joint_mean[c, k].double().numpy(), p.joint_log_var[c, k].double().numpy())
            want += float(weight[k]) * (reconstruction - beta * kl)
        assert float(elbo[c]) == pytest.approx(want, rel=1e-5, abs=1e-5)


@pytest.mark.parametrize("cosine", [False, True])
def test_mse_is_eq_9_to_11_over_multimodal_cells(cosine: bool) -> None:
    z = draw(B, K, K * D)
    per_cell = []
    for c in range(B):
        rows = [z[c, k].double().numpy() for k in range(K) if OBSERVED[c, k]]
        if len(rows) < 2:
            continue  # contributes nothing and does not dilute the mean
        rows = [r / np.linalg.norm(r) for r in rows] if cosine else rows
        centre = sum(rows) / len(rows)
        per_cell.append(sum(((r - centre) ** 2).sum() for r in rows) / len(rows))
    assert float(compute_alignment(z, OBSERVED, cosine)) == pytest.approx(
        np.mean(per_cell), rel=1e-5
    )


def test_discriminator_term_is_eq_12() -> None:
    logits = draw(B, K, K)
    per_cell = []
    for c in range(B):
        terms = []
        for k in range(K):
            if OBSERVED[c, k]:
                row = logits[c, k].double().numpy()
                terms.append(row[k] - np.log(np.exp(row).sum()))
        per_cell.append(np.mean(terms))
    assert float(score_discriminator(logits, OBSERVED)) == pytest.approx(
        np.mean(per_cell), rel=1e-5
    )


def test_total_loss_is_eq_15_and_plays_the_min_max() -> None:
    weights = {
        "lambda_self": 2.0,
        "lambda_cross": 3.0,
        "lambda_mse": 0.5,
        "lambda_d": 0.25,
        "lambda_contrastive": 0.75,
    }
    model, batch, noise = small_model(**weights)
    loss, t = model.compute_loss(batch, noise)
    want = 2 * t["self"] + 3 * t["cross"] + 0.5 * t["mse"] - 0.25 * t["d"] + 0.75 * t["contrastive"]
    torch.testing.assert_close(loss.detach(), want)


def test_discriminator_ascends_and_encoders_descend_the_adversarial_term() -> None:
    off = dict.fromkeys(("lambda_self", "lambda_cross", "lambda_mse", "lambda_contrastive"), 0.0)
    for part, sign in (("discriminator", 1), ("heads", -1)):
        model, batch, _ = small_model(**off, lambda_d=1.0)
        model.eval()
        loss, before = model.compute_loss(batch, Noise(0, 0, {"s": B}, 1))
        loss.backward()
        with torch.no_grad():
            for name, p in model.named_parameters():
                if part in name and p.grad is not None:
                    p -= 0.01 * p.grad
        _, after = model.compute_loss(batch, Noise(0, 0, {"s": B}, 1))
        assert sign * float(after["d"] - before["d"]) > 0


@pytest.mark.parametrize("k", [1, 2, 3])
def test_any_number_of_modalities_trains_with_finite_gradients(k: int) -> None:
    model, batch, noise = small_model(k, lambda_contrastive=1.0)
    loss, _ = model.compute_loss(batch, noise)
    loss.backward()
    assert loss.isfinite()
    assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())


def test_mixed_precision_rounds_products_but_neither_weights_nor_held_out_scores() -> None:
    objective, batch, noise = small_model(lambda_contrastive=1.0)
    objective.eval()  # or running means would move
    exact, _ = objective.compute_loss(batch, noise)
    held_out = objective.score_held_out(batch, Noise(0, 1, {"s": B}, 1)).minus_elbo
    objective.mixed_precision = True
    rounded, _ = objective.compute_loss(batch, Noise(0, 0, {"s": B}, 1))
    assert rounded.dtype == torch.float32
    assert rounded.item() != exact.item()
    assert rounded.item() == pytest.approx(exact.item(), rel=0.01)
    rounded.backward()
    gradients = [p.grad for p in objective.parameters() if p.grad is not None]
    assert {gradient.dtype for gradient in gradients} == {torch.float32}
    again = objective.score_held_out(batch, Noise(0, 1, {"s": B}, 1)).minus_elbo
    torch.testing.assert_close(again, held_out, rtol=0, atol=0)


def test_mixed_precision_leaves_projections_exact() -> None:
    objective, batch, noise = small_model(lambda_contrastive=1.0)
    projected: list[Tensor] = []
    for trunk in objective.model.trunks:
        trunk.projection.register_forward_hook(lambda *seen: projected.append(seen[-1]))
    objective.compute_loss(batch, noise)
    objective.mixed_precision = True
    objective.compute_loss(batch, Noise(0, 0, {"s": B}, 1))
    exact, rounded = projected[: len(projected) // 2], projected[len(projected) // 2 :]
    for a, b in zip(exact, rounded, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0)


def test_what_a_cell_lacks_does_not_touch_its_loss(monkeypatch: pytest.MonkeyPatch) -> None:
    model, batch, _ = small_model(lambda_contrastive=1.0)
    model.eval()
    loss, _ = model.compute_loss(batch, Noise(0, 0, {"s": B}, 1))
    # What is said of unobserved sources is arbitrary: make it absurd.
    place = model.model._place_experts
    monkeypatch.setattr(
        model.model,
        "_place_experts",
        lambda *arguments: tuple(
            torch.where(OBSERVED[:, :, None, None], values, 3.0) for values in place(*arguments)
        ),
    )
    other, _ = model.compute_loss(batch, Noise(0, 0, {"s": B}, 1))
    torch.testing.assert_close(loss, other)


def test_no_alignment_reaches_private_dimensions() -> None:
    weights = {
        "lambda_self": 0.0,
        "lambda_cross": 0.0,
        "lambda_mse": 1.0,
        "lambda_d": 1.0,
        "lambda_contrastive": 1.0,
    }
    model, batch, noise = small_model(private=0.5, **weights)
    kept: list[Tensor] = []
    model.model.heads.register_forward_hook(lambda _m, _i, out: kept.extend(out))
    loss, _ = model.compute_loss(batch, noise)
    # Of the cells' experts and of their mixtures', each of which has a part in the loss.
    gradients = torch.autograd.grad(loss, kept)
    assert sum(gradient.shape[-1] > model.model.n_aligned for gradient in gradients) == 6
    for gradient in gradients:
        assert (gradient[..., model.model.n_aligned :] == 0).all()
        assert (gradient[..., : model.model.n_aligned] != 0).any()


def test_the_joint_likelihood_trains_the_private_dimensions_of_what_was_observed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    off = dict.fromkeys(("lambda_self", "lambda_mse", "lambda_d", "lambda_contrastive"), 0.0)
    model, batch, noise = small_model(private=0.5, **off, lambda_cross=1.0)
    kept: list[Tensor] = []
    place = model.model._place_experts

    def keep_experts(*arguments: Any) -> list[Tensor]:
        experts = list(place(*arguments))
        kept.extend(experts)
        return experts

    monkeypatch.setattr(model.model, "_place_experts", keep_experts)
    loss, _ = model.compute_loss(batch, noise)
    foreign = ~torch.eye(K, dtype=torch.bool)
    for gradient in torch.autograd.grad(loss, kept):  # of means, of log-variances
        private = gradient[..., model.model.n_aligned :]  # (B, K source, K target, .)
        assert (select_own_latent(private)[batch.observed] != 0).any(-1).all()
        assert (select_own_latent(private)[~batch.observed] == 0).all()
        assert (private[:, foreign] == 0).all()


def test_dispersions_learn_faster_and_biases_do_not_decay() -> None:
    model = {"trunk": {"projection_lr": 0.5}, "head_rank": 2}
    config = Config(model=model, train={"weight_decay": 0.1})
    specs = {
        "counts": ModalitySpec(6, "log", "nb", None),
        "reals": ModalitySpec(6, "none", "normal", None),
    }
    model = CLUE(specs, 1, config.model)
    groups = {id(p): g for g in group_parameters(model, config) for p in g["params"]}
    found = {
        n: (groups[id(p)]["lr_scale"], groups[id(p)]["weight_decay"])
        for n, p in model.named_parameters()
    }
    assert found["decoders.0.theta.weight"] == (DISPERSION_LEARNING_RATE, 0.0)
    # The theta of a normal distribution starts at the standard deviation itself.
    assert found["decoders.1.theta.weight"] == (1.0, 0.0)
    assert found["decoders.0.rate.weight"] == (1.0, 0.1)
    assert found["decoders.0.rate.bias"] == (1.0, 0.0)
    assert found["trunks.0.projection.weight"] == (0.5, 0.1)
    assert found["trunks.0.ensemble.layers.0.weight"] == (1.0, 0.1)
    assert found["heads.reduce"] == found["heads.expand"] == (1.0, 0.1)
    assert found["scale.log"] == (1.0, 0.0)


def test_the_bucket_of_gradients_is_no_larger_than_the_model() -> None:
    config = Config(data={"batch_size": 64})

    def find_bucket(n_weights: int) -> int:
        settings = make_deepspeed_config(config, 2, False, n_weights)["zero_optimization"]
        return int(settings["reduce_bucket_size"])

    assert [find_bucket(n) for n in (0, 1000, 10**12)] == [1, 1000, LARGEST_BUCKET]
