"""q(z | x) from everything observed: combining the experts of the K x K grid. Everything here is float32."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch import distributed as dist

Combine = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]


def product_of_experts(mean: Tensor, log_var: Tensor, power: Tensor) -> tuple[Tensor, Tensor]:
    """The normalised product of the sources' Gaussians, each raised to a power, for every target.

    mean, log_var: (B, K source, K target, d); power: (B, K), not all zero in a row; `observed` itself for eq. 6.
    Returns mean and log-variance, (B, K target, d): precisions add, means are weighted by precision.
    """
    log_precision = power.float().log()[:, :, None, None] - log_var
    total = torch.logsumexp(log_precision, dim=1)  # (B, K, d)
    weight = torch.exp(log_precision - total[:, None])
    return (weight * mean).sum(1), -total


def mean_of_experts(mean: Tensor, log_var: Tensor, observed: Tensor) -> tuple[Tensor, Tensor]:
    """The reference's choice: z is the average of independent samples, one from each observed source."""
    mask = observed[:, :, None, None].to(mean.dtype)
    n = mask.sum(1)
    variance = (mask * log_var.exp()).sum(1) / n**2
    return (mask * mean).sum(1) / n, variance.log()


class GeneralisedProduct(nn.Module):
    """Experts weighted by how much they know (Cao and Fleet, 2014): alpha_k, with sum 1 over the observed sources.

    alpha_k goes with the cube of the nats that modality k tells of its own z_k, E KL(q(z_k | x_k) || p), a running
    mean over the cells of training; of the dimensions given here, the aligned ones. So 13 proteins do not blur a
    transcriptome, and two modalities together are not surer than the surest of them. The cube is by experience: cell
    types were told worse by lower powers. They mean something where lambda_self and lambda_kl price them.
    """

    DECAY = 0.98  # of one micro-batch

    def __init__(self, n_modalities: int) -> None:
        super().__init__()
        self.register_buffer("nats", torch.ones(n_modalities))
        self.nats: Tensor

    def forward(self, mean: Tensor, log_var: Tensor, observed: Tensor) -> tuple[Tensor, Tensor]:
        """As `product_of_experts`; in training it learns from this batch first."""
        if self.training:
            self._learn(mean.detach(), log_var.detach(), observed)
        told = self.nats.clamp_min(1e-3) ** 3 * observed
        return product_of_experts(mean, log_var, told / told.sum(1, keepdim=True))

    def _learn(self, mean: Tensor, log_var: Tensor, observed: Tensor) -> None:
        sums = torch.stack(
            [(compute_information(mean, log_var) * observed).sum(0), observed.float().sum(0)]
        )  # (2, K)
        if dist.is_initialized():
            dist.all_reduce(sums)
        told, cells = sums
        recent = told / cells.clamp_min(1)
        known = (
            cells > 0
        ) & recent.isfinite()  # as weights, it stays finite in a step that is skipped
        self.nats.lerp_(torch.where(known, recent, self.nats), 1 - self.DECAY)


def choose_combination(name: str, n_modalities: int) -> Combine:
    """How `model.posterior` combines experts."""
    known: dict[str, Callable[[], Combine]] = {
        "gpoe": lambda: GeneralisedProduct(n_modalities),
        "poe": lambda: product_of_experts,
        "mean": lambda: mean_of_experts,
    }
    return known[name]()


def compute_kl_to_prior(mean: Tensor, log_var: Tensor) -> Tensor:
    """KL(N(mean, exp log_var) || N(0, 1)) summed over the last axis, in nats."""
    return 0.5 * (mean**2 + log_var.exp() - 1 - log_var).sum(-1)


def compute_information(mean: Tensor, log_var: Tensor) -> Tensor:
    """Nats that each modality tells of its own latent, KL(q(z_k | x_k) || p), (B, K). mean, log_var: (B, K, K, d)."""
    return compute_kl_to_prior(select_own_latent(mean), select_own_latent(log_var))


def select_own_latent(x: Tensor) -> Tensor:
    """(B, K source, K target, ...) -> (B, K, ...), what each modality says of its own latent."""
    return torch.diagonal(x, dim1=1, dim2=2).movedim(-1, 1)


def sample_posterior(mean: Tensor, log_var: Tensor, noise: Tensor) -> Tensor:
    """Reparameterised draw; noise: standard normal of mean's shape."""
    return mean + torch.exp(0.5 * log_var) * noise
