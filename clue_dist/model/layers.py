"""Layers that trunk, decoders and discriminator share: dropout keyed by cell, an MLP, gradient reversal."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from clue_dist.model.noise import Noise


class MLP(nn.Module):
    """depth x (dropout -> linear -> GELU -> layer norm). Batch statistics instead would depend on the ranks."""

    def __init__(self, width: int, hidden: int, depth: int, dropout: float) -> None:
        super().__init__()
        widths = [width, *[hidden] * depth]
        self.linear = nn.ModuleList(nn.Linear(a, b) for a, b in pairwise(widths))
        self.norm = nn.ModuleList(nn.LayerNorm(hidden) for _ in range(depth))
        self.dropout, self.width = dropout, widths[-1]

    def forward(self, x: Tensor, noise: Noise | None, rows: Tensor | None = None) -> Tensor:
        """x: (n, width) -> (n, hidden). rows: which cells of the batch these are, None = all of them, in order."""
        for linear, norm in zip(self.linear, self.norm, strict=True):
            if noise is not None and self.training:
                x = noise.dropout(x, self.dropout, rows)
            x = norm(F.gelu(linear(x)))
        return x


class _Reverse(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:  # type: ignore[override]
        return -gradient


def reverse_gradient(x: Tensor) -> Tensor:
    """Identity forward, minus the gradient backward (Ganin and Lempitsky, 2015): eq. 15's min-max in one pass."""
    out: Tensor = _Reverse.apply(x)
    return out
