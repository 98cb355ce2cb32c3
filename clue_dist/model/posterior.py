"""q(z | everything observed): how the experts of the K x K grid are combined, all in float32."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch import distributed as dist

# (mean, log_var, observed) -> (mean, log_var), with shapes as in `product_of_experts`.
Combination = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]

LEAST_NATS = 1e-3  # for a modality that says nothing of its own latent: weights stay above 0


def product_of_experts(mean: Tensor, log_var: Tensor, power: Tensor) -> tuple[Tensor, Tensor]:
    """The normalised product of the sources' Gaussians, each raised to a power, for every target.

    Precisions add up, and means are weighted by precision.

    Args:
        mean: (B, K source, K target, d).
        log_var: log variances, of the same shape.
        power: (B, K), not all zero in a row. With `observed` itself it is eq. 6.

    Returns:
        Mean and log-variance, each (B, K target, d).
    """
    log_precision = power.float().log()[:, :, None, None] - log_var
    total = torch.logsumexp(log_precision, dim=1)  # (B, K, d)
    weight = torch.exp(log_precision - total[:, None])
    return (weight * mean).sum(1), -total


def mean_of_experts(mean: Tensor, log_var: Tensor, observed: Tensor) -> tuple[Tensor, Tensor]:
    """Let z be the average of independent samples, one of each observed source.

    It is what the authors' code does. Shapes as in `product_of_experts`.
    """
    mask = observed[:, :, None, None].to(mean.dtype)
    n_sources = mask.sum(1)
    variance = (mask * log_var.exp()).sum(1) / n_sources**2
    return (mask * mean).sum(1) / n_sources, variance.log()


def take_prior(mean: Tensor, log_var: Tensor, observed: Tensor) -> tuple[Tensor, Tensor]:
    """Leave the experts apart: let z have its prior. Shapes as in `product_of_experts`."""
    prior = torch.zeros_like(mean[:, 0])  # the mean and the log-variance
    return prior, prior


class GeneralisedProduct(nn.Module):
    """Eq. 6 with experts weighted by how much they know (Cao and Fleet, 2014).

    The weights alpha_k of the observed sources sum to 1. alpha_k goes with the cube of the nats
    that modality k tells of its own aligned dimensions, E KL(q(z_k | x_k) || p), a running mean
    over the cells of training. So 13 proteins do not blur a transcriptome, and two modalities
    together are not surer than the surer one. The cube is a finding of experiments: with lower
    powers, embeddings separated cell types less well. The nats mean something only where
    lambda_self and lambda_kl put a price on them.
    """

    DECAY = 0.98  # decay of the running mean, by micro-batch
    POWER = 3

    def __init__(self, n_modalities: int) -> None:
        super().__init__()
        self.register_buffer("nats", torch.ones(n_modalities))
        self.nats: Tensor

    def forward(self, mean: Tensor, log_var: Tensor, observed: Tensor) -> tuple[Tensor, Tensor]:
        """Combine as `product_of_experts` does; in training, learn the nats of this batch first."""
        if self.training:
            self._learn_nats(mean.detach(), log_var.detach(), observed)
        weight = self.nats.clamp_min(LEAST_NATS) ** self.POWER * observed
        return product_of_experts(mean, log_var, weight / weight.sum(1, keepdim=True))

    def _learn_nats(self, mean: Tensor, log_var: Tensor, observed: Tensor) -> None:
        """Move the running mean towards the mean of this micro-batch's cells on all ranks."""
        information = compute_information(mean, log_var) * observed
        sums = torch.stack([information.sum(0), observed.float().sum(0)])  # (2, K)
        if dist.is_initialized() and dist.get_world_size() > 1:
            dist.all_reduce(sums)
        nats, cells = sums
        recent = nats / cells.clamp_min(1)
        # The step may turn out not to be finite and be skipped, but this mean would keep the NaN.
        known = (cells > 0) & recent.isfinite()
        self.nats.lerp_(torch.where(known, recent, self.nats), 1 - self.DECAY)


def choose_combination(name: str, n_modalities: int) -> Combination:
    """Choose how experts are combined, by the setting `model.posterior`."""
    makers: dict[str, Callable[[], Combination]] = {
        "gpoe": lambda: GeneralisedProduct(n_modalities),
        "poe": lambda: product_of_experts,
        "mean": lambda: mean_of_experts,
    }
    return makers[name]()


def compute_kl_to_prior(mean: Tensor, log_var: Tensor) -> Tensor:
    """KL(N(mean, exp log_var) || N(0, 1)) in nats, summed over the last axis."""
    return 0.5 * (mean**2 + log_var.exp() - 1 - log_var).sum(-1)


def compute_information(mean: Tensor, log_var: Tensor) -> Tensor:
    """Nats that each modality tells of its own latent: KL(q(z_k | x_k) || p) of eq. 5.

    Args:
        mean: (B, K source, K target, d).
        log_var: log variances, of the same shape.

    Returns:
        (B, K).
    """
    return compute_kl_to_prior(select_own_latent(mean), select_own_latent(log_var))


def select_own_latent(experts: Tensor) -> Tensor:
    """What each modality says of its own latent: (B, K source, K target, ...) -> (B, K, ...)."""
    return torch.diagonal(experts, dim1=1, dim2=2).movedim(-1, 1)


def sample_posterior(mean: Tensor, log_var: Tensor, noise: Tensor) -> Tensor:
    """A reparameterised draw; noise: standard normal, of the shape of the mean."""
    return mean + torch.exp(0.5 * log_var) * noise
