"""Terms of a negative binomial of mean mu = library * sigmoid(rate) and inverse dispersion r."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

STIRLING_FROM = 8.0  # Stirling's series replaces ln Gamma from this r on
LEAST_R = 1e-25  # in place of a smaller one, through which a mean might be divided to infinity


def sum_log_zeros(rate: Tensor, r: Tensor, library: Tensor) -> Tensor:
    """The sum over features of ln p(0) = -r ln(1 + mu / r).

    Args:
        rate: (..., n, F).
        r: (F,).
        library: (n, 1), without a gradient.

    Returns:
        (..., n).
    """
    total: Tensor = _SumOfLogZeros.apply(rate, r.clamp(min=LEAST_R), library)
    return total


class _SumOfLogZeros(torch.autograd.Function):
    """As torch's own operations have it, in fewer passes over all features of all cells."""

    @staticmethod
    def forward(ctx: Any, rate: Tensor, r: Tensor, library: Tensor) -> Tensor:
        share = torch.sigmoid(rate)
        ratio = (share * library).div_(r)  # mu / r
        log_ratio = torch.log1p(ratio)
        ctx.save_for_backward(share, ratio, log_ratio, r)
        return -(log_ratio * r).sum(-1)

    @staticmethod
    def backward(  # type: ignore[override]
        ctx: Any, gradient: Tensor
    ) -> tuple[Tensor, Tensor, None]:
        share, ratio, log_ratio, r = ctx.saved_tensors
        gradient = gradient.unsqueeze(-1)
        part = ratio / (1 + ratio)
        of_r = (part - log_ratio).mul_(gradient).flatten(0, -2).sum(0)
        of_rate = (share - 1).mul_(part).mul_(r).mul_(gradient)
        return of_rate, of_r, None


def compute_log_rising_factorial(r: Tensor, x: Tensor) -> Tensor:
    """ln Gamma(r + x) - ln Gamma(r), also where both are large and nearly equal.

    From r = STIRLING_FROM on it follows Stirling's series, to 1e-6: the gradient of a difference of
    two large ln Gamma would be lost in the rounding of float32.
    """
    large = r.clamp(min=STIRLING_FROM)
    y = x + large
    series = (large - 0.5) * torch.log1p(x / large) + x * (y.log() - 1) + (1 / y - 1 / large) / 12
    small = r.clamp(max=STIRLING_FROM)
    return torch.where(r > STIRLING_FROM, series, torch.lgamma(x + small) - torch.lgamma(small))
