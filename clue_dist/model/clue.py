"""CLUE: trunk -> K x K heads -> posterior -> decoders, for batches in which cells lack modalities."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, NamedTuple, cast

import torch
from torch import Tensor, nn

from clue_dist.config import Config, ModelConfig
from clue_dist.data.batch import Batch
from clue_dist.errors import ConfigError
from clue_dist.kinds import KINDS
from clue_dist.model.decoders import Decoder
from clue_dist.model.discriminator import Discriminator
from clue_dist.model.encoders import CrossEncoderHeads
from clue_dist.model.layers import reverse_gradient
from clue_dist.model.likelihoods import LIKELIHOODS
from clue_dist.model.noise import Noise
from clue_dist.model.posterior import choose_combination, sample_posterior, select_own_latent
from clue_dist.model.trunk import Trunk
from clue_dist.store.manifest import Modality

# Embeddings shrink private dimensions to this: a linear probe still reads them, and neighbours follow from what
# modalities share.
PRIVATE_SCALE = 0.2


@dataclass(frozen=True)
class ModalitySpec:
    """What the model needs to know of one modality."""

    n_features: int
    normalise: str
    likelihood: str
    features_per_step: int | None


class Posterior(NamedTuple):
    """Gaussians over the full z. mean, log_var: (B, K source, K target, d) of the experts q(z_j | x_k); joint_mean,
    joint_log_var: (B, K target, d) of q(z | everything observed), as `model.posterior` combines them. The last, private
    dimensions of z_j follow from x_j alone: what other experts say there is not used, the prior stands for it."""

    mean: Tensor
    log_var: Tensor
    joint_mean: Tensor
    joint_log_var: Tensor


class CLUEOutput(NamedTuple):
    """One forward pass. posterior; z: (B, K source, K target, a) samples of the experts; ln_self, ln_cross: (B, K)
    ln p(x_k | z_k) with z_k from x_k alone (eq. 5) and from everything observed (eq. 8), zero where x_k is not
    observed; logits: (B, K source, K) of the discriminator; contrast: (M, B, K source, K * a / M) the experts' means
    that InfoNCE compares, one set a member; log_scale: () inverse temperature of the contrast. a: the dimensions of
    each z_k that are aligned, all but the private ones."""

    posterior: Posterior
    z: Tensor
    ln_self: Tensor
    ln_cross: Tensor
    logits: Tensor
    contrast: Tensor
    log_scale: Tensor


class LearnedTemperature(nn.Module):
    """A learnt inverse temperature, kept as its log."""

    def __init__(self) -> None:
        super().__init__()
        self.log = nn.Parameter(torch.tensor([2.5]))

    def forward(self) -> Tensor:
        return self.log.float().clamp(max=4.6)[0]


class CLUE(nn.Module):
    """The model for K modalities, K >= 1, in the order of `specs`."""

    def __init__(self, specs: dict[str, ModalitySpec], n_batches: int, config: ModelConfig) -> None:
        super().__init__()
        self.modalities, self.latent = list(specs), config.latent
        k = len(specs)
        # Lists, not dicts by name: torch has attributes of its own, and a modality may be called like one.
        self.trunks = nn.ModuleList(
            Trunk(s.n_features, s.normalise, k, config.trunk) for s in specs.values()
        )
        self.members = config.trunk.members
        self.n_private = config.n_private if k > 1 else 0  # a single modality has nothing to align
        self.n_aligned = config.latent - self.n_private
        self.heads = CrossEncoderHeads(
            k, self.members, config.trunk.hidden, config.latent, config.trunk.shared
        )
        self.combine = choose_combination(config.posterior, k)
        self.decoders = nn.ModuleList(
            Decoder(s.likelihood, s.n_features, n_batches, config.latent, config.decoder)
            for s in specs.values()
        )
        self.discriminator = Discriminator(k, self.n_aligned, config.discriminator)
        self.scale = LearnedTemperature()
        self.features_per_step = {m: s.features_per_step for m, s in specs.items()}

    def get_trunk(self, name: str) -> Trunk:
        return cast(Trunk, self.trunks[self.modalities.index(name)])

    def get_decoder(self, name: str) -> Decoder:
        return cast(Decoder, self.decoders[self.modalities.index(name)])

    def encode_batch(self, batch: Batch, noise: Noise | None = None) -> Posterior:
        """Every expert's Gaussian and the joint one. Sources that a cell lacks hold values nobody may use."""
        return self._posterior(batch, self._components(batch), noise)

    def forward(
        self,
        batch: Batch,
        noise: Noise,
        decode_self: bool = True,
        decode_cross: bool = True,
        mixup: Literal["none", "any", "within_batch"] = "none",
    ) -> CLUEOutput:
        """Encode, sample, decode twice, discriminate. See `Output`; what is not decoded has ln p = 0.

        mixup: the contrast is between mixtures of paired cells, "any" or of the same biological batch, instead of the
        cells themselves.
        """
        components = self._components(batch)
        posterior = self._posterior(batch, components, noise)
        contrast = (
            posterior.mean
            if mixup == "none"
            else self._mixed(batch, components, noise, mixup == "within_batch")
        )
        z = sample_posterior(
            posterior.mean, posterior.log_var, noise.draw_normal(*posterior.mean.shape[1:])
        )
        joint = sample_posterior(
            posterior.joint_mean,
            posterior.joint_log_var,
            noise.draw_normal(*posterior.joint_mean.shape[1:]),
        )
        nothing = z.new_zeros(batch.n_cells, len(self.modalities))
        decoded = iter(
            self._decode(
                batch, [select_own_latent(z)] * decode_self + [joint] * decode_cross, noise
            )
        )
        ln_self, ln_cross = (
            next(decoded) if wanted else nothing for wanted in (decode_self, decode_cross)
        )
        z, contrast = z[..., : self.n_aligned], contrast[..., : self.n_aligned]
        logits = self.discriminator(reverse_gradient(z.flatten(2)), noise)
        return CLUEOutput(
            posterior, z, ln_self, ln_cross, logits, self._by_member(contrast), self.scale()
        )

    @torch.no_grad()
    def embed_batch(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """Posterior means of the full z: (B, K * d) from everything observed, and from each modality alone
        (n, K * d), rows as in `batch.modalities[m].rows`. Private dimensions are scaled by PRIVATE_SCALE, and zero
        where their modality was not looked at."""
        posterior = self.encode_batch(batch)
        scale = posterior.mean.new_ones(self.latent)
        scale[self.n_aligned :] = PRIVATE_SCALE
        alone = {}
        for m, o in batch.modalities.items():
            k = self.modalities.index(m)
            z = posterior.mean[o.rows, k] * scale  # (n, K, d)
            z[:, [j for j in range(len(self.modalities)) if j != k], self.n_aligned :] = 0
            alone[m] = z.flatten(1)
        return (posterior.joint_mean * scale).flatten(1), alone

    def _components(self, batch: Batch) -> dict[str, Tensor]:
        """The sparse first step of each trunk, done once: (n, components) by modality."""
        return {
            m: self.get_trunk(m).compute_components(o.counts) for m, o in batch.modalities.items()
        }

    def _posterior(
        self, batch: Batch, components: dict[str, Tensor], noise: Noise | None
    ) -> Posterior:
        rows = {m: batch.modalities[m].rows for m in components}
        mean, log_var = self._experts(batch, components, rows, noise)
        a, seen = self.n_aligned, batch.observed[:, :, None]
        joint_mean, joint_log_var = self.combine(mean[..., :a], log_var[..., :a], batch.observed)
        # Zeros are the prior's mean and log-variance.
        joint_mean = torch.cat([joint_mean, select_own_latent(mean)[..., a:] * seen], -1)
        joint_log_var = torch.cat([joint_log_var, select_own_latent(log_var)[..., a:] * seen], -1)
        return Posterior(mean, log_var, joint_mean, joint_log_var)

    def _mixed(
        self, batch: Batch, components: dict[str, Tensor], noise: Noise, within_batch: bool
    ) -> Tensor:
        """Means of the experts for mixtures of paired cells (Zhang et al., mixup, 2018): (B, K source, K target, d).

        Each paired cell is mixed with a partner of its stratum and lane, by the same share in all of its modalities: a
        new true pair. With itself, or with a cell of another biological batch if `within_batch`, it stays as it is.
        Rows of unpaired cells hold values nobody may use.
        """
        partner, share = noise.draw_mixing()
        if within_batch:
            share = share.masked_fill((batch.batch_code != batch.batch_code[partner])[:, None], 1.0)
        mixed, rows = {}, {}
        for m, observed in batch.modalities.items():
            x, rows[m] = components[m], observed.rows[observed.paired]
            place = partner.new_zeros(batch.n_cells).index_copy(
                0, observed.rows, torch.arange(len(x), device=x.device)
            )
            own_share, other = share[rows[m]].to(x.dtype), x[place[partner[rows[m]]]]
            mixed[m] = own_share * x[observed.paired] + (1 - own_share) * other
        mean, _ = self._experts(batch, mixed, rows, noise)
        return mean

    def _experts(
        self,
        batch: Batch,
        components: dict[str, Tensor],
        rows: dict[str, Tensor],
        noise: Noise | None,
    ) -> tuple[Tensor, Tensor]:
        """Mean and log-variance (B, K source, K target, d) of q(z_j | x_k), from components of the cells `rows`."""
        h = []
        for name in self.modalities:
            trunk, weight = self.get_trunk(name), self.heads.weight
            shape = (trunk.ensemble.members, batch.n_cells, trunk.width)
            absent = torch.zeros(shape, dtype=weight.dtype, device=batch.observed.device)
            known = name in components
            h.append(
                absent.index_copy(1, rows[name], trunk(components[name], noise, rows[name]))
                if known
                else absent
            )
        mean, log_var = self.heads(torch.stack(h))
        return mean, log_var

    def _by_member(self, z: Tensor) -> Tensor:
        """(B, K source, K target, a) -> (M, B, K source, K * a / M)."""
        return z.unflatten(-1, (-1, self.members)).movedim(-1, 0).flatten(3)

    def _decode(self, batch: Batch, sources: list[Tensor], noise: Noise) -> list[Tensor]:
        """ln p(x_k | z_k) where x_k is observed, else 0: (B, K) for each z (B, K, d) in `sources`."""
        out: list[list[Tensor]] = [[] for _ in sources]
        for k, name in enumerate(self.modalities):
            nothing = batch.observed.new_zeros(batch.n_cells, dtype=torch.float32)
            if name not in batch.modalities:
                for columns in out:
                    columns.append(nothing)
                continue
            observed, decoder, wanted = (
                batch.modalities[name],
                self.get_decoder(name),
                self.features_per_step[name],
            )
            rows = observed.rows
            features = noise.draw_subset(wanted, decoder.n_features) if wanted else None
            for columns, z in zip(out, sources, strict=True):
                ln_p = decoder(
                    z[rows, k], batch.batch_code[rows], observed.counts, noise, rows, features
                )
                columns.append(nothing.index_copy(0, rows, ln_p))
        return [torch.stack(columns, 1) for columns in out]


# A decoder scores at most this many features a step unless told otherwise; the estimate stays unbiased.
AUTO_FEATURES = 4096


def specify_modalities(modalities: dict[str, Modality], config: Config) -> dict[str, ModalitySpec]:
    """Defaults of each modality's kind, overridden by the config.

    Raises:
        ConfigError: the config names a modality that the store lacks, or asks for CLR on a sparse modality.
    """
    unknown = [m for m in config.modalities if m not in modalities]
    if unknown:
        raise ConfigError(
            "the config names a modality that the store lacks",
            where="modalities",
            got=unknown,
            expected=list(modalities),
        )
    out = {}
    for name, m in modalities.items():
        own, kind = config.modalities.get(name), KINDS[m.kind]
        how = kind.normalise if own is None or own.normalise == "auto" else own.normalise
        likelihood = kind.likelihood if own is None or own.likelihood == "auto" else own.likelihood
        if how == "clr" and m.storage == "sparse":
            dense_kinds = [k for k, row in KINDS.items() if row.storage == "dense"]
            raise ConfigError(
                f"clr needs a modality that is stored dense (kinds {' and '.join(dense_kinds)})",
                where=f"modalities.{name}.normalise",
            )
        real_values = LIKELIHOODS[likelihood].takes_real_values and how == kind.normalise
        if kind.real_values and not real_values:
            raise ConfigError(
                f"a modality of kind {kind.name} holds real values, not counts",
                where=f"modalities.{name}",
                got=f"likelihood {likelihood}, normalise {how}",
                expected=f"{kind.likelihood} and {kind.normalise}",
                fix="convert it again with --kind if it does hold counts",
            )
        wanted = config.model.decoder.features_per_step
        limit = AUTO_FEATURES if wanted == "auto" else wanted
        out[name] = ModalitySpec(
            m.n_features, how, likelihood, limit if limit < m.n_features else None
        )
    return out
