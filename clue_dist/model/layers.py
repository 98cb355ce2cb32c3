"""Layers that trunk, decoders and discriminator share: an MLP, an ensemble, gradient reversal."""

from __future__ import annotations

from itertools import pairwise
from typing import Any, cast

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


class Ensemble(nn.Module):
    """M independent MLPs on the same input. What all of them find is unlikely to be chance."""

    def __init__(self, members: int, width: int, hidden: int, depth: int, dropout: float) -> None:
        super().__init__()
        widths = [width, *[hidden] * depth]
        self.layers = nn.ModuleList(EnsembleLayer(members, a, b) for a, b in pairwise(widths))
        self.members, self.dropout, self.width = members, dropout, widths[-1]

    def forward(self, x: Tensor, noise: Noise | None, rows: Tensor | None = None) -> Tensor:
        """(n, inputs) -> (M, n, width); rows: (n,), the cells' rows in the batch, None for all."""
        x = x.expand(self.members, *x.shape)
        for layer in self.layers:
            if noise is not None and self.training:
                x = noise.apply_dropout(x, self.dropout, rows)
            x = layer(x)
        return x

    @torch.no_grad()
    def apply_linear(self, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        """Apply the ensemble and a linear layer of each member, without dropout.

        But for its deviation, which is divided out behind the next layer, a layer norm is linear,
        and goes into the weights of that layer. So what a layer hands on is read less often.

        Args:
            x: (n, inputs), float32.
            weight: (M, width, outputs), of the linear layer.
            bias: (M, 1, outputs).

        Returns:
            (M, n, outputs).
        """
        layers = [cast(EnsembleLayer, layer) for layer in self.layers]
        x = x.expand(self.members, *x.shape)
        x = torch.baddbmm(layers[0].bias, x, layers[0].weight)
        following = [(layer.weight, layer.bias) for layer in layers[1:]] + [(weight, bias)]
        for layer, (next_weight, next_bias) in zip(layers, following, strict=True):
            x = F.gelu(x)
            shift = torch.baddbmm(next_bias, layer.norm_bias, next_weight)
            scaled = layer.norm_scale.mT * next_weight
            centred = scaled - scaled.mean(1, keepdim=True)
            square = torch.linalg.vector_norm(x, dim=-1, keepdim=True) ** 2 / x.shape[-1]
            # Of units that hardly differ the difference may round to less than 0.
            variance = (square - x.mean(-1, keepdim=True) ** 2).clamp_min(0)
            x = torch.addcmul(shift, torch.bmm(x, centred), (variance + NORM_EPSILON).rsqrt())
        return x


class EnsembleLayer(nn.Module):
    """linear -> GELU -> layer norm for each of M members: (M, n, inputs) -> (M, n, outputs)."""

    def __init__(self, members: int, inputs: int, outputs: int) -> None:
        super().__init__()
        self.weight = nn.Parameter((torch.rand(members, inputs, outputs) * 2 - 1) / inputs**0.5)
        self.bias = nn.Parameter(torch.zeros(members, 1, outputs))
        self.norm_scale = nn.Parameter(torch.ones(members, 1, outputs))
        self.norm_bias = nn.Parameter(torch.zeros(members, 1, outputs))

    def forward(self, x: Tensor) -> Tensor:
        """(M, n, inputs) -> (M, n, outputs)."""
        x = F.gelu(torch.baddbmm(self.bias, x, self.weight))
        x = F.layer_norm(x, x.shape[-1:], eps=NORM_EPSILON)
        # Autocast would make float32 of all three, and turn that back in the next layer.
        return torch.addcmul(self.norm_bias.to(x.dtype), x, self.norm_scale.to(x.dtype))


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
