"""Layers that trunk, decoders and discriminator share: an MLP, an ensemble, gradient reversal."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from clue_dist.model.noise import Noise


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
        return torch.addcmul(self.norm_bias, F.layer_norm(x, x.shape[-1:]), self.norm_scale)


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
