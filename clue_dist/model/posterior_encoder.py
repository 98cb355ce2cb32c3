"""Trunk -> K x K heads -> posterior, and where cells lie by it: all of CLUE that embedding needs.

Shapes: B cells, K modalities, d dimensions of each z_k, a of them aligned, M members of a trunk.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from clue_dist.config import ModelConfig
from clue_dist.data.batch import Batch
from clue_dist.model.common_space import CommonSpace
from clue_dist.model.encoders import CrossEncoderHeads
from clue_dist.model.modality_spec import ModalitySpec
from clue_dist.model.noise import Noise
from clue_dist.model.posterior import (
    Combination,
    choose_combination,
    select_own_latent,
    take_prior,
)
from clue_dist.model.translation import LatentTranslation
from clue_dist.model.trunk import Trunk

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


class PosteriorEncoder(nn.Module):
    """Infers z of cells from what was observed of them; `CLUE` adds what training needs.

    Args:
        specs: by name, in model order.
        config: sizes, and how experts are combined.
    """

    def __init__(self, specs: dict[str, ModalitySpec], config: ModelConfig) -> None:
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
        # "auto" is what runs have that are older than this setting.
        rank = 0 if config.head_rank == "auto" else config.head_rank
        self.heads = CrossEncoderHeads(
            k, self.members, config.trunk.hidden, config.latent, config.trunk.shared, rank
        )
        self.combine = choose_combination(config.posterior, k)
        self.space = CommonSpace(k, k * self.n_aligned)
        self.translation = LatentTranslation(k, config.latent)

    @property
    def private_scale(self) -> float:
        """The factor by which embeddings show private dimensions smaller."""
        return PRIVATE_SCALE_IN_SPACE if self.space.is_fitted else PRIVATE_SCALE

    def get_trunk(self, name: str) -> Trunk:
        """The trunk of a modality."""
        return cast(Trunk, self.trunks[self.modalities.index(name)])

    def encode_batch(self, batch: Batch, noise: Noise | None = None) -> Posterior:
        """Infer every expert's Gaussian and the joint one.

        Experts of a modality that a cell lacks hold values that nobody may use.
        """
        return self._infer_posterior(batch, self._compute_components(batch), noise)

    def infer_batch(self, batch: Batch, combine: Combination | None = None) -> Posterior:
        """Infer what `encode_batch` does, up to rounding and faster, outside of training.

        Args:
            batch: B cells.
            combine: how the joint z follows from the experts; by default as in training.
        """
        components = self._compute_components(batch)
        experts = {name: self._apply_folded_norms(name, x, True) for name, x in components.items()}
        rows = {name: batch.modalities[name].rows for name in components}
        combine = combine or self.combine
        return self._combine_experts(batch, combine, *self._place_experts(batch, experts, rows))

    @torch.no_grad()
    def embed_batch(
        self, batch: Batch, per_modality: bool = True
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Where cells lie in the space of all modalities.

        Aligned dimensions hold the coordinates of the common space, of length 1, of which the last
        is a constant, and 0 beyond them; without a fitted space, as with one modality, they hold
        posterior means of the aligned z. The space weighs directions otherwise in z from
        everything observed than in z from each modality alone, also of a cell with one modality.
        Private dimensions hold posterior means, scaled by `private_scale`, and 0 where their
        modality was not read.

        Args:
            batch: B cells.
            per_modality: whether z from each modality alone is wanted, too.

        Returns:
            z from everything observed, (B, K * d), and z from each modality alone, (n, K * d), with
            the rows of `batch.modalities[name].rows`.
        """
        if len(batch.modalities) == 1:
            return self._embed_lone_modality(batch, per_modality, False)[:2]
        return self.read_latents(batch, self._infer_for_embedding(batch), per_modality)

    def _embed_lone_modality(
        self, batch: Batch, per_modality: bool, with_variance: bool
    ) -> tuple[Tensor, dict[str, Tensor], Tensor | None]:
        """Embed cells that share their only modality, which says all that is known of them.

        Nothing is combined, so that only what is asked for is computed.
        """
        [(name, components)] = self._compute_components(batch).items()
        source, rows = self.modalities.index(name), batch.modalities[name].rows
        mean, *log_var = self._apply_folded_norms(name, components, with_variance)
        aligned, private = mean.split([self.n_aligned, self.n_private], -1)
        private, coordinates = self._show_private(private, source), None
        if self.space.is_fitted:
            coordinates = self.space.project_expert(aligned.flatten(1), source)

        def show(weigh: Callable[[Tensor], Tensor]) -> Tensor:
            shown = aligned if coordinates is None else self._pad_coordinates(weigh(coordinates))
            return torch.cat([shown, private], -1).flatten(1)

        alone = {name: show(self.space.weigh_profiles)} if per_modality else {}
        variance = None
        if log_var:
            variance = self._show_lone_variance(mean, log_var[0], source, coordinates)
        joint = show(self.space.weigh_joint)
        empty = joint.new_full((batch.n_cells, joint.shape[1]), torch.nan)
        if variance is not None:
            variance = empty.index_copy(0, rows, variance)
        return empty.index_copy(0, rows, joint), alone, variance

    def _show_lone_variance(
        self, mean: Tensor, log_var: Tensor, source: int, coordinates: Tensor | None
    ) -> Tensor:
        """The variance of what is shown of cells with one modality, (n, K * d).

        Args:
            mean: (n, K target, d).
            log_var: of the same shape.
            source: the modality.
            coordinates: (n, R), in the common space, if it is fitted.
        """
        aligned, private = log_var.exp().split([self.n_aligned, self.n_private], -1)
        if coordinates is not None:
            spread = self.space.project_variance(
                mean[..., : self.n_aligned].flatten(1), aligned.flatten(1), source
            )
            aligned = self._pad_coordinates(self.space.carry_variance(coordinates, spread))
        shown = torch.ones_like(private)  # the prior's, of modalities that were not read
        shown[:, source] = private[:, source]
        return torch.cat([aligned, shown * self.private_scale**2], -1).flatten(1)

    def read_latents(
        self, batch: Batch, posterior: Posterior, per_modality: bool = True
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Read off a batch's posterior what `embed_batch` gives."""
        return self._show_latents(batch, posterior, self._project_experts(posterior), per_modality)

    def _show_latents(
        self,
        batch: Batch,
        posterior: Posterior,
        projected: tuple[Tensor, Tensor] | None,
        per_modality: bool,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Do as `read_latents` does, given what `_project_experts` gives."""
        a, joint = self.n_aligned, posterior.joint_mean[..., : self.n_aligned]
        if projected is not None:
            joint = self.space.join_experts(projected[0], batch.observed)
            joint = self._pad_coordinates(self.space.weigh_joint(joint))
        alone = {}
        for source, name in enumerate(self.modalities if per_modality else ()):
            if name in batch.modalities:
                rows = batch.modalities[name].rows
                aligned, private = posterior.mean[rows, source].split([a, self.n_private], -1)
                if projected is not None:
                    aligned = self.space.weigh_profiles(projected[0][rows, source])
                    aligned = self._pad_coordinates(aligned)
                shown = self._show_private(private, source)
                alone[name] = torch.cat([aligned, shown], -1).flatten(1)
        private = self.private_scale * posterior.joint_mean[..., a:]
        return torch.cat([joint, private], -1).flatten(1), alone

    @torch.no_grad()
    def embed_batch_with_variance(
        self, batch: Batch, per_modality: bool = True
    ) -> tuple[Tensor, dict[str, Tensor], Tensor]:
        """Embed as `embed_batch` does, and say how sure the joint z is.

        Returns:
            What `embed_batch` returns, and the posterior variance of each dimension of the joint z
            as it is shown, (B, K * d): of the aligned ones in the common space, to first order, and
            0 beyond its directions; of a private dimension whose modality was not read, the
            prior's.
        """
        if len(batch.modalities) == 1:
            joint, alone, variance = self._embed_lone_modality(batch, per_modality, True)
            assert variance is not None
            return joint, alone, variance
        posterior = self._infer_for_embedding(batch)
        a = self.n_aligned
        aligned, private = posterior.joint_log_var.exp().split([a, self.n_private], -1)
        projected = self._project_experts(posterior)
        if projected is not None:
            spread = self.space.estimate_variance(*projected, batch.observed)
            aligned = self._pad_coordinates(spread)
        shown = torch.cat([aligned, private * self.private_scale**2], -1).flatten(1)
        return *self._show_latents(batch, posterior, projected, per_modality), shown

    def _project_experts(self, posterior: Posterior) -> tuple[Tensor, Tensor] | None:
        """Coordinates of the experts and their variances, (B, K source, R) each.

        None where no common space is fitted.
        """
        if not self.space.is_fitted:
            return None
        aligned = (values[..., : self.n_aligned].flatten(2) for values in posterior[:2])
        return self.space.project_experts(*aligned)

    def _show_private(self, private: Tensor, source: int) -> Tensor:
        """Private dimensions (n, K, .) as shown where one modality was read: small, others 0."""
        shown = torch.zeros_like(private)
        shown[:, source] = self.private_scale * private[:, source]
        return shown

    def reweigh_as_joint(self, alone: Tensor) -> Tensor:
        """Make z of a cell with one modality of z from that modality alone, (n, K * d) each.

        `embed_batch` makes the same from counts.
        """
        if not self.space.is_fitted:
            return alone
        aligned, private = alone.unflatten(1, (len(self.modalities), -1)).split(
            [self.n_aligned, self.n_private], -1
        )
        coordinates = aligned.flatten(1)[:, : len(self.space.weight)]
        aligned = self._pad_coordinates(self.space.reweigh_as_joint(coordinates))
        return torch.cat([aligned, private], -1).flatten(1)

    def _pad_coordinates(self, coordinates: Tensor) -> Tensor:
        """Coordinates as embeddings show them, (..., R) -> (..., K, a), 0 beyond the directions."""
        k, a = len(self.modalities), self.n_aligned
        return F.pad(coordinates, (0, k * a - coordinates.shape[-1])).unflatten(-1, (k, a))

    def _compute_components(self, batch: Batch) -> dict[str, Tensor]:
        """The sparse first step of each trunk, done once: (n, components) by modality."""
        return {
            name: self.get_trunk(name).compute_components(observed.counts)
            for name, observed in batch.modalities.items()
        }

    def _infer_posterior(
        self, batch: Batch, components: dict[str, Tensor], noise: Noise | None
    ) -> Posterior:
        """Infer the posterior of cells, given the first step of each trunk."""
        rows = {name: batch.modalities[name].rows for name in components}
        experts = {}
        for name, x in components.items():
            h = self.get_trunk(name)(x, noise, rows[name])
            experts[name] = self.heads(self.modalities.index(name), *h)
        return self._combine_experts(
            batch, self.combine, *self._place_experts(batch, experts, rows)
        )

    def _infer_for_embedding(self, batch: Batch) -> Posterior:
        """Infer what an embedding shows, outside of training.

        The common space, if fitted, joins aligned dimensions: in their place stands the prior.
        """
        return self.infer_batch(batch, take_prior if self.space.is_fitted else self.combine)

    def _apply_folded_norms(
        self, name: str, components: Tensor, with_variance: bool
    ) -> tuple[Tensor, ...]:
        """Mean and, where wanted, log-variance of a modality's experts, (n, K target, d) each.

        Layer norms of the trunk go into the weights behind them. ZeRO-3 would not gather these.
        """
        weights = self.heads.select_weights(self.modalities.index(name), with_variance)
        return self.heads.arrange_outputs(self.get_trunk(name).infer_linear(components, *weights))

    def _combine_experts(
        self, batch: Batch, combine: Combination, mean: Tensor, log_var: Tensor
    ) -> Posterior:
        """Combine the experts (B, K source, K target, d) in aligned dimensions.

        Private ones are taken from the own modality.
        """
        a, seen = self.n_aligned, batch.observed[:, :, None]
        joint_mean, joint_log_var = combine(mean[..., :a], log_var[..., :a], batch.observed)
        # Where a modality is not seen this leaves 0, the prior's mean and log-variance.
        joint_mean = torch.cat([joint_mean, select_own_latent(mean)[..., a:] * seen], -1)
        joint_log_var = torch.cat([joint_log_var, select_own_latent(log_var)[..., a:] * seen], -1)
        return Posterior(mean, log_var, joint_mean, joint_log_var)

    def _place_experts(
        self, batch: Batch, experts: dict[str, tuple[Tensor, ...]], rows: dict[str, Tensor]
    ) -> list[Tensor]:
        """What each modality says of its n cells, (n, ...), at their rows: (B, K source, ...).

        It is 0 where a modality says nothing of a cell.
        """
        placed = []
        for values in zip(*experts.values(), strict=True):
            absent = values[0].new_zeros(batch.n_cells, *values[0].shape[1:])
            of_source = [absent] * len(self.modalities)
            for name, said in zip(experts, values, strict=True):
                of_source[self.modalities.index(name)] = absent.index_copy(0, rows[name], said)
            placed.append(torch.stack(of_source, 1))
        return placed
