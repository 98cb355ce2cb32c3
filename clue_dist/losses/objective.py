"""The losses of eq. 13 to 15 by the paper's names, and InfoNCE beyond the paper.

Shapes: B cells, K modalities, a aligned dimensions of each z_k. Every mean runs over a number of
cells that is the same on each rank, so that the mean of the ranks' gradients is the gradient of
the global batch's mean.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import combinations
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from clue_dist.config import ObjectiveConfig
from clue_dist.data.batch import Batch, find_pair_rows
from clue_dist.losses.info_nce import compute_info_nce
from clue_dist.model.clue import CLUE, CLUEOutput
from clue_dist.model.noise import Noise
from clue_dist.model.posterior import compute_information, compute_kl_to_prior
from clue_dist.model.posterior_encoder import Posterior

Result = TypeVar("Result")

# Held-out cells among which InfoNCE looks for a cell's partner: about as many as in a batch, as
# the time grows with their square.
MOST_CONTRASTED = 500


def compute_elbo_self(output: CLUEOutput, observed: Tensor, weight: Tensor, beta: float) -> Tensor:
    """Eq. 5 of each cell: the sum over observed k of E ln p(x_k | z_k) - KL(q(z_k | x_k) || p).

    Args:
        output: output of the model.
        observed: (B, K) bool.
        weight: (K,), of each modality.
        beta: factor on the KL.

    Returns:
        (B,), in nats.
    """
    return (split_elbo_self(output, beta) * weight * observed).sum(1)


def split_elbo_self(output: CLUEOutput, beta: float) -> Tensor:
    """What each modality adds to eq. 5, (B, K); it means nothing where one is not observed."""
    information = compute_information(output.posterior.mean, output.posterior.log_var)
    return output.ln_self - beta * information


def compute_elbo_cross(output: CLUEOutput, observed: Tensor, weight: Tensor, beta: float) -> Tensor:
    """Eq. 8 of each cell: reconstructions of observed k, and the joint posterior's KL of every k.

    Arguments and result are those of `compute_elbo_self`.
    """
    return (split_elbo_cross(output, observed, beta) * weight).sum(1)


def split_elbo_cross(output: CLUEOutput, observed: Tensor, beta: float) -> Tensor:
    """What each modality adds to eq. 8, (B, K); one that is not observed adds its KL alone."""
    posterior = output.posterior
    kl = compute_kl_to_prior(posterior.joint_mean, posterior.joint_log_var)
    return output.ln_cross * observed - beta * kl


def compute_alignment(z: Tensor, observed: Tensor, cosine: bool = False) -> Tensor:
    """Eq. 9 to 11: the mean squared distance of a cell's z's to their centre.

    Args:
        z: (B, K source, K * a), samples of the aligned dimensions.
        observed: (B, K) bool.
        cosine: whether each z is scaled to length 1 first, as the authors' code does.

    Returns:
        The mean over cells with two or more modalities, ().
    """
    if cosine:
        z = F.normalize(z, dim=-1)
    mask = observed[:, :, None].to(z.dtype)
    n_sources = mask.sum(1)  # (B, 1)
    centre = (z * mask).sum(1) / n_sources.clamp_min(1)
    squared = ((z - centre[:, None]) ** 2 * mask).sum((1, 2)) / n_sources[:, 0].clamp_min(1)
    paired = n_sources[:, 0] > 1
    return (squared * paired).sum() / paired.sum().clamp_min(1)


def score_discriminator(logits: Tensor, observed: Tensor) -> Tensor:
    """Eq. 12: the mean over cells of the mean over observed k of ln q(k | z).

    Args:
        logits: (B, K source, K).
        observed: (B, K) bool.
    """
    ln_q = torch.diagonal(logits.log_softmax(-1), dim1=1, dim2=2)  # (B, K source)
    per_cell = (ln_q * observed).sum(1) / observed.sum(1).clamp_min(1)
    return per_cell.mean()


class HeldOutScores(NamedTuple):
    """What cells that training does not see say of the model."""

    posterior: Posterior  # of which `CLUE.read_latents` makes z, once the common space is fitted
    minus_elbo: Tensor  # (B,), minus both ELBOs of each cell, by their weights in the loss
    # Minus the ELBOs and the discriminator's log-probability by modality ("self/rna", "d/rna"),
    # means over the cells that have it; distance of z and InfoNCE by pair of modalities
    # ("mse/rna-adt", "contrastive/rna-adt"), () each; no weight of the loss enters.
    terms: dict[str, Tensor]


class EncodedCells(NamedTuple):
    """What each modality says of the aligned z, for the common space."""

    mean: Tensor  # (B, K source, K * a), posterior means
    nats: Tensor  # (B, K), that a modality tells of its own z_k
    observed: Tensor  # (B, K) bool
    batch_code: Tensor  # (B,), the biological batch; -1: unknown

    @classmethod
    def select_aligned(cls, posterior: Posterior, batch: Batch, n_aligned: int) -> EncodedCells:
        """Select what concerns the a aligned dimensions of a batch's posterior."""
        mean, log_var = posterior.mean[..., :n_aligned], posterior.log_var[..., :n_aligned]
        nats = compute_information(mean, log_var)
        return cls(mean.flatten(2), nats, batch.observed, batch.batch_code)

    @property
    def is_finite(self) -> bool:
        """Whether no value is NaN or infinite where a modality is observed."""
        used = self.mean[self.observed], self.nats[self.observed]
        return all(bool(values.isfinite().all()) for values in used)

    def to_cpu(self) -> EncodedCells:
        """The same on the CPU."""
        return EncodedCells(*(values.cpu() for values in self))


