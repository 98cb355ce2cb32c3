"""The model: its grid of heads, its members, what is private, embeddings, and mixtures of cells."""

from dataclasses import replace
from itertools import product

import pytest
import torch
from torch import Tensor

from clue_dist.config import Config, ModelConfig
from clue_dist.data.batch import Batch, ObservedModality
from clue_dist.model.clue import CLUE
from clue_dist.model.encoders import CrossEncoderHeads
from clue_dist.model.layers import Affine, reverse_gradient
from clue_dist.model.modality_spec import ModalitySpec
from clue_dist.model.noise import Noise
from clue_dist.model.posterior import select_own_latent
from clue_dist.model.posterior_encoder import PRIVATE_SCALE
from clue_dist.model.trunk import Trunk
from clue_dist.train.auto_settings import resolve_auto_settings
from tests.unit.model_helpers import B, D, K, draw, small_model


def test_reversed_gradient() -> None:
    x = draw(3).requires_grad_()
    (reverse_gradient(x) * torch.tensor([1.0, 2.0, 3.0])).sum().backward()
    torch.testing.assert_close(x.grad, -torch.tensor([1.0, 2.0, 3.0]))


def test_private_dimensions_follow_from_their_own_modality_alone() -> None:
    model, batch, noise = small_model(members=2, private=0.5)
    clue, observed = model.model.eval(), batch.observed
    a = clue.n_aligned
    assert (a, clue.n_private) == (D // 2, D // 2)
    encoded = clue.encode_batch(batch)
    for expert, joint in (
        (encoded.mean, encoded.joint_mean),
        (encoded.log_var, encoded.joint_log_var),
    ):
        expected, private = select_own_latent(expert)[..., a:], joint[..., a:]  # (B, K, .)
        torch.testing.assert_close(private[observed], expected[observed])
        assert (private[~observed] == 0).all()  # the prior
    aligned = clue.combine(encoded.mean[..., :a], encoded.log_var[..., :a], observed)
    torch.testing.assert_close(
        (encoded.joint_mean[..., :a], encoded.joint_log_var[..., :a]), aligned
    )
    out = clue(batch, noise)
    assert out.z.shape == (B, K, K, a)
    assert out.contrast.shape == (2, B, K, K * a // 2)


def test_private_dimensions_are_as_many_in_each_member() -> None:
    # One of each member's five.
    assert ModelConfig(latent=20, private=0.25, trunk={"members": 4}).n_private == 4
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
                torch.zeros(len(row), dtype=torch.int64), o.counts[row], torch.arange(len(row))
            )
            for (m, o), row in zip(batch.modalities.items(), rows.values(), strict=True)
        }
        one = Batch(batch.observed[cell : cell + 1], batch.batch_code[cell : cell + 1], modalities)
        joint, alone = clue.embed_batch(one)
        torch.testing.assert_close(joint[0], together[cell])
        for m, row in rows.items():
            torch.testing.assert_close(alone[m], alone_together[m][row])


def test_a_single_modality_has_nothing_private() -> None:
    model, _, _ = small_model(1, private=0.5)
    assert model.model.n_private == 0


