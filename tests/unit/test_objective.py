"""Each loss term equals a slow float64 transcription of its equation, cell by cell, on a mosaic of three modalities."""

import math
from itertools import permutations, product

import numpy as np
import pytest
import torch
from torch import Tensor

from clue_dist.config import Config, ModelConfig, ObjectiveConfig
from clue_dist.data.batch import Batch, ObservedModality
from clue_dist.model.clue import CLUE, PRIVATE_SCALE, CLUEOutput, ModalitySpec, Posterior
from clue_dist.model.encoders import CrossEncoderHeads
from clue_dist.model.layers import reverse_gradient
from clue_dist.model.noise import Noise
from clue_dist.model.posterior import (
    GeneralisedProduct,
    compute_kl_to_prior,
    mean_of_experts,
    product_of_experts,
    select_own_latent,
)
from clue_dist.objective import (
    Objective,
    compute_alignment,
    compute_elbo_cross,
    compute_elbo_self,
    compute_info_nce,
    score_discriminator,
)
from clue_dist.train.engine import group_parameters

B, K, D = 12, 3, 4
OBSERVED = torch.tensor(
    [[1, 1, 1], [1, 1, 0], [1, 0, 0], [0, 1, 1], [0, 0, 1], [1, 0, 1]] * 2, dtype=torch.bool
)


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def output(seed: int = 0) -> CLUEOutput:
    mean, log_var = draw(B, K, K, D, seed=seed), draw(B, K, K, D, seed=seed + 1)
    posterior = Posterior(mean, log_var, *product_of_experts(mean, log_var, OBSERVED))
    ln = [draw(B, K, seed=seed + i) * OBSERVED for i in (2, 3)]
    logits, contrast = draw(B, K, K, seed=seed + 5), draw(1, B, K, K * D, seed=seed + 6)
    return CLUEOutput(
        posterior, draw(B, K, K, D, seed=seed + 4), *ln, logits, contrast, torch.tensor(1.5)
    )


def kl64(mean: np.ndarray, log_var: np.ndarray) -> float:
    return sum(0.5 * (m * m + math.exp(v) - 1 - v) for m, v in zip(mean, log_var, strict=True))


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
            of = {k: share[k] * np.exp(-log_var[c, k, j].double().numpy()) for k in seen}
            precision = sum(of.values())
            weighted = sum(of[k] * mean[c, k, j].double().numpy() for k in seen)
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


def test_elbo_self_is_eq_5() -> None:
    out, weight, beta = output(), torch.tensor([1.0, 0.5, 0.1]), 0.7
    got = compute_elbo_self(out, OBSERVED, weight, beta)
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
        assert float(got[c]) == pytest.approx(want, rel=1e-5, abs=1e-5)


def test_elbo_cross_is_eq_8() -> None:
    out, weight, beta = output(), torch.tensor([1.0, 0.5, 0.1]), 0.7
    got = compute_elbo_cross(out, OBSERVED, weight, beta)
    p = out.posterior
    for c in range(B):
        want = 0.0
        for k in range(K):  # the KL runs over all k, the reconstruction over the observed
            reconstruction = float(out.ln_cross[c, k]) if OBSERVED[c, k] else 0.0
            kl = kl64(p.joint_mean[c, k].double().numpy(), p.joint_log_var[c, k].double().numpy())
            want += float(weight[k]) * (reconstruction - beta * kl)
        assert float(got[c]) == pytest.approx(want, rel=1e-5, abs=1e-5)


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


@pytest.mark.parametrize("within", [False, True])
def test_info_nce_over_pairs_both_directions(within: bool) -> None:
    z, code, log_scale = draw(2, B, K, K * D), torch.arange(B) % 2, torch.tensor(1.3)
    losses = []
    for member in z.double().numpy():
        unit = member / np.linalg.norm(member, axis=-1, keepdims=True)
        for a, b in permutations(range(K), 2):
            both = [c for c in range(B) if OBSERVED[c, a] and OBSERVED[c, b]]
            for c in both:
                rivals = [e for e in both if not within or code[e] == code[c]]
                logits = {e: math.exp(1.3) * unit[c, a] @ unit[e, b] for e in rivals}
                losses.append(math.log(sum(math.exp(v) for v in logits.values())) - logits[c])
    got = compute_info_nce(z, OBSERVED, code, log_scale, within)
    assert float(got) == pytest.approx(np.mean(losses), rel=1e-5)


