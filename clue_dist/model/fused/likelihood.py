"""ln p of sparse profiles at scored features, forward and backward, without a dense target.

The PyTorch twin is `model.likelihoods.compute_log_likelihood`, after `select_features`. These
kernels walk over all non-zeros of a cell and pass over those of features that are not scored, so
that nobody need know how many there are. Two passes over the parameters are all that is left: one
reads them, one reads them again and writes their gradient.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from clue_dist.data.batch import SparseCounts
from clue_dist.model.fused import FUSED_LIKELIHOODS
from clue_dist.model.fused.functions import (
    log_rising_factorial,
    rising_factorial_slope,
    sigmoid,
    softplus,
)

BLOCK = 256  # features, or non-zeros, that a program holds at a time
ROWS_PER_PROGRAM = 16  # in the backward pass, over which a program sums the gradient of theta
MOST_THETA = tl.constexpr(7.0)  # `model.likelihoods.MAX_LOG_DISPERSION`
NB = tl.constexpr(0)
POISSON = tl.constexpr(1)


def score_sparse_counts(
    likelihood: str,
    counts: SparseCounts,
    rate: Tensor,
    theta: Tensor,
    library: Tensor,
    features: Tensor | None = None,
) -> Tensor:
    """ln p of n profiles in nats, (n,) or (S, n), summed over the scored features.

    Args:
        likelihood: one of `FUSED_LIKELIHOODS`.
        counts: n profiles, of all features.
        rate: (n, F), or (S, n, F) of several z of each cell, as in `LikelihoodParameters`.
        theta: (F,).
        library: (n, 1), total counts.
        features: (F,), those that are scored; None: all.
    """
    if features is None:
        place = torch.arange(counts.n_features, dtype=torch.int32, device=rate.device)
    else:
        place = torch.full((counts.n_features,), -1, dtype=torch.int32, device=rate.device)
        place[features] = torch.arange(len(features), dtype=torch.int32, device=rate.device)
    kind, flat = FUSED_LIKELIHOODS[likelihood], rate.flatten(0, -2)
    scores: Tensor = _SparseScores.apply(kind, counts, place, flat, theta, library)
    return scores.view(rate.shape[:-1])


class _SparseScores(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        kind: int,
        counts: SparseCounts,
        place: Tensor,
        rate: Tensor,
        theta: Tensor,
        library: Tensor,
    ) -> Tensor:
        rate, theta = rate.contiguous(), theta.contiguous()
        scores = torch.empty_like(rate[:, 0])
        sparse = counts.indptr, counts.indices, counts.values, place
        inputs = *sparse, rate, theta, library.log().contiguous()
        sizes = rate.shape[1], len(library)
        _score_rows[(len(rate),)](*inputs, scores, *sizes, KIND=kind, BLOCK=BLOCK)
        ctx.save_for_backward(*inputs)
        ctx.kind = kind
        return scores

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:  # type: ignore[override]
        *sparse, rate, theta, log_library = ctx.saved_tensors
        n_rows, width = rate.shape
        # Every element is written: by the terms of all features first, by non-zeros after that.
        rate_gradient, theta_gradient = torch.empty_like(rate), torch.zeros_like(theta)
        rest = rate, theta, log_library, gradient.contiguous(), rate_gradient, theta_gradient
        sizes = width, len(log_library)
        options = {"KIND": ctx.kind, "BLOCK": BLOCK}
        grid = (triton.cdiv(width, BLOCK), triton.cdiv(n_rows, ROWS_PER_PROGRAM))
        _write_zero_gradients[grid](*rest, *sizes, n_rows, ROWS=ROWS_PER_PROGRAM, **options)
        _add_entry_gradients[(n_rows,)](*sparse, *rest, *sizes, **options)
        uses_theta = ctx.kind == FUSED_LIKELIHOODS["nb"]
        return None, None, None, rate_gradient, theta_gradient if uses_theta else None, None


@triton.jit
def _log_zero(rate, theta, log_library, KIND: tl.constexpr):
    """ln p(0), its derivatives by rate and by theta."""
    if KIND == NB:
        theta = tl.minimum(theta, MOST_THETA)
        r, excess = tl.exp(theta), log_library - softplus(-rate) - theta
        share = r * sigmoid(excess)
        value = -r * softplus(excess)
        return value, -share * sigmoid(-rate), value + share
    elif KIND == POISSON:
        mean = tl.exp(log_library - softplus(-rate))
        return -mean, -mean * sigmoid(-rate), mean * 0.0
    else:
        odds = rate + log_library
        return -softplus(odds), -sigmoid(odds), odds * 0.0


@triton.jit
def _log_gain(x, rate, theta, log_library, KIND: tl.constexpr):
    """ln p(x) - ln p(0), its derivatives by rate and by theta."""
    if KIND == NB:
        theta = tl.minimum(theta, MOST_THETA)
        r, excess = tl.exp(theta), log_library - softplus(-rate) - theta
        left = x * sigmoid(-excess)
        value = log_rising_factorial(r, x) - x * softplus(-excess)
        return value, left * sigmoid(-rate), r * rising_factorial_slope(r, x) - left
    elif KIND == POISSON:
        return x * (log_library - softplus(-rate)), x * sigmoid(-rate), x * 0.0
    else:
        is_open = tl.where(x > 0, 1.0, 0.0)
        return is_open * (rate + log_library), is_open, x * 0.0


@triton.jit
def _score_rows(
    indptr,
    indices,
    values,
    place,
    rate,
    theta,
    log_library,
    scores,
    width,
    n_cells,
    KIND: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One program for each row: ln p(0) of all scored features, then what its non-zeros add.

    Row number `n_cells` is the first cell's again, with another z.
    """
    row = tl.program_id(0).to(tl.int64)
    cell = row % n_cells
    lanes = tl.arange(0, BLOCK)
    size = tl.load(log_library + cell)
    sums = tl.zeros([BLOCK], tl.float32)
    for first in range(0, width, BLOCK):
        column = first + lanes
        mask = column < width
        rates = tl.load(rate + row * width + column, mask=mask, other=0.0)
        thetas = tl.load(theta + column, mask=mask, other=0.0)
        value, _, _ = _log_zero(rates, thetas, size, KIND)
        sums += tl.where(mask, value, 0.0)
    start, end = tl.load(indptr + cell), tl.load(indptr + cell + 1)
    for first in range(start, end, BLOCK):
        inside = first + lanes < end
        x = tl.load(values + first + lanes, mask=inside, other=0.0)
        feature = tl.load(indices + first + lanes, mask=inside, other=0)
        column = tl.load(place + feature, mask=inside, other=-1)
        mask = column >= 0
        rates = tl.load(rate + row * width + column, mask=mask, other=0.0)
        thetas = tl.load(theta + column, mask=mask, other=0.0)
        value, _, _ = _log_gain(x, rates, thetas, size, KIND)
        sums += tl.where(mask, value, 0.0)
    tl.store(scores + row, tl.sum(sums, 0))


