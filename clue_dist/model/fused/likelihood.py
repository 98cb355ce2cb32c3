"""ln p of profiles at scored features, forward and backward, without a dense target.

The PyTorch twin is `model.likelihoods.Likelihood.score_profiles`, after `select_features`. These
kernels walk over all non-zeros of a cell and pass over those of features that are not scored, so
that nobody need know how many there are. Two passes over the parameters are all that is left: one
reads them, one reads them again and writes their gradient. Of dense profiles the scored columns are
picked first, and these same passes score them.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from clue_dist.data.batch import Counts
from clue_dist.model.fused import FUSED_LIKELIHOODS
from clue_dist.model.fused.functions import (
    load_entries,
    log1p,
    log_rising_factorial,
    rising_factorial_slope,
    sigmoid,
    softplus,
)

BLOCK = 256  # features, or non-zeros, that a program holds at a time
ROWS_PER_PROGRAM = 16  # in the backward pass, over which a program sums the gradient of theta
MOST_THETA = tl.constexpr(7.0)  # `model.likelihoods.MAX_LOG_DISPERSION`
NB = tl.constexpr(FUSED_LIKELIHOODS["nb"])
ZINB = tl.constexpr(FUSED_LIKELIHOODS["zinb"])
POISSON = tl.constexpr(FUSED_LIKELIHOODS["poisson"])
BERNOULLI = tl.constexpr(FUSED_LIKELIHOODS["bernoulli"])
NORMAL = tl.constexpr(FUSED_LIKELIHOODS["normal"])


def score_counts(
    likelihood: str,
    counts: Counts,
    rate: Tensor,
    theta: Tensor,
    library: Tensor,
    gate: Tensor | None = None,
    features: Tensor | None = None,
) -> Tensor:
    """ln p of n profiles in nats, (n,) or (S, n), summed over the scored features.

    Args:
        likelihood: one of `FUSED_LIKELIHOODS`.
        counts: n profiles, of all features.
        rate: (n, F), or (S, n, F) of several z of each cell, as in `LikelihoodParameters`.
        theta: (F,).
        library: (n, 1), total counts.
        gate: of the shape of `rate`, for zinb alone.
        features: (F,), those that are scored; None: all.
    """
    dense = isinstance(counts, Tensor)
    if isinstance(counts, Tensor):
        values = (counts if features is None else counts[:, features]).contiguous()
        profiles = values, values, values, values  # the first three are not read
    else:
        place = _place_features(counts.n_features, features, rate.device)
        profiles = counts.indptr, counts.indices, place, counts.values
    kind, flat = FUSED_LIKELIHOODS[likelihood], rate.flatten(0, -2)
    gate = flat if gate is None else gate.flatten(0, -2)  # which other kinds do not read
    scores: Tensor = _FusedScores.apply(kind, dense, *profiles, flat, theta, gate, library)
    return scores.view(rate.shape[:-1])


def _place_features(n_features: int, features: Tensor | None, device: torch.device) -> Tensor:
    """Which of the scored features each feature is, (n_features,) int32; -1: none."""
    if features is None:
        return torch.arange(n_features, dtype=torch.int32, device=device)
    place = torch.full((n_features,), -1, dtype=torch.int32, device=device)
    place[features] = torch.arange(len(features), dtype=torch.int32, device=device)
    return place


class _FusedScores(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        kind: int,
        dense: bool,
        indptr: Tensor,
        indices: Tensor,
        place: Tensor,
        values: Tensor,
        rate: Tensor,
        theta: Tensor,
        gate: Tensor,
        library: Tensor,
    ) -> Tensor:
        rate, theta, gate = rate.contiguous(), theta.contiguous(), gate.contiguous()
        scores = torch.empty_like(rate[:, 0])
        profiles = indptr, indices, place, values
        inputs = *profiles, rate, theta, gate, library.log().contiguous()
        sizes = rate.shape[1], len(library)
        _score_rows[(len(rate),)](*inputs, scores, *sizes, KIND=kind, DENSE=dense, BLOCK=BLOCK)
        ctx.save_for_backward(*inputs)
        ctx.kind, ctx.dense = kind, dense
        return scores

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:  # type: ignore[override]
        *profiles, values, rate, theta, gate, log_library = ctx.saved_tensors
        n_rows, width = rate.shape
        uses_theta, uses_gate = ctx.kind >= NB.value, ctx.kind == ZINB.value
        # Every element is written: by the terms of all features first, by non-zeros after that.
        rate_gradient, theta_gradient = torch.empty_like(rate), torch.zeros_like(theta)
        gate_gradient = torch.empty_like(gate) if uses_gate else rate_gradient
        gradients = rate_gradient, theta_gradient, gate_gradient
        rest = values, rate, theta, gate, log_library, gradient.contiguous(), *gradients
        sizes = width, len(log_library)
        options = {"KIND": ctx.kind, "BLOCK": BLOCK}
        grid = (triton.cdiv(width, BLOCK), triton.cdiv(n_rows, ROWS_PER_PROGRAM))
        rows = {"ROWS": ROWS_PER_PROGRAM, "DENSE": ctx.dense}
        _write_column_gradients[grid](*rest, *sizes, n_rows, **rows, **options)
        if not ctx.dense:
            _add_entry_gradients[(n_rows,)](*profiles, *rest, *sizes, **options)
        by_theta = theta_gradient if uses_theta else None
        by_gate = gate_gradient if uses_gate else None
        return *[None] * 6, rate_gradient, by_theta, by_gate, None


@triton.jit
def _load_scored_entries(indices, place, values, entry, end):
    """Columns and values of non-zeros; which of `entry` are there, and of a scored feature."""
    feature, value, inside = load_entries(indices, values, entry, end)
    column = tl.load(place + feature, mask=inside, other=-1)
    return column, value, column >= 0


@triton.jit
def _load_parameters(rate, theta, gate, start, column, mask, KIND: tl.constexpr):
    """Rate, theta and gate of some features of the row that begins at `start`; unread: rates."""
    rates = tl.load(rate + start + column, mask=mask, other=0.0)
    thetas, gates = rates, rates
    if KIND >= NB:
        thetas = tl.load(theta + column, mask=mask, other=0.0)
    if KIND == ZINB:
        gates = tl.load(gate + start + column, mask=mask, other=0.0)
    return rates, thetas, gates


@triton.jit
def _log_zero(rate, theta, gate, log_library, KIND: tl.constexpr):
    """ln p(0), its derivatives by rate, by theta and by gate."""
    if KIND == NB:
        value, by_rate, by_theta = _log_zero_of_nb(rate, theta, log_library)
        return value, by_rate, by_theta, value * 0.0
    elif KIND == ZINB:
        value, by_rate, by_theta = _log_zero_of_nb(rate, theta, log_library)
        of_nb = sigmoid(value - gate)  # p(the count is the negative binomial's | it is 0)
        larger = tl.maximum(-softplus(-gate), value - softplus(gate))
        return (
            larger + log1p(tl.exp(-tl.abs(value - gate))),
            of_nb * by_rate,
            of_nb * by_theta,
            sigmoid(-gate) - of_nb,
        )
    elif KIND == POISSON:
        mean = tl.exp(log_library - softplus(-rate))
        return -mean, -mean * sigmoid(-rate), mean * 0.0, mean * 0.0
    elif KIND == BERNOULLI:
        odds = rate + log_library
        return -softplus(odds), -sigmoid(odds), odds * 0.0, odds * 0.0
    else:
        scaled = rate * tl.exp(-theta)
        by_rate = -scaled * tl.exp(-theta)
        return -0.5 * scaled * scaled - theta, by_rate, scaled * scaled - 1.0, rate * 0.0


@triton.jit
def _log_zero_of_nb(rate, theta, log_library):
    """ln p(0) of the negative binomial, its derivatives by rate and by theta."""
    most = tl.minimum(theta, MOST_THETA)
    r, excess = tl.exp(most), log_library - softplus(-rate) - most
    share = r * sigmoid(excess)
    value = -r * softplus(excess)
    return value, -share * sigmoid(-rate), tl.where(theta <= MOST_THETA, value + share, 0.0)


@triton.jit
def _log_gain(x, rate, theta, gate, log_library, KIND: tl.constexpr):
    """ln p(x) - ln p(0), its derivatives by rate, by theta and by gate."""
    if KIND == NB:
        value, by_rate, by_theta = _log_gain_of_nb(x, rate, theta, log_library)
        return value, by_rate, by_theta, x * 0.0
    elif KIND == ZINB:
        zero, zero_by_rate, zero_by_theta = _log_zero_of_nb(rate, theta, log_library)
        value, by_rate, by_theta = _log_gain_of_nb(x, rate, theta, log_library)
        positive = tl.where(x > 0, 1.0, 0.0)
        extra = positive * sigmoid(gate - zero)  # p(the zero would have been an extra one)
        return (
            value - positive * softplus(gate - zero),
            by_rate + extra * zero_by_rate,
            by_theta + extra * zero_by_theta,
            -extra,
        )
    elif KIND == POISSON:
        return x * (log_library - softplus(-rate)), x * sigmoid(-rate), x * 0.0, x * 0.0
    elif KIND == BERNOULLI:
        is_open = tl.where(x > 0, 1.0, 0.0)
        return is_open * (rate + log_library), is_open, x * 0.0, x * 0.0
    else:
        precision = tl.exp(-2.0 * theta)
        value = (x * rate - 0.5 * x * x) * precision
        return value, x * precision, -2.0 * value, x * 0.0


@triton.jit
def _log_gain_of_nb(x, rate, theta, log_library):
    """ln p(x) - ln p(0) of the negative binomial, its derivatives by rate and by theta."""
    most = tl.minimum(theta, MOST_THETA)
    r, excess = tl.exp(most), log_library - softplus(-rate) - most
    left = x * sigmoid(-excess)
    value = log_rising_factorial(r, x) - x * softplus(-excess)
    by_theta = tl.where(theta <= MOST_THETA, r * rising_factorial_slope(r, x) - left, 0.0)
    return value, left * sigmoid(-rate), by_theta


@triton.jit
def _log_dense(x, rate, theta, gate, log_library, KIND: tl.constexpr):
    """ln p(x), its derivatives by rate, by theta and by gate."""
    if KIND == NORMAL:  # not as a difference, see `model.likelihoods.Normal.score_values`
        precision = tl.exp(-theta)
        scaled = (x - rate) * precision
        return -0.5 * scaled * scaled - theta, scaled * precision, scaled * scaled - 1.0, x * 0.0
    else:
        zero, zero_by_rate, zero_by_theta, zero_by_gate = _log_zero(
            rate, theta, gate, log_library, KIND
        )
        gain, by_rate, by_theta, by_gate = _log_gain(x, rate, theta, gate, log_library, KIND)
        return (
            zero + gain,
            zero_by_rate + by_rate,
            zero_by_theta + by_theta,
            zero_by_gate + by_gate,
        )


@triton.jit
def _log_column(
    values,
    start,
    column,
    mask,
    rate,
    theta,
    gate,
    log_library,
    KIND: tl.constexpr,
    DENSE: tl.constexpr,
):
    """ln p of the dense profile that begins at `start`, else ln p(0), and the derivatives."""
    if DENSE:
        x = tl.load(values + start + column, mask=mask, other=0.0)
        return _log_dense(x, rate, theta, gate, log_library, KIND)
    else:
        return _log_zero(rate, theta, gate, log_library, KIND)


@triton.jit
def _score_rows(
    indptr,
    indices,
    place,
    values,
    rate,
    theta,
    gate,
    log_library,
    scores,
    width,
    n_cells,
    KIND: tl.constexpr,
    DENSE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One program for each row: ln p(0) of all scored features, then what its non-zeros add.

    Of a dense profile it is ln p(x) at once.
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
        rates, thetas, gates = _load_parameters(rate, theta, gate, row * width, column, mask, KIND)
        value, _, _, _ = _log_column(
            values, cell * width, column, mask, rates, thetas, gates, size, KIND, DENSE
        )
        sums += tl.where(mask, value, 0.0)
    if not DENSE:
        start, end = tl.load(indptr + cell), tl.load(indptr + cell + 1)
        for first in range(start, end, BLOCK):
            column, x, mask = _load_scored_entries(indices, place, values, first + lanes, end)
            rates, thetas, gates = _load_parameters(
                rate, theta, gate, row * width, column, mask, KIND
            )
            value, _, _, _ = _log_gain(x, rates, thetas, gates, size, KIND)
            sums += tl.where(mask, value, 0.0)
    tl.store(scores + row, tl.sum(sums, 0))


@triton.jit
def _write_column_gradients(
    values,
    rate,
    theta,
    gate,
    log_library,
    gradient,
    rate_gradient,
    theta_gradient,
    gate_gradient,
    width,
    n_cells,
    n_rows,
    ROWS: tl.constexpr,
    DENSE: tl.constexpr,
    KIND: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One program for a block of features and some rows: the gradient of ln p(0).

    Of a dense profile it is that of ln p(x).
    """
    column = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = column < width
    sums = tl.zeros([BLOCK], tl.float32)
    first = tl.program_id(1) * ROWS
    for number in range(first, tl.minimum(first + ROWS, n_rows)):
        row = tl.cast(number, tl.int64)
        cell = row % n_cells
        size = tl.load(log_library + cell)
        rates, thetas, gates = _load_parameters(rate, theta, gate, row * width, column, mask, KIND)
        _, by_rate, by_theta, by_gate = _log_column(
            values, cell * width, column, mask, rates, thetas, gates, size, KIND, DENSE
        )
        factor = tl.load(gradient + row)
        tl.store(rate_gradient + row * width + column, factor * by_rate, mask=mask)
        if KIND == ZINB:
            tl.store(gate_gradient + row * width + column, factor * by_gate, mask=mask)
        sums += factor * by_theta
    if KIND >= NB:
        tl.atomic_add(theta_gradient + column, sums, mask=mask)


@triton.jit
def _add_entry_gradients(
    indptr,
    indices,
    place,
    values,
    rate,
    theta,
    gate,
    log_library,
    gradient,
    rate_gradient,
    theta_gradient,
    gate_gradient,
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
        column, x, mask = _load_scored_entries(indices, place, values, first + lanes, end)
        rates, thetas, gates = _load_parameters(rate, theta, gate, row * width, column, mask, KIND)
        _, by_rate, by_theta, by_gate = _log_gain(x, rates, thetas, gates, size, KIND)
        # No other program and no other non-zero of this cell has these elements.
        target = rate_gradient + row * width + column
        before = tl.load(target, mask=mask, other=0.0)
        tl.store(target, before + factor * by_rate, mask=mask)
        if KIND == ZINB:
            target = gate_gradient + row * width + column
            before = tl.load(target, mask=mask, other=0.0)
            tl.store(target, before + factor * by_gate, mask=mask)
        if KIND >= NB:
            tl.atomic_add(theta_gradient + column, factor * by_theta, mask=mask)