def test_reversed_gradient() -> None:
    x = draw(3).requires_grad_()
    (reverse_gradient(x) * torch.tensor([1.0, 2.0, 3.0])).sum().backward()
    torch.testing.assert_close(x.grad, -torch.tensor([1.0, 2.0, 3.0]))


def small_model(
    k: int = K, members: int = 1, shared: bool = True, private: float = 0.0, **objective: float
) -> tuple[Objective, Batch, Noise]:
    torch.manual_seed(0)
    specs = {f"m{i}": ModalitySpec(6, "none", "normal", None) for i in range(k)}
    config = ModelConfig(
        latent=D,
        private=private,
        trunk={"hidden": 8, "projection_lr": 1.0, "members": members, "shared": shared},
        discriminator={"hidden": 8},
        decoder={"hidden": 8},
    )
    model = Objective(CLUE(specs, 1, config), ObjectiveConfig(**objective), [1.0] * k)
    observed = OBSERVED[:, :k].clone()
    observed[~observed.any(1), 0] = True
    paired = observed.sum(1) > 1
    modalities = {}
    for i in range(k):
        rows = observed[:, i].nonzero()[:, 0]
        modalities[f"m{i}"] = ObservedModality(
            rows, draw(len(rows), 6, seed=i), paired[rows].nonzero()[:, 0]
        )
    return (
        model,
        Batch(observed, torch.zeros(B, dtype=torch.int64), modalities),
        Noise(0, 0, {"s": B}, 1),
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
    loss, t = model(batch, noise)
    want = 2 * t["self"] + 3 * t["cross"] + 0.5 * t["mse"] - 0.25 * t["d"] + 0.75 * t["contrastive"]
    torch.testing.assert_close(loss.detach(), want)


def test_discriminator_ascends_and_encoders_descend_the_adversarial_term() -> None:
    off = dict.fromkeys(("lambda_self", "lambda_cross", "lambda_mse", "lambda_contrastive"), 0.0)
    for part, sign in (("discriminator", 1), ("heads", -1)):
        model, batch, _ = small_model(**off, lambda_d=1.0)
        model.eval()
        loss, before = model(batch, Noise(0, 0, {"s": B}, 1))
        loss.backward()
        with torch.no_grad():
            for name, p in model.named_parameters():
                if part in name and p.grad is not None:
                    p -= 0.01 * p.grad
        _, after = model(batch, Noise(0, 0, {"s": B}, 1))
        assert sign * float(after["d"] - before["d"]) > 0


@pytest.mark.parametrize("k", [1, 2, 3])
def test_any_number_of_modalities_trains_with_finite_gradients(k: int) -> None:
    model, batch, noise = small_model(k, lambda_contrastive=1.0)
    loss, _ = model(batch, noise)
    loss.backward()
    assert loss.isfinite()
    assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())


def test_what_a_cell_lacks_does_not_touch_its_loss() -> None:
    model, batch, _ = small_model(lambda_contrastive=1.0)
    model.eval()
    loss, _ = model(batch, Noise(0, 0, {"s": B}, 1))
    # The grid's entries of unobserved sources are arbitrary: make them absurd through the zero rows of h.
    hook = model.model.heads.register_forward_hook(
        lambda _m, _i, out: tuple(
            torch.where(OBSERVED[:, :, None, None], o, torch.full_like(o, 3.0)) for o in out
        )
    )
    other, _ = model(batch, Noise(0, 0, {"s": B}, 1))
    hook.remove()
    torch.testing.assert_close(loss, other)


