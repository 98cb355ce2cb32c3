"""CLUE: trunk -> K x K heads -> posterior -> decoders, for batches whose cells lack modalities.

Shapes: B cells, K modalities, d dimensions of each z_k, a of them aligned, M members of a trunk.
"""

from __future__ import annotations

from dataclasses import replace
from typing import NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from clue_dist.config import ModelConfig
from clue_dist.data.batch import Batch
from clue_dist.model.common_space import CommonSpace
from clue_dist.model.decoders import Decoder
from clue_dist.model.discriminator import Discriminator
from clue_dist.model.encoders import CrossEncoderHeads
from clue_dist.model.layers import reverse_gradient
from clue_dist.model.modality_spec import ModalitySpec
from clue_dist.model.noise import Noise
from clue_dist.model.posterior import choose_combination, sample_posterior, select_own_latent
from clue_dist.model.thinning import hide_entries
from clue_dist.model.translation import LatentTranslation
from clue_dist.model.trunk import Trunk
from clue_dist.store.batch_vocabulary import BatchVocabulary

# Embeddings shrink private dimensions to this: a linear probe still reads them, and a cell's
# neighbours follow from what modalities share. In the common space, where z has length 1, to less.
PRIVATE_SCALE = 0.2
PRIVATE_SCALE_IN_SPACE = 0.005

# Modules of buffers, which validations fit to the weights as they are then.
FITTED_MODULES = "space", "translation"


class Posterior(NamedTuple):
    """Gaussians over the full z.

    The last, private dimensions of z_j follow from x_j alone. What other experts say there is not
    used; the prior stands for it.
    """

    mean: Tensor  # (B, K source, K target, d), of the experts q(z_j | x_k)
    log_var: Tensor  # (B, K source, K target, d)
    joint_mean: Tensor  # (B, K target, d), of q(z | everything observed), eq. 6
    joint_log_var: Tensor  # (B, K target, d)


class CLUEOutput(NamedTuple):
    """What one forward pass gives, for the losses of `clue_dist.objective`."""

    posterior: Posterior
    z: Tensor  # (B, K source, K target, a), samples of the experts' aligned dimensions, eq. 10
    # ln p(x_k | z_k), (B, K), 0 where x_k is not observed: with z_k inferred from x_k alone (eq. 5)
    # and from everything observed (eq. 8).
    ln_self: Tensor
    ln_cross: Tensor
    logits: Tensor  # (B, K source, K), of the discriminator, eq. 12
    # (M, B, K source, K * a / M), the experts' means that InfoNCE compares, one set a member.
    contrast: Tensor
    contrast_code: Tensor  # (B,) int64, the biological batch of what InfoNCE compares
    log_scale: Tensor  # (), log of the contrast's inverse temperature


class LearnedTemperature(nn.Module):
    """A learnt inverse temperature, kept as its log."""

    def __init__(self) -> None:
        super().__init__()
        self.log = nn.Parameter(torch.tensor([2.5]))

    def forward(self) -> Tensor:
        """The log of the inverse temperature, (), at most ln 100."""
        return self.log.float().clamp(max=4.6)[0]