@triton.jit
def _write_zero_gradients(
    rate,
    theta,
    log_library,
    gradient,
    rate_gradient,
    theta_gradient,
    width,
    n_cells,
    n_rows,
    ROWS: tl.constexpr,
    KIND: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One program for a block of features and some rows: the gradient of ln p(0)."""
    column = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = column < width
    thetas = tl.load(theta + column, mask=mask, other=0.0)
    sums = tl.zeros([BLOCK], tl.float32)
    first = tl.program_id(1) * ROWS
    for number in range(first, tl.minimum(first + ROWS, n_rows)):
        row = tl.cast(number, tl.int64)
        size = tl.load(log_library + row % n_cells)
        rates = tl.load(rate + row * width + column, mask=mask, other=0.0)
        _, by_rate, by_theta = _log_zero(rates, thetas, size, KIND)
        factor = tl.load(gradient + row)
        tl.store(rate_gradient + row * width + column, factor * by_rate, mask=mask)
        sums += factor * by_theta
    if KIND == NB:
        sums = tl.where(thetas <= MOST_THETA, sums, 0.0)
        tl.atomic_add(theta_gradient + column, sums, mask=mask)


@triton.jit
def _add_entry_gradients(
    indptr,
    indices,
    values,
    place,
    rate,
    theta,
    log_library,
    gradient,
    rate_gradient,
    theta_gradient,
    width,
    n_cells,
    KIND: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One program for each row adds the gradient of what its cell's non-zeros add."""
    row = tl.program_id(0).to(tl.int64)
    cell = row % n_cells
    lanes = tl.arange(0, BLOCK)
    size, factor = tl.load(log_library + cell), tl.load(gradient + row)
    start, end = tl.load(indptr + cell), tl.load(indptr + cell + 1)
    for first in range(start, end, BLOCK):
        inside = first + lanes < end
        x = tl.load(values + first + lanes, mask=inside, other=0.0)
        feature = tl.load(indices + first + lanes, mask=inside, other=0)
        column = tl.load(place + feature, mask=inside, other=-1)
        mask = column >= 0
        rates = tl.load(rate + row * width + column, mask=mask, other=0.0)
        thetas = tl.load(theta + column, mask=mask, other=0.0)
        _, by_rate, by_theta = _log_gain(x, rates, thetas, size, KIND)
        # No other program and no other non-zero of this cell has this element.
        target = rate_gradient + row * width + column
        before = tl.load(target, mask=mask, other=0.0)
        tl.store(target, before + factor * by_rate, mask=mask)
        if KIND == NB:
            by_theta = tl.where(thetas <= MOST_THETA, by_theta, 0.0)
            tl.atomic_add(theta_gradient + column, factor * by_theta, mask=mask)
