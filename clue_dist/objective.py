"""The losses of eq. 13-15 by the paper's names, and InfoNCE beyond it.

Every mean runs over a number of cells that is the same on every rank, so that averaging gradients over ranks gives
the gradient of the global batch's mean.
"""

from __future__ import annotations

from itertools import combinations
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F

from clue_dist.config import ObjectiveConfig
from clue_dist.data.batch import Batch
from clue_dist.model.clue import CLUE, CLUEOutput
from clue_dist.model.noise import Noise
from clue_dist.model.posterior import compute_information, compute_kl_to_prior


def compute_elbo_self(out: CLUEOutput, observed: Tensor, weight: Tensor, beta: float) -> Tensor:
    """Eq. 5 for each cell, (B,): sum over observed k of E ln p(x_k | z_k) - KL(q(z_k | x_k) || p). weight: (K,)."""
    terms = out.ln_self - beta * compute_information(out.posterior.mean, out.posterior.log_var)
    return (terms * weight * observed).sum(1)


def compute_elbo_cross(out: CLUEOutput, observed: Tensor, weight: Tensor, beta: float) -> Tensor:
    """Eq. 8 for each cell, (B,): reconstruction where x_k was observed, KL of the joint posterior over every k."""
    kl = compute_kl_to_prior(out.posterior.joint_mean, out.posterior.joint_log_var)  # (B, K)
    return ((out.ln_cross * observed - beta * kl) * weight).sum(1)


def compute_alignment(z: Tensor, observed: Tensor, cosine: bool = False) -> Tensor:
    """Eq. 9-11: mean over cells with two or more modalities of the mean squared distance of their z's to the centre.

    z: (B, K source, K * a) samples of the aligned dimensions. With `cosine`, rows are scaled to length 1 first, as
    the reference does.
    """
    if cosine:
        z = F.normalize(z, dim=-1)
    mask = observed[:, :, None].to(z.dtype)
    n = mask.sum(1)  # (B, 1)
    centre = (z * mask).sum(1) / n.clamp_min(1)
    squared = ((z - centre[:, None]) ** 2 * mask).sum((1, 2)) / n[:, 0].clamp_min(1)
    paired = n[:, 0] > 1
    return (squared * paired).sum() / paired.sum().clamp_min(1)


def score_discriminator(logits: Tensor, observed: Tensor) -> Tensor:
    """Eq. 12: mean over cells of the mean over observed k of ln q(k | z). logits: (B, K source, K)."""
    ln_q = torch.diagonal(logits.log_softmax(-1), dim1=1, dim2=2)  # (B, K source)
    per_cell = (ln_q * observed).sum(1) / observed.sum(1).clamp_min(1)
    return per_cell.mean()


def compute_info_nce(
    z: Tensor, observed: Tensor, batch_code: Tensor, log_scale: Tensor, within_batch: bool
) -> Tensor:
    """InfoNCE between the modalities of paired cells, both directions, against all pairs of the global batch.

    z: (M, B, K source, .), compared by cosine; the mean over the M members. Negatives come from the same biological
    batch if `within_batch`. The loss of this rank's cells; columns are gathered from every rank, gradients flow back
    to them.
    """
    z = F.normalize(z, dim=-1).transpose(0, 1)  # (B, M, K source, .)
    every_z, every_observed, every_code, first = _gathered(z, observed, batch_code)
    members = z.shape[1]
    true = (first + torch.arange(len(z), device=z.device)).expand(members, -1)
    total, pairs = z.new_zeros(()), z.new_zeros(())
    for a, b in combinations(range(observed.shape[1]), 2):
        row, column = observed[:, a] & observed[:, b], every_observed[:, a] & every_observed[:, b]
        allowed = (
            column[None] & (batch_code[:, None] == every_code[None])
            if within_batch
            else column[None]
        )
        for source, target in ((a, b), (b, a)):
            rows, columns = z[:, :, source].transpose(0, 1), every_z[:, :, target].permute(1, 2, 0)
            logits = log_scale.exp() * rows @ columns  # (M, B, global B)
            logits = logits.masked_fill(~allowed, -torch.inf).masked_fill(~row[:, None], 0.0)
            losses = F.cross_entropy(logits.flatten(0, 1), true.flatten(), reduction="none")
            total = total + (losses.view(members, -1).mean(0) * row).sum()
        pairs = pairs + row.sum()
    return total / (2 * pairs).clamp_min(1)