class Objective(nn.Module):
    """The model and its training loss (eq. 15) as one module.

    Args:
        model: to be trained.
        config: weights of the terms.
        modality_weights: weight of each modality in both ELBOs, in model order.
        mixed_precision: whether networks multiply in bfloat16 for the loss. Held-out cells are
            scored in float32, as they are embedded.
    """

    def __init__(
        self,
        model: CLUE,
        config: ObjectiveConfig,
        modality_weights: list[float],
        mixed_precision: bool = False,
    ) -> None:
        super().__init__()
        self.model, self.config, self.mixed_precision = model, config, mixed_precision
        sizes = [
            model.get_decoder(name).n_features if config.per_feature else 1
            for name in model.modalities
        ]
        self.weights = [weight / size for weight, size in zip(modality_weights, sizes, strict=True)]
        self._weights_on_device = torch.tensor(self.weights)

    def forward(self, compute: Callable[[Objective], Result]) -> Result:
        """Compute something of this module.

        DeepSpeed's engine calls nothing but `forward`, and ZeRO-3 gathers parameters in the
        engine's calls alone. So whatever needs the model while it is trained is computed in here,
        as by `engine(lambda objective: objective.compute_loss(batch, noise))`.
        """
        return compute(self)

    def compute_loss(
        self, batch: Batch, noise: Noise, beta: float = 1.0
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Compute the loss of a micro-batch, and its terms without their weights, () each.

        Args:
            batch: B cells.
            noise: all random draws of the step.
            beta: factor on `lambda_kl`, for a warm-up.
        """
        config = self.config
        terms = self._compute_terms(self._run_model(batch, noise), batch, beta * config.lambda_kl)
        loss = (
            config.lambda_self * terms.get("self", 0.0)
            + config.lambda_cross * terms.get("cross", 0.0)
            + config.lambda_mse * terms["mse"]
            - config.lambda_d * terms["d"]
            + config.lambda_contrastive * terms.get("contrastive", 0.0)
        )
        return loss, {name: term.detach() for name, term in terms.items()}

    def split_loss(self, batch: Batch, noise: Noise, beta: float = 1.0) -> dict[str, Tensor]:
        """Split the loss of a micro-batch into its terms and what each modality adds to the ELBOs.

        Arguments are those of `compute_loss`.

        Returns:
            The terms of `compute_loss`, and "self/rna", "cross/rna" of each modality, () each.
        """
        output, kl_weight = self._run_model(batch, noise), beta * self.config.lambda_kl
        terms = self._compute_terms(output, batch, kl_weight)
        return terms | self._split_by_modality(output, batch, kl_weight)

    def score_held_out(self, batch: Batch, noise: Noise) -> HeldOutScores:
        """Score cells, which every rank has, without mixtures and under the whole KL."""
        config, observed = self.config, batch.observed
        output = self.model(
            batch, noise, decode_self=config.lambda_self > 0, decode_cross=config.lambda_cross > 0
        )
        weight = self._place_weights(observed.device)
        minus_elbo = -(
            config.lambda_self * compute_elbo_self(output, observed, weight, config.lambda_kl)
            + config.lambda_cross * compute_elbo_cross(output, observed, weight, config.lambda_kl)
        )
        terms = self._split_by_modality(output, batch, config.lambda_kl)
        terms |= self._split_alignment(output, batch)
        if config.lambda_contrastive:
            terms |= self._contrast_pairs(output, batch)
        return HeldOutScores(output.posterior, minus_elbo, terms)

    def _run_model(self, batch: Batch, noise: Noise) -> CLUEOutput:
        """Run the model as far as the terms that have a weight need it."""
        config = self.config
        output: CLUEOutput = self.model(
            batch,
            noise,
            decode_self=config.lambda_self > 0,
            decode_cross=config.lambda_cross > 0,
            mixup=config.contrastive_mixup and config.lambda_contrastive > 0,
            mixed_precision=self.mixed_precision,
        )
        return output

    def _compute_terms(
        self, output: CLUEOutput, batch: Batch, kl_weight: float
    ) -> dict[str, Tensor]:
        """The terms of eq. 15 that have a weight, and of InfoNCE, each ()."""
        config, observed = self.config, batch.observed
        weight = self._place_weights(observed.device)
        z = output.z.flatten(2)  # (B, K source, K * a)
        terms = {
            "mse": compute_alignment(z, observed, cosine=config.alignment == "cosine"),
            # The discriminator maximises L_D; the reversed gradient makes the encoders minimise it.
            "d": score_discriminator(output.logits, observed),
        }
        if config.lambda_self:
            terms["self"] = -compute_elbo_self(output, observed, weight, kl_weight).mean()
        if config.lambda_cross:
            terms["cross"] = -compute_elbo_cross(output, observed, weight, kl_weight).mean()
        if config.lambda_contrastive:
            terms["contrastive"] = compute_info_nce(
                output.contrast,
                batch.pair_rows,
                output.contrast_code,
                output.log_scale,
                self._read_batch_separation(),
                config.contrastive_same_modality,
            )
        return terms

    def _place_weights(self, device: torch.device) -> Tensor:
        """The weight of each modality, (K,), copied to the device at the first call alone."""
        if self._weights_on_device.device != device:
            self._weights_on_device = self._weights_on_device.to(device)
        return self._weights_on_device

    def _split_alignment(self, output: CLUEOutput, batch: Batch) -> dict[str, Tensor]:
        """Eq. 9 by pair of modalities, over cells that have both; eq. 12 by modality."""
        names, observed = self.model.modalities, batch.observed
        z, cosine = output.z.flatten(2), self.config.alignment == "cosine"
        terms = {
            f"mse/{names[i]}-{names[j]}": compute_alignment(z[:, [i, j]], both, cosine)
            for i, j in combinations(range(len(names)), 2)
            if (both := observed[:, [i, j]]).all(1).any()
        }
        ln_q = torch.diagonal(output.logits.log_softmax(-1), dim1=1, dim2=2)  # (B, K source)
        return terms | {
            f"d/{name}": ln_q[observed[:, k], k].mean()
            for k, name in enumerate(names)
            if observed[:, k].any()
        }

    def _split_by_modality(
        self, output: CLUEOutput, batch: Batch, beta: float
    ) -> dict[str, Tensor]:
        """Minus the ELBOs by modality, means over the cells that have it."""
        elbos = {
            "self": (self.config.lambda_self, split_elbo_self(output, beta)),
            "cross": (self.config.lambda_cross, split_elbo_cross(output, batch.observed, beta)),
        }
        return {
            f"{elbo}/{name}": -values[batch.modalities[name].rows, k].mean()
            for elbo, (weight, values) in elbos.items()
            if weight
            for k, name in enumerate(self.model.modalities)
            if name in batch.modalities
        }

    def _contrast_pairs(self, output: CLUEOutput, batch: Batch) -> dict[str, Tensor]:
        """InfoNCE of each pair of modalities that some cells have, over the cells of this rank."""
        # Evenly spread over the strata, so that memory stays bounded however many are held out.
        some, names = -(-batch.n_cells // MOST_CONTRASTED), self.model.modalities
        terms, batch_separation = {}, self._read_batch_separation()
        for (a, b), rows in find_pair_rows(batch.observed[::some]).items():
            terms[f"contrastive/{names[a]}-{names[b]}"] = compute_info_nce(
                output.contrast[:, ::some],
                {(a, b): rows},
                output.contrast_code[::some],
                output.log_scale,
                batch_separation,
                self.config.contrastive_same_modality,
                across_ranks=False,
            )
        return terms

    def _read_batch_separation(self) -> Tensor | None:
        """How far each modality sets batches apart, (K,), if there are several that count."""
        heeds_batches = self.config.contrastive_within_batch and self.model.knows_batches
        return self.model.batch_separation if heeds_batches else None