class CLUE(nn.Module):
    """The model for K modalities, K >= 1.

    Args:
        specs: by name, in model order.
        n_batches: biological batches that the decoders know.
        config: sizes, and how experts are combined.
        levels: (n_batches, C), the levels of each batch, see `Decoder`; None: of one covariate.
    """

    def __init__(
        self,
        specs: dict[str, ModalitySpec],
        n_batches: int,
        config: ModelConfig,
        levels: Tensor | None = None,
    ) -> None:
        super().__init__()
        self.modalities, self.latent = list(specs), config.latent
        k = len(specs)
        # Lists, not dicts by name: a modality may be called like an attribute of torch's modules.
        self.trunks = nn.ModuleList(
            Trunk(spec.n_features, spec.normalise, k, config.trunk) for spec in specs.values()
        )
        self.members = config.trunk.members
        self.n_private = config.n_private if k > 1 else 0  # a single modality has nothing to align
        self.n_aligned = config.latent - self.n_private
        self.heads = CrossEncoderHeads(
            k, self.members, config.trunk.hidden, config.latent, config.trunk.shared
        )
        self.combine = choose_combination(config.posterior, k)
        self.space = CommonSpace(k, k * self.n_aligned)
        self.translation = LatentTranslation(k, config.latent)
        self.decoders = nn.ModuleList(
            Decoder(
                spec.likelihood, spec.n_features, n_batches, config.latent, config.decoder, levels
            )
            for spec in specs.values()
        )
        self.discriminator = Discriminator(k, self.n_aligned, config.discriminator)
        self.scale = LearnedTemperature()
        self.thinning = {name: spec.thinning for name, spec in specs.items() if spec.thinning}
        self.features_per_step = {name: spec.features_per_step for name, spec in specs.items()}

    @property
    def private_scale(self) -> float:
        """The factor by which embeddings show private dimensions smaller."""
        return PRIVATE_SCALE_IN_SPACE if self.space.is_fitted else PRIVATE_SCALE

    @property
    def knows_batches(self) -> bool:
        """Whether decoders ask for the biological batch, as there are several."""
        return any(self.get_decoder(name).batch is not None for name in self.modalities)

    @property
    def batch_told(self) -> Tensor:
        """How far each modality tells the biological batch, (K,)."""
        return torch.cat([self.get_trunk(name).batch_told for name in self.modalities])

    def get_trunk(self, name: str) -> Trunk:
        """The trunk of a modality."""
        return cast(Trunk, self.trunks[self.modalities.index(name)])

    def get_decoder(self, name: str) -> Decoder:
        """The decoder of a modality."""
        return cast(Decoder, self.decoders[self.modalities.index(name)])

    def encode_batch(self, batch: Batch, noise: Noise | None = None) -> Posterior:
        """Infer every expert's Gaussian and the joint one.

        Experts of a modality that a cell lacks hold values that nobody may use.
        """
        return self._infer_posterior(batch, self._compute_components(batch), noise)

    def forward(
        self,
        batch: Batch,
        noise: Noise,
        decode_self: bool = True,
        decode_cross: bool = True,
        mixup: bool = False,
    ) -> CLUEOutput:
        """Encode, sample, decode twice, discriminate.

        Args:
            batch: B cells.
            noise: all random draws of the step.
            decode_self: whether `ln_self` is wanted; else it is 0.
            decode_cross: whether `ln_cross` is wanted; else it is 0.
            mixup: whether InfoNCE is to compare mixtures of paired cells instead of the cells.
        """
        shown = self._hide_entries(batch, noise) if self.training and self.thinning else batch
        components = self._compute_components(shown)
        posterior = self._infer_posterior(batch, components, noise)
        contrast, contrast_code = posterior.mean, batch.batch_code
        if mixup:
            contrast, contrast_code = self._encode_mixtures(batch, components, noise)
        z = sample_posterior(
            posterior.mean, posterior.log_var, noise.draw_normal(*posterior.mean.shape[1:])
        )
        joint = sample_posterior(
            posterior.joint_mean,
            posterior.joint_log_var,
            noise.draw_normal(*posterior.joint_mean.shape[1:]),
        )
        sources = [select_own_latent(z)] * decode_self + [joint] * decode_cross
        decoded = iter(self._score_profiles(batch, sources, noise))
        zeros = z.new_zeros(batch.n_cells, len(self.modalities))
        ln_self = next(decoded) if decode_self else zeros
        ln_cross = next(decoded) if decode_cross else zeros
        z, contrast = z[..., : self.n_aligned], contrast[..., : self.n_aligned]
        logits = self.discriminator(reverse_gradient(z.flatten(2)), noise)
        return CLUEOutput(
            posterior,
            z,
            ln_self,
            ln_cross,
            logits,
            self._split_members(contrast),
            contrast_code,
            self.scale(),
        )

    @torch.no_grad()
    def embed_batch(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """Where cells lie in the space of all modalities.

        Aligned dimensions hold the coordinates of the common space, of length 1, of which the last
        is a constant, and 0 beyond them; without a fitted space, as with one modality, they hold
        posterior means of the aligned z.
        Private dimensions hold posterior means, scaled by `private_scale`, and 0 where their
        modality was not read.

        Returns:
            z from everything observed, (B, K * d), and z from each modality alone, (n, K * d), with
            the rows of `batch.modalities[name].rows`.
        """
        return self.read_latents(batch, self.encode_batch(batch))

    def read_latents(self, batch: Batch, posterior: Posterior) -> tuple[Tensor, dict[str, Tensor]]:
        """Read off a batch's posterior what `embed_batch` gives."""
        a, k = self.n_aligned, len(self.modalities)
        experts, joint = posterior.mean[..., :a], posterior.joint_mean[..., :a]
        if self.space.is_fitted:
            experts, joint = self._place_in_space(batch, posterior)
        private_scale = self.private_scale
        private = private_scale * posterior.joint_mean[..., a:]
        alone = {}
        for source, name in enumerate(self.modalities):
            if name in batch.modalities:
                rows = batch.modalities[name].rows
                private_of_source = private[rows].new_zeros(len(rows), k, self.n_private)
                private_of_source[:, source] = (
                    private_scale * posterior.mean[rows, source, source, a:]
                )
                alone[name] = torch.cat([experts[rows, source], private_of_source], -1).flatten(1)
        return torch.cat([joint, private], -1).flatten(1), alone

    @torch.no_grad()
    def embed_batch_with_variance(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor], Tensor]:
        """Embed as `embed_batch` does, and say how sure the joint z is.

        Returns:
            What `embed_batch` returns, and the posterior variance of each dimension of the joint z
            as it is shown, (B, K * d): of the aligned ones in the common space, to first order, and
            0 beyond its directions; of a private dimension whose modality was not read, the
            prior's.
        """
        posterior = self.encode_batch(batch)
        a = self.n_aligned
        aligned, private = posterior.joint_log_var.exp().split([a, self.n_private], -1)
        if self.space.is_fitted:
            coordinates, variance = self.space.project_experts(
                posterior.mean[..., :a].flatten(2), posterior.log_var[..., :a].flatten(2)
            )
            of_joint = self.space.estimate_variance(coordinates, variance, batch.observed)
            k = len(self.modalities)
            aligned = F.pad(of_joint, (0, k * a - of_joint.shape[-1])).unflatten(-1, (k, a))
        shown = torch.cat([aligned, private * self.private_scale**2], -1).flatten(1)
        return *self.read_latents(batch, posterior), shown

    def _place_in_space(self, batch: Batch, posterior: Posterior) -> tuple[Tensor, Tensor]:
        """Coordinates in the common space, with 0 beyond its directions.

        Returns:
            Of each modality alone, (B, K source, K, a), and of everything observed, (B, K, a).
        """
        a, k = self.n_aligned, len(self.modalities)
        coordinates, variance = self.space.project_experts(
            posterior.mean[..., :a].flatten(2), posterior.log_var[..., :a].flatten(2)
        )
        joint = self.space.join_experts(coordinates, variance, batch.observed)
        padding = 0, k * a - joint.shape[-1]
        return (
            F.pad(self.space.weigh_directions(coordinates), padding).unflatten(-1, (k, a)),
            F.pad(self.space.weigh_directions(joint), padding).unflatten(-1, (k, a)),
        )

    def _compute_components(self, batch: Batch) -> dict[str, Tensor]:
        """The sparse first step of each trunk, done once: (n, components) by modality."""
        return {
            name: self.get_trunk(name).compute_components(observed.counts)
            for name, observed in batch.modalities.items()
        }

    def _hide_entries(self, batch: Batch, noise: Noise) -> Batch:
        """Hide entries of the modalities that are thinned. Decoders still score whole profiles."""
        key, shown = noise.draw_keys(), dict(batch.modalities)
        for name, most in self.thinning.items():
            if name in shown:
                observed = shown[name]
                counts = hide_entries(observed.counts, most, key[observed.rows])
                shown[name] = replace(observed, counts=counts)
        return replace(batch, modalities=shown)

    def _infer_posterior(
        self, batch: Batch, components: dict[str, Tensor], noise: Noise | None
    ) -> Posterior:
        """Combine the experts in aligned dimensions; take private ones from the own modality."""
        rows = {name: batch.modalities[name].rows for name in components}
        mean, log_var = self._encode_components(batch, components, rows, noise)
        a, seen = self.n_aligned, batch.observed[:, :, None]
        joint_mean, joint_log_var = self.combine(mean[..., :a], log_var[..., :a], batch.observed)
        # Where a modality is not seen this leaves 0, the prior's mean and log-variance.
        joint_mean = torch.cat([joint_mean, select_own_latent(mean)[..., a:] * seen], -1)
        joint_log_var = torch.cat([joint_log_var, select_own_latent(log_var)[..., a:] * seen], -1)
        return Posterior(mean, log_var, joint_mean, joint_log_var)

    def _encode_mixtures(
        self, batch: Batch, components: dict[str, Tensor], noise: Noise
    ) -> tuple[Tensor, Tensor]:
        """The experts' means for mixtures of paired cells (mixup, Zhang et al., 2018).

        Each paired cell is mixed with a partner of its stratum and lane, by the same share in all
        of its modalities: a new true pair. A cell stays as it is where its partner is itself, as
        each is in a stratum that has one round of the batch. Rows of unpaired cells hold values
        that nobody may use.

        Returns:
            Means, (B, K source, K target, d), and biological batches, (B,): of the cell that has
            the larger share.
        """
        partner, share = noise.draw_mixing()
        code = torch.where(share[:, 0] < 0.5, batch.batch_code[partner], batch.batch_code)
        mixed, rows = {}, {}
        for name, observed in batch.modalities.items():
            x, rows[name] = components[name], observed.rows[observed.paired]
            index_of_row = partner.new_zeros(batch.n_cells).index_copy(
                0, observed.rows, torch.arange(len(x), device=x.device)
            )
            cell_share = share[rows[name]].to(x.dtype)
            partner_x = x[index_of_row[partner[rows[name]]]]
            mixed[name] = cell_share * x[observed.paired] + (1 - cell_share) * partner_x
        mean, _ = self._encode_components(batch, mixed, rows, noise)
        return mean, code

    def _encode_components(
        self,
        batch: Batch,
        components: dict[str, Tensor],
        rows: dict[str, Tensor],
        noise: Noise | None,
    ) -> tuple[Tensor, Tensor]:
        """Mean and log-variance of the experts q(z_j | x_k), each (B, K source, K target, d).

        They are 0 where a modality has no components of a cell.

        Args:
            batch: B cells.
            components: by modality, (n, components), of the cells `rows`.
            rows: by modality, (n,), rows in the batch.
            noise: for dropout, in training.
        """
        k = len(self.modalities)
        absent = torch.zeros(batch.n_cells, k, self.latent, device=batch.observed.device)
        mean, log_var = [absent] * k, [absent] * k
        for source, name in enumerate(self.modalities):
            if name in components:
                h = self.get_trunk(name)(components[name], noise, rows[name])
                experts = self.heads(source, h)
                mean[source], log_var[source] = (
                    absent.index_copy(0, rows[name], values) for values in experts
                )
        return torch.stack(mean, 1), torch.stack(log_var, 1)

    def _split_members(self, z: Tensor) -> Tensor:
        """(B, K source, K target, a) -> (M, B, K source, K * a / M)."""
        return z.unflatten(-1, (-1, self.members)).movedim(-1, 0).flatten(3)

    def _score_profiles(self, batch: Batch, sources: list[Tensor], noise: Noise) -> list[Tensor]:
        """ln p(x_k | z_k) where x_k is observed, else 0: (B, K) for each z (B, K, d) of sources."""
        ln_p = []  # by modality, (sources, B)
        for k, name in enumerate(self.modalities):
            zeros = batch.observed.new_zeros(len(sources), batch.n_cells, dtype=torch.float32)
            if name in batch.modalities and sources:
                observed, decoder = batch.modalities[name], self.get_decoder(name)
                rows, subset = observed.rows, self.features_per_step[name]
                features = noise.draw_subset(subset, decoder.n_features) if subset else None
                z, code = torch.stack([z[rows, k] for z in sources]), batch.batch_code[rows]
                scores = decoder(z, code, observed.counts, noise, rows, features)
                zeros = zeros.index_copy(1, rows, scores)
            ln_p.append(zeros)
        return list(torch.stack(ln_p, -1))


def build_model(
    specs: dict[str, ModalitySpec], batches: BatchVocabulary, config: ModelConfig
) -> CLUE:
    """Build the model for the modalities and batches of a store, or of a model card."""
    levels = torch.from_numpy(batches.encode_levels(batches)) if batches.has_several else None
    return CLUE(specs, len(batches.names), config, levels)
