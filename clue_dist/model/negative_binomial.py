"""ln p of a negative binomial of mean mu = library * sigmoid(rate) and inverse dispersion r.

Gradients are written out: torch's own operations would take several times as many passes over all
features of all cells.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from clue_dist.data.batch import Counts

STIRLING_FROM = 8.0  # Stirling's series replaces ln Gamma from this r on
LEAST_R = 1e-25  # in place of a smaller one, through which a mean might be divided to infinity


def sum_log_probabilities(rate: Tensor, r: Tensor, library: Tensor, counts: Counts) -> Tensor:
    """The sum over features of ln p(x), without its term -ln x!.

    Args:
        rate: (..., n, F).
        r: (F,).
        library: (n, 1), without a gradient.
        counts: x, of n profiles.

    Returns:
        (..., n).
    """
    r = r.clamp(min=LEAST_R)
    if isinstance(counts, Tensor):
        rising = compute_log_rising_factorial(r, counts).sum(-1)
    else:
        of_entries = compute_log_rising_factorial(r, counts.values, counts.indices)
        rising = counts.sum_rows(of_entries)
    total: Tensor = _SumOfLogShares.apply(rate, r, library, counts)
    return total + rising


class _SumOfLogShares(torch.autograd.Function):
    """The sum over features of x ln(mu / (mu + r)) + r ln(r / (mu + r))."""

    @staticmethod
    def forward(ctx: Any, rate: Tensor, r: Tensor, library: Tensor, counts: Counts) -> Tensor:
        share = torch.sigmoid(rate)
        ratio = (share * library).div_(r)  # mu / r
        log_sum = torch.log1p(ratio)
        ctx.save_for_backward(share, ratio, log_sum, r)
        ctx.counts = counts
        total = -(log_sum * r).sum(-1)  # a product of matrices would be rounded to bfloat16
        if isinstance(counts, Tensor):
            log_ratio = F.logsigmoid(rate).add_(library.log() - r.log())
            return total + F.logsigmoid(log_ratio).mul_(counts).sum(-1)
        row, column = counts.entry_rows, counts.indices
        offset = library[:, 0].log().index_select(0, row) - r.log().index_select(0, column)
        place = row * rate.shape[-1] + column
        of_entries = rate.flatten(-2).index_select(-1, place)
        gain = F.logsigmoid(F.logsigmoid(of_entries).add_(offset)).mul_(counts.values)
        return total + counts.sum_rows_of_each(gain).view_as(total)

    @staticmethod
    def backward(  # type: ignore[override]
        ctx: Any, gradient: Tensor
    ) -> tuple[Tensor, Tensor, None, None]:
        share, ratio, log_sum, r = ctx.saved_tensors
        counts: Counts = ctx.counts
        if isinstance(counts, Tensor):
            x = counts
        else:
            x = share.new_zeros(share.shape[-2:])
            place = counts.entry_rows * x.shape[1] + counts.indices
            x.view(-1)[place] = counts.values.to(x.dtype)
        # x - (x + r) mu / (mu + r), as a difference that is exact where mu / r is small.
        excess = torch.addcmul(x, ratio / (1 + ratio), x + r, value=-1)
        of_r = -gradient.flatten() @ torch.addcdiv(log_sum, excess, r).flatten(0, -2)
        of_rate = excess.addcmul_(excess, share, value=-1).mul_(gradient.unsqueeze(-1))
        return of_rate, of_r, None, None


def compute_log_rising_factorial(r: Tensor, x: Tensor, feature: Tensor | None = None) -> Tensor:
    """ln Gamma(r + x) - ln Gamma(r), also where both are large and nearly equal.

    From r = STIRLING_FROM on it follows Stirling's series, to 1e-6: the gradient of a difference of
    two large ln Gamma would be lost in the rounding of float32.

    Args:
        r: of the shape of x, or one that broadcasts to it; (F,) where features are given.
        x: counts, without a gradient.
        feature: (nnz,), the feature of each count x (nnz,); None: r is that of each count.
    """
    rising: Tensor = _LogRisingFactorial.apply(r, x, feature)
    return rising


class _LogRisingFactorial(torch.autograd.Function):
    """What depends on r alone is computed once for each feature."""

    @staticmethod
    def forward(ctx: Any, r: Tensor, x: Tensor, feature: Tensor | None) -> Tensor:
        ctx.save_for_backward(r, x, feature)
        large, small = r.clamp(min=STIRLING_FROM), r.clamp(max=STIRLING_FROM)
        inverse = _take(1 / large, feature)
        y = x + _take(large, feature)
        series = torch.log1p(x * inverse).mul_(_take(large - 0.5, feature))
        series += x * (y.log() - 1 - inverse / (12 * y))
        near = torch.lgamma(x + _take(small, feature)).sub_(_take(torch.lgamma(small), feature))
        return torch.where(_take(r > STIRLING_FROM, feature), series, near)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:  # type: ignore[override]
        r, x, feature = ctx.saved_tensors
        large, small = r.clamp(min=STIRLING_FROM), r.clamp(max=STIRLING_FROM)
        inverse = _take(1 / large, feature)
        inverse_of_sum = 1 / (x + _take(large, feature))
        share = x * inverse
        series = torch.log1p(share)
        series += share * inverse_of_sum * (0.5 + (inverse + inverse_of_sum) / 12)
        near = torch.digamma(x + _take(small, feature)).sub_(_take(torch.digamma(small), feature))
        slope = torch.where(_take(r > STIRLING_FROM, feature), series, near).mul_(gradient)
        if feature is None:
            return slope.sum_to_size(r.shape), None, None
        return torch.zeros_like(r).index_add_(0, feature, slope), None, None


def _take(of_features: Tensor, feature: Tensor | None) -> Tensor:
    """What each count has, of what each feature has."""
    return of_features if feature is None else of_features.index_select(0, feature)
