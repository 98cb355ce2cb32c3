"""Layers that trunk, decoders and discriminator share: an MLP, an ensemble, gradient reversal."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from clue_dist.model.noise import Noise

NORM_EPSILON = 1e-5  # added to the variance in the layer norms of an ensemble


class MLP(nn.Module):
    """depth times (dropout -> linear -> GELU -> layer norm).

    Batch norm instead would make weights depend on the number of ranks.
    """

    def __init__(self, width: int, hidden: int, depth: int, dropout: float) -> None:
        super().__init__()
        widths = [width, *[hidden] * depth]
        self.linear = nn.ModuleList(nn.Linear(a, b) for a, b in pairwise(widths))
        self.norm = nn.ModuleList(nn.LayerNorm(hidden) for _ in range(depth))
        self.dropout, self.width = dropout, widths[-1]

    def forward(self, x: Tensor, noise: Noise | None, rows: Tensor | None = None) -> Tensor:
        """(n, inputs) -> (n, width); rows: (n,), the cells' rows in the batch, None for all."""
        for linear, norm in zip(self.linear, self.norm, strict=True):
            if noise is not None and self.training:
                x = noise.apply_dropout(x, self.dropout, rows)
            x = norm(F.gelu(linear(x)))
        return x


class Affine(NamedTuple):
    """What a layer norm does to normalised values: x * scale + shift, for each of M networks."""

    scale: Tensor  # (M or 1, 1, width)
    shift: Tensor

    def fold_into(self, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
        """Fold this into the linear layer behind it, which then reads normalised values.

        Weights have fewer rows than a batch has cells, and the input of a network needs no gradient
        any more.

        Args:
            weight: (M, width, outputs).
            bias: (M, 1, outputs).
        """
        # No product of matrices: to cast all weights for one row would take longer.
        shift = (self.shift.mT * weight).sum(1, keepdim=True)
        return self.scale.mT * weight, bias + shift


# Read where it is folded: under ZeRO-3 weights are whole only in the module that reads them.
ReadAffine = Callable[[], Affine]


class Ensemble(nn.Module):
    """M independent MLPs on the same input. What all of them find is unlikely to be chance.

    Each is depth times (dropout -> linear -> GELU -> layer norm). The scale and shift of a norm are
    folded into the linear layer behind it.
    """

    def __init__(self, members: int, width: int, hidden: int, depth: int, dropout: float) -> None:
        super().__init__()
        widths = [width, *[hidden] * depth]
        self.layers = nn.ModuleList(EnsembleLayer(members, a, b) for a, b in pairwise(widths))
        self.members, self.dropout, self.width = members, dropout, widths[-1]

    def forward(
        self, x: Tensor, affine: ReadAffine, noise: Noise | None, rows: Tensor | None
    ) -> tuple[Tensor, ReadAffine]:
        """Apply all layers.

        Args:
            x: (n, inputs), normalised.
            affine: what is still to be done to it.
            noise: for dropout, in training.
            rows: (n,), the cells' rows in the batch; None: all of them.

        Returns:
            (M, n, width), normalised, and what is still to be done to it.
        """
        x = x.expand(self.members, *x.shape)
        for layer in self.layers:
            if noise is not None and self.training:
                x = noise.apply_dropout(x, self.dropout, rows)
            x, affine = layer(x, affine), cast(EnsembleLayer, layer).read_affine
        return x, affine

    @torch.no_grad()
    def infer_linear(self, x: Tensor, affine: ReadAffine, weight: Tensor, bias: Tensor) -> Tensor:
        """Apply all layers and a linear one, without dropout, and faster on many cells.

        But for its deviation, which is divided out behind the next layer, a layer norm is linear,
        and goes into the weights of that layer. So what a layer hands on is read less often, and
        it is written over where nobody reads it again, as other memory would not be in the cache.

        Args:
            x: (n, inputs), float32, normalised.
            affine: what is still to be done to it.
            weight: (M, hidden, outputs), of the last, linear layer.
            bias: (M, 1, outputs).

        Returns:
            (M, n, outputs).
        """
        layers = [cast(EnsembleLayer, layer) for layer in self.layers]
        x = x.expand(self.members, *x.shape)
        first_weight, first_bias = affine().fold_into(layers[0].weight, layers[0].bias)
        x = torch.baddbmm(first_bias, x, first_weight)
        following = [(layer.weight, layer.bias) for layer in layers[1:]] + [(weight, bias)]
        for layer, linear in zip(layers, following, strict=True):
            x = torch.ops.aten.gelu_(x)
            scaled, shift = layer.read_affine().fold_into(*linear)
            centred = scaled - scaled.mean(1, keepdim=True)
            square = torch.linalg.vector_norm(x, dim=-1, keepdim=True) ** 2 / x.shape[-1]
            # Of units that hardly differ the difference may round to less than 0.
            variance = (square - x.mean(-1, keepdim=True) ** 2).clamp_min(0)
            x = torch.bmm(x, centred)
            torch.addcmul(shift, x, (variance + NORM_EPSILON).rsqrt(), out=x)
        return x


class EnsembleLayer(nn.Module):
    """linear -> GELU -> layer norm for each of M members, but for the scale and shift of the norm.

    The layer behind it takes care of these.
    """

    def __init__(self, members: int, inputs: int, outputs: int) -> None:
        super().__init__()
        self.weight = nn.Parameter((torch.rand(members, inputs, outputs) * 2 - 1) / inputs**0.5)
        self.bias = nn.Parameter(torch.zeros(members, 1, outputs))
        self.norm_scale = nn.Parameter(torch.ones(members, 1, outputs))
        self.norm_bias = nn.Parameter(torch.zeros(members, 1, outputs))

    def read_affine(self) -> Affine:
        """Scale and shift of the layer norm."""
        return Affine(self.norm_scale, self.norm_bias)

    def forward(self, x: Tensor, affine: ReadAffine) -> Tensor:
        """(M, n, inputs), normalised, and what is still to be done to it -> (M, n, outputs)."""
        weight, bias = affine().fold_into(self.weight, self.bias)
        x = F.gelu(torch.baddbmm(bias, x, weight))
        return F.layer_norm(x, x.shape[-1:], eps=NORM_EPSILON)


class _GradientReversal(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:  # type: ignore[override]
        return -gradient


def reverse_gradient(x: Tensor) -> Tensor:
    """Identity forward, minus the gradient backward (Ganin and Lempitsky, 2015).

    So one pass both maximises and minimises the adversarial term of eq. 15.
    """
    same: Tensor = _GradientReversal.apply(x)
    return same