@pytest.mark.parametrize("shared", [True, False])
def test_heads_are_the_grid_of_separate_encoders(shared: bool) -> None:
    members, d = 2, D // 2
    heads = CrossEncoderHeads(K, members, 8, D, shared)
    targets = K if shared else 1  # of one network
    normalised = draw(K, members * K // targets, B, 8)
    affine = Affine(draw(normalised.shape[1], 1, 8), draw(normalised.shape[1], 1, 8, seed=1))
    h = normalised * affine.scale + affine.shift
    said = [heads(k, normalised[k], lambda: affine) for k in range(K)]
    mean, log_var = (torch.stack(x, 1) for x in zip(*said, strict=True))
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
    for k in range(K):  # means of the first dimension of each member alone
        *whole, aligned = heads(k, normalised[k], lambda: affine, B - 2, members)
        torch.testing.assert_close(aligned, mean[-2:, k, :, :members], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(whole, [mean[:-2, k], log_var[:-2, k]], rtol=1e-4, atol=1e-5)


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


def leave_alone() -> Affine:
    """The affine of a norm that has neither scale nor shift."""
    return Affine(torch.ones(1, 1, 8), torch.zeros(1, 1, 8))


def test_heads_of_low_rank_are_a_shared_matrix_and_a_little_of_each() -> None:
    members, d, rank = 2, D // 2, 3
    heads = CrossEncoderHeads(K, members, 8, D, rank=rank)
    h = draw(members, B, 8)
    before = [heads(k, h, leave_alone)[0] for k in range(K)]
    torch.testing.assert_close(before[0], before[1])  # all sources start with the same
    with torch.no_grad():
        heads.expand.copy_(draw(*heads.expand.shape, seed=1))
        heads.bias.copy_(draw(*heads.bias.shape, seed=2))
    mean, _ = heads(1, h, leave_alone)
    for m, j in product(range(members), range(K)):
        n = members + m  # the network of source 1
        weight = heads.weight[m] + heads.reduce[n] @ heads.expand[n]
        weight, bias = weight.view(8, K, 2, d)[:, j, 0], heads.bias[n].view(K, 2, d)[j, 0]
        found = mean[:, j, m::members]
        torch.testing.assert_close(found, h[m] @ weight + bias, rtol=1e-4, atol=1e-5)
    weight, bias = heads.select_weights(1, with_variance=False)
    (alone,) = heads.arrange_outputs(torch.baddbmm(bias, h, weight))
    torch.testing.assert_close(alone, mean, rtol=1e-4, atol=1e-5)


def test_a_run_older_than_the_rank_of_heads_has_a_matrix_for_each() -> None:
    specs = {f"m{i}": ModalitySpec(6, "none", "normal", None) for i in range(5)}
    clue = CLUE(specs, 1, ModelConfig(latent=8))
    assert clue.heads.rank == 0
    assert set(dict(clue.heads.named_parameters())) == {"weight", "bias"}


def test_heads_of_eight_modalities_are_under_a_quarter_of_the_encoders() -> None:
    def share_pairs(config: ModelConfig) -> float:
        heads = CrossEncoderHeads(8, 4, 256, 64, rank=config.head_rank)
        trunk = Trunk(50, "none", 8, config.trunk)
        of_pairs = heads.bias.numel() + (heads.expand if heads.rank else heads.weight).numel()
        all_heads = sum(weight.numel() for weight in heads.parameters())
        trunks = 8 * sum(weight.numel() for weight in trunk.ensemble.parameters())
        return of_pairs / (all_heads + trunks)

    auto = resolve_auto_settings(Config(), 10**6, 8).model
    assert share_pairs(auto) < 0.06
    assert share_pairs(auto.model_copy(update={"head_rank": 0})) > 0.4


def test_contrast_compares_mixtures_of_pairs() -> None:
    """A member says the same of a mixture and of a cell whose components are that mixture."""
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
        batch_of(x), Noise(0, 0, share, 1), decode_self=False, decode_cross=False, mixup=True
    )
    assert out.contrast.shape == (2, B, K, K * D // 2)
    partner, kept = Noise(0, 0, share, 1).draw_mixing()
    want = model.model.encode_batch(
        batch_of({m: kept * v + (1 - kept) * v[partner] for m, v in x.items()})
    ).mean
    want = want.view(B, K, K, D // 2, 2).permute(4, 0, 1, 2, 3).flatten(3)
    used = observed & (observed.sum(1) > 1)[:, None]
    torch.testing.assert_close(out.contrast[:, used], want[:, used])


def test_cells_of_a_stratum_with_one_round_are_contrasted_as_they_are() -> None:
    """A rare stratum that has its turn gives one cell to each lane, with none to mix it with."""
    model, _, _ = small_model(k=2)
    model.eval()
    rows = torch.arange(B)
    modalities = {f"m{i}": ObservedModality(rows, draw(B, 6, seed=i), rows) for i in range(2)}
    observed = torch.ones(B, 2, dtype=torch.bool)
    batch = Batch(observed, torch.zeros(B, dtype=torch.int64), modalities)
    plain, mixed = (
        model.model(batch, Noise(0, 0, {"often": 8, "its turn": 4}, 4), mixup=how).contrast[0]
        for how in (False, True)
    )
    torch.testing.assert_close(mixed[8:], plain[8:])
    assert not torch.isclose(mixed[:8], plain[:8]).all((1, 2)).all()


@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("pattern", ["no pairs", "one without pairs", "one modality"])
def test_mixtures_leave_the_posterior_as_it_is(shared: bool, pattern: str) -> None:
    model, batch, noise = small_model(
        k=1 if pattern == "one modality" else K, members=2, shared=shared, private=0.5
    )
    observed = batch.observed.clone()
    if pattern == "no pairs":
        observed = torch.eye(K, dtype=torch.bool).repeat(B // K, 1)
    elif pattern == "one without pairs":
        observed[:, 2] = ~observed[:, :2].any(1)
        observed[0] = torch.tensor([False, False, True])
    rows = [column.nonzero()[:, 0] for column in observed.T]
    modalities = {
        f"m{i}": ObservedModality(r, draw(len(r), 6), (observed.sum(1) > 1)[r].nonzero()[:, 0])
        for i, r in enumerate(rows)
    }
    batch = Batch(observed, batch.batch_code, modalities)
    model.eval()
    mixed, plain = (model.model(batch, noise, mixup=mixup) for mixup in (True, False))
    torch.testing.assert_close(mixed.posterior, plain.posterior)
    loss, _ = model.train().compute_loss(batch, noise)
    loss.backward()
    gradients = [each.grad for each in model.parameters() if each.grad is not None]
    assert gradients
    assert all(gradient.isfinite().all() for gradient in [loss, *gradients])


def test_a_mixture_is_of_the_batch_that_has_the_larger_share() -> None:
    model, batch, _ = small_model(members=2)
    model.eval()
    batch = Batch(batch.observed, torch.arange(B), batch.modalities)
    partner, share = Noise(0, 0, {"all": B}, 1).draw_mixing()
    largest = torch.where(share[:, 0] > 0.5, torch.arange(B), partner)
    assert (largest != torch.arange(B)).any()
    mixed, plain = (
        model.model(batch, Noise(0, 0, {"all": B}, 1), mixup=mixup) for mixup in (True, False)
    )
    torch.testing.assert_close(mixed.contrast_code, largest)
    torch.testing.assert_close(plain.contrast_code, torch.arange(B))


def test_members_share_nothing_but_their_input() -> None:
    model, batch, _ = small_model(members=2)
    out = model.model.encode_batch(batch).mean  # (B, K, K, D), each member every other of D
    out[..., ::2].sum().backward()
    for layer in model.model.get_trunk("m0").ensemble.layers:
        assert layer.weight.grad[0].abs().sum() > 0
        assert layer.weight.grad[1].abs().sum() == 0


@pytest.mark.parametrize("fitted", [False, True])
@pytest.mark.parametrize("shared", [False, True])
def test_an_embedding_is_read_off_the_posterior_that_training_infers(
    monkeypatch: pytest.MonkeyPatch, fitted: bool, shared: bool
) -> None:
    model, batch, _ = small_model(private=0.5, members=2, shared=shared)
    clue = model.model.eval()
    if fitted:
        fit_space(clue)
    for trunk in clue.trunks:
        unsettle_norms(trunk)
    found = clue.embed_batch_with_variance(batch)
    torch.testing.assert_close(clue.embed_batch(batch), found[:2])
    latents = clue.read_latents(batch, clue.encode_batch(batch))
    monkeypatch.setattr(clue, "_infer_for_embedding", clue.encode_batch)
    wanted = (*latents, clue.embed_batch_with_variance(batch)[2])
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)


def fit_space(clue: CLUE) -> None:
    """A common space of random directions."""
    space = clue.space
    for buffer in (space.mean, space.rotation, space.weight, space.joint_weight):
        buffer.copy_(draw(*buffer.shape))


def unsettle_norms(trunk: Trunk) -> None:
    """Layer norms that do something."""
    for layer in trunk.ensemble.layers:
        for weight in (layer.bias, layer.norm_scale, layer.norm_bias):
            weight.data.add_(0.3 * draw(*weight.shape))


@pytest.mark.parametrize("fitted", [False, True])
@pytest.mark.parametrize("shared", [False, True])
def test_a_lone_modality_is_embedded_by_what_is_asked_for(
    monkeypatch: pytest.MonkeyPatch, fitted: bool, shared: bool
) -> None:
    model, batch, _ = small_model(private=0.5, members=2, shared=shared)
    clue = model.model.eval()
    unsettle_norms(clue.trunks[1])
    if fitted:
        fit_space(clue)
    seen = batch.modalities["m1"]
    rows = torch.arange(len(seen.rows)).flip(0)
    lone = Batch(
        torch.tensor([False, True, False]).expand(len(rows), -1),
        batch.batch_code[seen.rows],
        {"m1": ObservedModality(rows, seen.counts, rows[:0])},
    )
    # Of two modalities, of which no cell has the first, all experts are combined.
    none = torch.zeros(0, dtype=torch.int64)
    observed = {"m0": ObservedModality(none, torch.zeros(0, 6), none), **lone.modalities}
    combined = clue.embed_batch_with_variance(replace(lone, modalities=observed))
    monkeypatch.setattr(clue, "_combine_experts", lambda *_: pytest.fail("experts were combined"))
    found = clue.embed_batch_with_variance(lone)
    for values, expected in zip(found[::2], combined[::2], strict=True):
        torch.testing.assert_close(values, expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(found[1]["m1"], combined[1]["m1"], rtol=1e-5, atol=1e-5)
    select_weights, asked = clue.heads.select_weights, []
    monkeypatch.setattr(
        clue.heads,
        "select_weights",
        lambda source, with_variance: (
            asked.append(with_variance) or select_weights(source, with_variance)
        ),
    )
    joint, alone = clue.embed_batch(lone, per_modality=False)
    torch.testing.assert_close(joint, found[0], rtol=1e-5, atol=1e-5)
    assert (alone, asked) == ({}, [False])