def _gathered(z: Tensor, observed: Tensor, code: Tensor) -> tuple[Tensor, Tensor, Tensor, int]:
    """All ranks' z (with gradient), observed and batch codes, and where this rank's rows begin."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return z, observed, code, 0
    packed = torch.cat([observed.to(torch.int64), code[:, None]], 1)
    others = [torch.empty_like(packed) for _ in range(dist.get_world_size())]
    dist.all_gather(others, packed)
    flags = torch.cat(others)
    return _Gather.apply(z), flags[:, :-1].bool(), flags[:, -1], dist.get_rank() * len(z)


class _Gather(torch.autograd.Function):
    """Concatenation over ranks of equally long tensors; the gradients of all ranks flow back, summed."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        parts = [torch.empty_like(x) for _ in range(dist.get_world_size())]
        dist.all_gather(parts, x.contiguous())
        ctx.n = len(x)
        return torch.cat(parts)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:  # type: ignore[override]
        gradient = gradient.contiguous()
        dist.all_reduce(gradient)
        return gradient.narrow(0, dist.get_rank() * ctx.n, ctx.n)


class Objective(nn.Module):
    """The model and its training loss (eq. 15) as one module, so that DeepSpeed sees one forward pass."""

    def __init__(self, model: CLUE, config: ObjectiveConfig, modality_weights: list[float]) -> None:
        super().__init__()
        self.model, self.config = model, config
        sizes = [
            model.get_decoder(m).n_features if config.per_feature else 1 for m in model.modalities
        ]
        self.weights = [w / m for w, m in zip(modality_weights, sizes, strict=True)]

    def forward(
        self, batch: Batch, noise: Noise | None, beta: float = 1.0, by_modality: bool = False
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Loss (), and its terms without their weights; without noise what `CLUE.embed_batch` gives, for validation.

        beta: factor on lambda_kl, for a warm-up; by_modality: tell what each modality adds to the ELBOs, too.
        """
        if (
            noise is None
        ):  # every call goes through the engine, so that ZeRO-3 gathers what is needed
            return self.model.embed_batch(batch)
        c, observed = self.config, batch.observed
        out = self.model(
            batch,
            noise,
            decode_self=c.lambda_self > 0,
            decode_cross=c.lambda_cross > 0,
            mixup=self._mixup(),
        )
        weight = torch.tensor(self.weights, device=observed.device)
        z = out.z.flatten(2)  # (B, K source, K * a)
        terms = {
            "mse": compute_alignment(z, observed, cosine=c.alignment == "cosine"),
            # The discriminator maximises L_D; the reversed gradient makes the encoders minimise it.
            "d": score_discriminator(out.logits, observed),
        }
        if c.lambda_self:
            terms["self"] = -compute_elbo_self(out, observed, weight, beta * c.lambda_kl).mean()
        if c.lambda_cross:
            terms["cross"] = -compute_elbo_cross(out, observed, weight, beta * c.lambda_kl).mean()
        if c.lambda_contrastive:
            within = c.contrastive_within_batch
            terms["contrastive"] = compute_info_nce(
                out.contrast, observed, batch.batch_code, out.log_scale, within
            )
        loss = (
            c.lambda_self * terms.get("self", 0.0)
            + c.lambda_cross * terms.get("cross", 0.0)
            + c.lambda_mse * terms["mse"]
            - c.lambda_d * terms["d"]
            + c.lambda_contrastive * terms.get("contrastive", 0.0)
        )
        if by_modality:
            terms |= self._by_modality(out, observed)
        return loss, {name: term.detach() for name, term in terms.items()}

    def _by_modality(self, out: CLUEOutput, observed: Tensor) -> dict[str, Tensor]:
        """Log-likelihoods of the ELBOs by modality, mean over cells."""
        wanted = {
            "self": (self.config.lambda_self, out.ln_self),
            "cross": (self.config.lambda_cross, out.ln_cross),
        }
        return {
            f"{elbo} of {m}": -ln[:, k][observed[:, k].bool()].sum() / len(ln)
            for elbo, (used, ln) in wanted.items()
            if used
            for k, m in enumerate(self.model.modalities)
        }

    def _mixup(self) -> Literal["none", "any", "within_batch"]:
        if not (self.config.contrastive_mixup and self.config.lambda_contrastive):
            return "none"
        return "within_batch" if self.config.contrastive_within_batch else "any"
