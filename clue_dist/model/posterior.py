"""q(z | x) from everything observed: combining the experts of the K x K grid. Everything here is float32."""

from __future__ import annotations

import torch
from torch import Tensor


def product_of_experts(mean: Tensor, log_var: Tensor, observed: Tensor) -> tuple[Tensor, Tensor]:
    """Eq. 6: the normalised product of the observed sources' Gaussians, for every target.

    mean, log_var: (B, K source, K target, d); observed: (B, K), at least one true in a row.
    Returns mean and log-variance, (B, K target, d): precisions add, means are weighted by precision.
    """
    log_precision = (-log_var).masked_fill(~observed[:, :, None, None], -torch.inf)
    total = torch.logsumexp(log_precision, dim=1)  # (B, K, d)
    weight = torch.exp(log_precision - total[:, None])
    return (weight * mean).sum(1), -total


def mean_of_experts(mean: Tensor, log_var: Tensor, observed: Tensor) -> tuple[Tensor, Tensor]:
    """The reference's choice: z is the average of independent samples, one from each observed source."""
    mask = observed[:, :, None, None].to(mean.dtype)
    n = mask.sum(1)
    variance = (mask * log_var.exp()).sum(1) / n**2
    return (mask * mean).sum(1) / n, variance.log()


COMBINE = {"poe": product_of_experts, "mean": mean_of_experts}


def kl_to_prior(mean: Tensor, log_var: Tensor) -> Tensor:
    """KL(N(mean, exp log_var) || N(0, 1)) summed over the last axis, in nats."""
    return 0.5 * (mean**2 + log_var.exp() - 1 - log_var).sum(-1)


def sample(mean: Tensor, log_var: Tensor, noise: Tensor) -> Tensor:
    """Reparameterised draw; noise: standard normal of mean's shape."""
    return mean + torch.exp(0.5 * log_var) * noise