def test_private_dimensions_follow_from_their_own_modality_alone() -> None:
    model, batch, noise = small_model(members=2, private=0.5)
    clue, observed = model.model.eval(), batch.observed
    a = clue.n_aligned
    assert (a, clue.n_private) == (D // 2, D // 2)
    got = clue.encode_batch(batch)
    for expert, joint in ((got.mean, got.joint_mean), (got.log_var, got.joint_log_var)):
        mine, private = select_own_latent(expert)[..., a:], joint[..., a:]  # (B, K, .)
        torch.testing.assert_close(private[observed], mine[observed])
        assert (private[~observed] == 0).all()  # the prior
    aligned = clue.combine(got.mean[..., :a], got.log_var[..., :a], observed)
    torch.testing.assert_close((got.joint_mean[..., :a], got.joint_log_var[..., :a]), aligned)
    out = clue(batch, noise)
    assert out.z.shape == (B, K, K, a)
    assert out.contrast.shape == (2, B, K, K * a // 2)


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
    loss, _ = model(batch, noise)
    gradients = torch.autograd.grad(
        loss, kept, allow_unused=True
    )  # of the cells' and of their mixtures' experts
    for gradient in (g for g in gradients if g is not None):
        assert (gradient[..., model.model.n_aligned :] == 0).all()
        assert (gradient[..., : model.model.n_aligned] != 0).any()


def test_the_joint_likelihood_trains_the_private_dimensions_of_what_was_observed() -> None:
    off = dict.fromkeys(("lambda_self", "lambda_mse", "lambda_d", "lambda_contrastive"), 0.0)
    model, batch, noise = small_model(private=0.5, **off, lambda_cross=1.0)
    kept: list[Tensor] = []
    model.model.heads.register_forward_hook(lambda _m, _i, out: kept.extend(out))
    loss, _ = model(batch, noise)
    foreign = ~torch.eye(K, dtype=torch.bool)
    for gradient in torch.autograd.grad(loss, kept):  # of means, of log-variances
        private = gradient[..., model.model.n_aligned :]  # (B, K source, K target, .)
        assert (select_own_latent(private)[batch.observed] != 0).any(-1).all()
        assert (select_own_latent(private)[~batch.observed] == 0).all()
        assert (private[:, foreign] == 0).all()


def test_private_dimensions_are_as_many_in_each_member() -> None:
    assert (
        ModelConfig(latent=20, private=0.25, trunk={"members": 4}).n_private == 4
    )  # of each member's 5, one
    assert ModelConfig(latent=8, private=0.25, trunk={"members": 4}).n_private == 0
    assert ModelConfig(latent=64, trunk={"members": 4}).n_private == 16


def test_an_embedding_shows_private_dimensions_small_and_of_what_was_observed() -> None:
    model, batch, _ = small_model(private=0.5)
    clue = model.model.eval()
    a, posterior, (joint, alone) = clue.n_aligned, clue.encode_batch(batch), clue.embed_batch(batch)
    joint = joint.view(B, K, D)
    torch.testing.assert_close(joint[..., :a], posterior.joint_mean[..., :a])
    torch.testing.assert_close(joint[..., a:], PRIVATE_SCALE * posterior.joint_mean[..., a:])
    rows = batch.modalities["m1"].rows
    z = alone["m1"].view(len(rows), K, D)
    torch.testing.assert_close(z[..., :a], posterior.mean[rows, 1, :, :a])
    torch.testing.assert_close(z[:, 1, a:], PRIVATE_SCALE * posterior.mean[rows, 1, 1, a:])
    assert (z[:, [0, 2], a:] == 0).all()


def test_an_embedding_of_a_cell_does_not_follow_from_the_cells_beside_it() -> None:
    model, batch, _ = small_model(private=0.5, members=2)
    clue = model.model.eval()
    together, alone_together = clue.embed_batch(batch)
    for cell in range(B):
        rows = {m: (o.rows == cell).nonzero()[:, 0] for m, o in batch.modalities.items()}
        modalities = {
            m: ObservedModality(
                torch.zeros(len(at), dtype=torch.int64), o.counts[at], torch.arange(len(at))
            )
            for (m, o), at in zip(batch.modalities.items(), rows.values(), strict=True)
        }
        one = Batch(batch.observed[cell : cell + 1], batch.batch_code[cell : cell + 1], modalities)
        joint, alone = clue.embed_batch(one)
        torch.testing.assert_close(joint[0], together[cell])
        for m, at in rows.items():
            torch.testing.assert_close(alone[m], alone_together[m][at])


def test_a_single_modality_has_nothing_private() -> None:
    model, _, _ = small_model(1, private=0.5)
    assert model.model.n_private == 0


def test_dispersions_learn_faster_and_biases_do_not_decay() -> None:
    config = Config(model={"trunk": {"projection_lr": 0.5}}, train={"weight_decay": 0.1})
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
    assert found["decoders.0.theta.weight"] == (10.0, 0.0)
    assert found["decoders.1.theta.weight"] == (
        1.0,
        0.0,
    )  # a standard deviation starts at its value
    assert found["decoders.0.rate.weight"] == (1.0, 0.1)
    assert found["decoders.0.rate.bias"] == (1.0, 0.0)
    assert found["trunks.0.projection.weight"] == (0.5, 0.1)
    assert found["trunks.0.ensemble.layers.0.weight"] == (1.0, 0.1)
    assert found["scale.log"] == (1.0, 0.0)


@pytest.mark.parametrize("shared", [True, False])
def test_heads_are_the_grid_of_separate_encoders(shared: bool) -> None:
    members, d = 2, D // 2
    heads = CrossEncoderHeads(K, members, 8, D, shared)
    targets = K if shared else 1  # of one network
    h = draw(K, members * K // targets, B, 8)
    mean, log_var = heads(h)
    for k, m, j in product(range(K), range(members), range(K)):
        i = m if shared else m * K + j
        network = k * h.shape[1] + i
        weight = heads.weight[network].view(8, targets, 2, d)[:, j % targets]
        bias = heads.bias[network].view(targets, 2, d)[j % targets]
        its = slice(m, None, members)  # what this member says of z_j
        torch.testing.assert_close(
            mean[:, k, j, its], h[k, i] @ weight[:, 0] + bias[0], rtol=1e-4, atol=1e-5
        )
        want = (h[k, i] @ weight[:, 1] + bias[1]).clamp(-8, 8)
        torch.testing.assert_close(log_var[:, k, j, its], want, rtol=1e-4, atol=1e-5)


def test_parameters_grow_as_k_in_the_wide_layers_and_as_k_squared_only_in_the_heads() -> None:
    sizes = {}
    for k in (1, 3):
        model, _, _ = small_model(k)
        sizes[k] = {
            p: sum(x.numel() for x in getattr(model.model, p).parameters())
            for p in ("trunks", "decoders", "heads")
        }
    assert sizes[3]["trunks"] == 3 * sizes[1]["trunks"]
    wide = [  # K separate encoders instead of one trunk: the wide layers too grow as K^2
        sum(
            x.numel()
            for m in model.model.modalities
            for x in model.model.get_trunk(m).ensemble.parameters()
        )
        for model in (small_model(k, shared=False)[0] for k in (1, 3))
    ]
    assert wide[1] == 9 * wide[0]
    assert sizes[3]["decoders"] == 3 * sizes[1]["decoders"]
    assert sizes[3]["heads"] == 9 * sizes[1]["heads"]


def test_noise_is_the_same_for_a_cell_on_any_number_of_ranks() -> None:
    share = {"a": 16, "b": 8}
    whole = Noise(3, 11, share, 4)
    first = whole.draw_normal(5)
    kept = whole.apply_dropout(torch.ones(24, 10), 0.5)
    for world in (2, 4):
        for rank in range(world):
            part = Noise(3, 11, share, 4, rank, world)
            rows = torch.cat([torch.arange(0, 16)[rank::world], torch.arange(16, 24)[rank::world]])
            torch.testing.assert_close(part.draw_normal(5), first[rows])
            torch.testing.assert_close(
                part.apply_dropout(torch.ones(len(rows), 10), 0.5), kept[rows]
            )
    assert (Noise(3, 12, share, 4).draw_normal(5) != first).all()


def test_partners_of_mixing_share_stratum_and_lane_on_any_number_of_ranks() -> None:
    share = {"a": 16, "b": 8}
    partner, own = Noise(3, 11, share, 4).draw_mixing()
    assert sorted(partner.tolist()) == list(range(24))  # everyone is somebody's partner
    assert ((partner < 16) == (torch.arange(24) < 16)).all()
    assert (partner % 4 == torch.arange(24) % 4).all()  # row r of a stratum lies in lane r mod 4
    assert (partner != torch.arange(24)).any()
    assert Noise(3, 11, {"a": 4}, 4).draw_mixing()[0].tolist() == [
        0,
        1,
        2,
        3,
    ]  # each alone in its lane
    assert ((own >= 0) & (own < 1)).all()
    for world in (2, 4):
        for rank in range(world):
            rows = torch.cat([torch.arange(0, 16)[rank::world], torch.arange(16, 24)[rank::world]])
            its_partner, its_own = Noise(3, 11, share, 4, rank, world).draw_mixing()
            torch.testing.assert_close(rows[its_partner], partner[rows])
            torch.testing.assert_close(its_own, own[rows])


def test_contrast_compares_mixtures_of_pairs() -> None:
    """What one member says of a mixture is what it says of a cell whose components are the mixture."""
    model, _, _ = small_model(members=2)
    model.eval()
    share = {"m0+m1": 6, "m0+m2": 4, "m1": 2}
    observed = torch.tensor([[1, 1, 0]] * 6 + [[1, 0, 1]] * 4 + [[0, 1, 0]] * 2, dtype=torch.bool)
    x = {f"m{i}": draw(B, 6, seed=i) for i in range(K)}

    def batch_of(x: dict[str, Tensor]) -> Batch:
        rows = [observed[:, i].nonzero()[:, 0] for i in range(K)]
        paired = [(observed.sum(1) > 1)[r].nonzero()[:, 0] for r in rows]
        modalities = {
            m: ObservedModality(r, x[m][r], p) for m, r, p in zip(x, rows, paired, strict=True)
        }
        return Batch(observed, torch.zeros(B, dtype=torch.int64), modalities)

    out = model.model(
        batch_of(x), Noise(0, 0, share, 1), decode_self=False, decode_cross=False, mixup="any"
    )
    assert out.contrast.shape == (2, B, K, K * D // 2)
    partner, own = Noise(0, 0, share, 1).draw_mixing()
    want = model.model.encode_batch(
        batch_of({m: own * v + (1 - own) * v[partner] for m, v in x.items()})
    ).mean
    want = (
        want.view(B, K, K, D // 2, 2).permute(4, 0, 1, 2, 3).flatten(3)
    )  # the projection is linear
    used = observed & (observed.sum(1) > 1)[:, None]
    torch.testing.assert_close(out.contrast[:, used], want[:, used])


def test_mixtures_stay_within_a_biological_batch_if_asked() -> None:
    model, batch, _ = small_model(members=2)
    model.eval()
    batch = Batch(batch.observed, (draw(B) > 0).long(), batch.modalities)
    partner, _ = Noise(0, 0, {"all": B}, 1).draw_mixing()
    alike = batch.batch_code == batch.batch_code[partner]
    paired = batch.observed.sum(1) > 1
    assert (alike & paired).any()
    assert (~alike & paired).any()
    used = (batch.observed & paired[:, None])[None, :, :, None]
    plain, mixed, within = (
        model.model(batch, Noise(0, 0, {"all": B}, 1), mixup=how).contrast * used
        for how in ("none", "any", "within_batch")
    )
    torch.testing.assert_close(within[:, alike], mixed[:, alike])
    torch.testing.assert_close(within[:, ~alike], plain[:, ~alike])
    assert (mixed[:, ~alike & paired] != plain[:, ~alike & paired]).any()


def test_members_share_nothing_but_their_input() -> None:
    model, batch, _ = small_model(members=2)
    out = model.model.encode_batch(
        batch
    ).mean  # (B, K, K, D): each member gives every other dimension
    out[..., ::2].sum().backward()
    for layer in model.model.get_trunk("m0").ensemble.layers:
        assert layer.weight.grad[0].abs().sum() > 0
        assert layer.weight.grad[1].abs().sum() == 0


def test_dropout_keeps_its_rate_and_its_mean() -> None:
    x = Noise(0, 0, {"s": 4096}, 1).apply_dropout(torch.ones(4096, 30), 0.3)
    assert float((x == 0).float().mean()) == pytest.approx(0.3, abs=0.01)
    assert float(x.mean()) == pytest.approx(1.0, abs=0.02)
