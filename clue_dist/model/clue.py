"""CLUE: trunk -> K x K heads -> posterior -> decoders, for batches whose cells lack modalities.

Shapes: B cells, K modalities, d dimensions of each z_k, a of them aligned, M members of a trunk.
"""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import replace
from typing import NamedTuple, cast

import torch
from torch import Tensor, nn

from clue_dist.config import ModelConfig
from clue_dist.data.batch import Batch
from clue_dist.model.decoders import Decoder
from clue_dist.model.discriminator import Discriminator
from clue_dist.model.layers import reverse_gradient
from clue_dist.model.modality_spec import ModalitySpec
from clue_dist.model.noise import Noise
from clue_dist.model.posterior import sample_posterior, select_own_latent
from clue_dist.model.posterior_encoder import Posterior, PosteriorEncoder
from clue_dist.model.thinning import DENSE, hide_entries
from clue_dist.store.batch_vocabulary import BatchVocabulary


class CLUEOutput(NamedTuple):
    """What one forward pass gives, for the losses of `clue_dist.losses.objective`."""

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


class CLUE(PosteriorEncoder):
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
        super().__init__(specs, config)
        self.decoders = nn.ModuleList(
            Decoder(
                spec.likelihood, spec.n_features, n_batches, config.latent, config.decoder, levels
            )
            for spec in specs.values()
        )
        self.discriminator = Discriminator(len(specs), self.n_aligned, config.discriminator)
        self.scale = LearnedTemperature()
        self.thinning = {name: spec.thinning for name, spec in specs.items() if spec.thinning}
        self.features_per_step = {name: spec.features_per_step for name, spec in specs.items()}

    @property
    def knows_batches(self) -> bool:
        """Whether decoders ask for the biological batch, as there are several."""
        return any(self.get_decoder(name).batch is not None for name in self.modalities)

    @property
    def batch_separation(self) -> Tensor:
        """How far each modality sets biological batches apart, (K,)."""
        return torch.cat([self.get_trunk(name).batch_separation for name in self.modalities])

    def get_decoder(self, name: str) -> Decoder:
        """The decoder of a modality."""
        return cast(Decoder, self.decoders[self.modalities.index(name)])

    def forward(
        self,
        batch: Batch,
        noise: Noise,
        decode_self: bool = True,
        decode_cross: bool = True,
        mixup: bool = False,
        mixed_precision: bool = False,
    ) -> CLUEOutput:
        """Encode, sample, decode twice, discriminate.

        Args:
            batch: B cells.
            noise: all random draws of the step.
            decode_self: whether `ln_self` is wanted; else it is 0.
            decode_cross: whether `ln_cross` is wanted; else it is 0.
            mixup: whether InfoNCE is to compare mixtures of paired cells instead of the cells.
            mixed_precision: whether networks multiply in bfloat16 (Micikevicius et al., 2018).
                Projections, which sum over thousands of features, and likelihoods stay in float32.
        """
        shown = self._hide_entries(batch, noise) if self.training and self.thinning else batch
        components = self._compute_components(shown)
        device = batch.observed.device.type
        with torch.autocast(device, torch.bfloat16) if mixed_precision else nullcontext():
            return self._run_networks(batch, components, noise, decode_self, decode_cross, mixup)

    def _run_networks(
        self,
        batch: Batch,
        components: dict[str, Tensor],
        noise: Noise,
        decode_self: bool,
        decode_cross: bool,
        mixup: bool,
    ) -> CLUEOutput:
        """What follows the projections; arguments are those of `forward`."""
        if mixup:
            posterior, contrast, contrast_code = self._infer_with_mixtures(batch, components, noise)
        else:
            posterior = self._infer_posterior(batch, components, noise)
            contrast, contrast_code = posterior.mean[..., : self.n_aligned], batch.batch_code
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
        z = z[..., : self.n_aligned]
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

    def _hide_entries(self, batch: Batch, noise: Noise) -> Batch:
        """Hide entries of sparse samples. Decoders still score whole profiles."""
        key, shown = noise.draw_keys(), dict(batch.modalities)
        for name, most in self.thinning.items():
            if name in shown:
                observed = shown[name]
                # A product, as to look at the density would wait for the device.
                share = most * (self.get_trunk(name).typical_density < DENSE)
                counts = hide_entries(observed.counts, share, key[observed.rows])
                shown[name] = replace(observed, profiles=counts)
        return replace(batch, modalities=shown)

    def _infer_with_mixtures(
        self, batch: Batch, components: dict[str, Tensor], noise: Noise
    ) -> tuple[Posterior, Tensor, Tensor]:
        """Infer the posterior of cells, and what experts say of mixtures of them, in one pass.

        A cell and its mixture have the same dropout.

        Returns:
            The posterior; the experts' aligned means for mixtures, (B, K source, K target, a), of
            which rows of unpaired cells hold values that nobody may use; and biological batches of
            the mixtures, (B,).
        """
        mixed, code = self._mix_pairs(batch, components, noise)
        rows, rows_of_pairs = {}, {}
        experts: dict[str, tuple[Tensor, ...]] = {}
        of_mixtures: dict[str, tuple[Tensor, ...]] = {}
        for name, x in components.items():
            observed = batch.modalities[name]
            rows[name], rows_of_pairs[name] = observed.rows, observed.rows[observed.paired]
            rows_of_both = torch.cat([rows[name], rows_of_pairs[name]])
            h = self.get_trunk(name)(torch.cat([x, mixed[name]]), noise, rows_of_both)
            source = self.modalities.index(name)
            *experts[name], mean = self.heads(source, *h, len(x), self.n_aligned)
            of_mixtures[name] = (mean,)
        posterior = self._combine_experts(
            batch, self.combine, *self._place_experts(batch, experts, rows)
        )
        (mean,) = self._place_experts(batch, of_mixtures, rows_of_pairs)
        return posterior, mean, code

    def _mix_pairs(
        self, batch: Batch, components: dict[str, Tensor], noise: Noise
    ) -> tuple[dict[str, Tensor], Tensor]:
        """Mix the components of paired cells (mixup, Zhang et al., 2018).

        Each paired cell is mixed with a partner of its stratum and lane, by the same share in all
        of its modalities: a new true pair. A cell stays as it is where its partner is itself, as
        each is in a stratum that has one round of the batch.

        Returns:
            By modality, (n paired, components); and biological batches, (B,): of the cell that has
            the larger share.
        """
        partner, share = noise.draw_mixing()
        code = torch.where(share[:, 0] < 0.5, batch.batch_code[partner], batch.batch_code)
        mixed = {}
        for name, observed in batch.modalities.items():
            x, rows = components[name], observed.rows[observed.paired]
            index_of_row = partner.new_zeros(batch.n_cells).index_copy(
                0, observed.rows, torch.arange(len(x), device=x.device)
            )
            cell_share = share[rows].to(x.dtype)
            partner_x = x[index_of_row[partner[rows]]]
            mixed[name] = cell_share * x[observed.paired] + (1 - cell_share) * partner_x
        return mixed, code

    def _split_members(self, z: Tensor) -> Tensor:
        """(B, K source, K target, a) -> (M, B, K source, K * a / M)."""
        return z.unflatten(-1, (-1, self.members)).movedim(-1, 0).flatten(3).contiguous()

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
