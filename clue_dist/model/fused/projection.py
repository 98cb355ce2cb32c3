"""Raw counts in CSR -> normalised -> projected, in one pass over the non-zeros.

The PyTorch twin is `model.trunk.normalise_counts` with `Projection` and `compute_size_inputs`,
which walk over the non-zeros once for each step.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from clue_dist.data.batch import SparseCounts
from clue_dist.model.fused.functions import load_entries, log1p

BLOCK = 32  # non-zeros that a program holds at a time, each with a row of weights
SCALED_METHODS = "log_cp10k", "tfidf"  # to 10,000 counts a cell
LOGGED_METHODS = "log_cp10k", "tfidf", "log"


def project_counts(
    counts: SparseCounts, method: str, idf: Tensor | None, weight: Tensor, bias: Tensor
) -> tuple[Tensor, Tensor]:
    """Normalise and project counts.

    Args:
        counts: n profiles.
        method: as `model.trunk.normalise_counts` has it, but for clr, which is for dense counts.
        idf: (features,), for tfidf.
        weight: (features, components).
        bias: (components,).

    Returns:
        (n, components), in the type of the weights, and what `compute_size_inputs` gives, (n, 2).
    """
    projected, total, detected = _RowProjection.apply(counts, method, idf, weight)
    sizes = torch.stack([total, detected], 1).clamp_min(1.0).log()
    return projected.to(weight.dtype) + bias, sizes


class _RowProjection(torch.autograd.Function):
    """The product with the weights, which alone have a gradient."""

    @staticmethod
    def forward(
        ctx: Any, counts: SparseCounts, method: str, idf: Tensor | None, weight: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        n_cells, width = len(counts.indptr) - 1, weight.shape[1]
        projected = weight.new_empty(n_cells, width, dtype=torch.float32)
        total, detected, scale = (torch.empty_like(projected[:, 0]) for _ in range(3))
        options = {
            "HAS_IDF": idf is not None,
            "SCALED": method in SCALED_METHODS,
            "LOGGED": method in LOGGED_METHODS,
            "BLOCK": BLOCK,
            "WIDTH": triton.next_power_of_2(width),
        }
        sparse = counts.indptr, counts.indices, counts.values, counts.values if idf is None else idf
        _project_rows[(n_cells,)](
            *sparse, weight.contiguous(), projected, total, detected, scale, width, **options
        )
        ctx.save_for_backward(*sparse, scale)
        ctx.options, ctx.shape, ctx.dtype = options, weight.shape, weight.dtype
        ctx.mark_non_differentiable(total, detected)
        return projected, total, detected

    @staticmethod
    def backward(ctx: Any, gradient: Tensor, *_: Tensor) -> Any:  # type: ignore[override]
        *sparse, scale = ctx.saved_tensors
        weight_gradient = gradient.new_zeros(ctx.shape)
        if ctx.needs_input_grad[3]:
            _add_row_gradients[(len(gradient),)](
                *sparse, scale, gradient.contiguous(), weight_gradient, ctx.shape[1], **ctx.options
            )
        return None, None, None, weight_gradient.to(ctx.dtype)


@triton.jit
def _normalise(x, column, idf, scale, mask, HAS_IDF: tl.constexpr, LOGGED: tl.constexpr):
    """Normalised values of non-zeros."""
    if HAS_IDF:
        x = x * tl.load(idf + column, mask=mask, other=0.0)
    x = x * scale
    if LOGGED:
        x = log1p(x)
    return x


@triton.jit
def _project_rows(
    indptr,
    indices,
    values,
    idf,
    weight,
    projected,
    total,
    detected,
    scales,
    width,
    HAS_IDF: tl.constexpr,
    SCALED: tl.constexpr,
    LOGGED: tl.constexpr,
    BLOCK: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """One program for each cell: its sums first, then its non-zeros times rows of the weights."""
    row = tl.program_id(0).to(tl.int64)
    start, end = tl.load(indptr + row), tl.load(indptr + row + 1)
    places = tl.arange(0, BLOCK)
    counted = tl.zeros([BLOCK], tl.float32)
    seen = tl.zeros([BLOCK], tl.float32)
    mass = tl.zeros([BLOCK], tl.float32)
    for first in range(start, end, BLOCK):
        column, x, mask = load_entries(indices, values, first + places, end)
        counted += x
        seen += tl.where(x > 0, 1.0, 0.0)
        mass += _normalise(x, column, idf, 1.0, mask, HAS_IDF, False)
    scale = 1.0
    if SCALED:
        scale = 1e4 / tl.maximum(tl.sum(mass, 0), 1e-9)
    tl.store(total + row, tl.sum(counted, 0))
    tl.store(detected + row, tl.sum(seen, 0))
    tl.store(scales + row, scale)
    components = tl.arange(0, WIDTH)
    sums = tl.zeros([WIDTH], tl.float32)
    for first in range(start, end, BLOCK):
        column, x, mask = load_entries(indices, values, first + places, end)
        x = _normalise(x, column, idf, scale, mask, HAS_IDF, LOGGED)
        weights = tl.load(
            weight + column.to(tl.int64)[:, None] * width + components[None, :],
            mask=mask[:, None] & (components < width)[None, :],
            other=0.0,
        )
        sums += tl.sum(x[:, None] * weights.to(tl.float32), 0)
    tl.store(projected + row * width + components, sums, mask=components < width)


@triton.jit
def _add_row_gradients(
    indptr,
    indices,
    values,
    idf,
    scales,
    gradient,
    weight_gradient,
    width,
    HAS_IDF: tl.constexpr,
    SCALED: tl.constexpr,
    LOGGED: tl.constexpr,
    BLOCK: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """One program for each cell adds its part to the rows of the weights that it has used."""
    row = tl.program_id(0).to(tl.int64)
    start, end = tl.load(indptr + row), tl.load(indptr + row + 1)
    scale = tl.load(scales + row)
    places, components = tl.arange(0, BLOCK), tl.arange(0, WIDTH)
    slope = tl.load(gradient + row * width + components, mask=components < width, other=0.0)
    for first in range(start, end, BLOCK):
        column, x, mask = load_entries(indices, values, first + places, end)
        x = _normalise(x, column, idf, scale, mask, HAS_IDF, LOGGED)
        tl.atomic_add(
            weight_gradient + column.to(tl.int64)[:, None] * width + components[None, :],
            x[:, None] * slope[None, :],
            mask=mask[:, None] & (components < width)[None, :],
        )
