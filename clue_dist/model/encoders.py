"""The K x K grid of encoders q(z_j | x_k): small heads on K trunks, one batched product."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

MAX_LOG_VARIANCE = 8.0


class CrossEncoderHeads(nn.Module):
    """h of every source modality -> mean and log-variance of every target's z. The wide layers are in the trunks, so
    parameters grow as K there and as K^2 only here."""

    def __init__(
        self, n_modalities: int, members: int, width: int, latent: int, shared: bool = True
    ) -> None:
        super().__init__()
        self.k, self.members, self.shared = n_modalities, members, shared
        targets = n_modalities if shared else 1  # that one network speaks of
        self.grid = (targets, 2, latent // members)
        networks, out = n_modalities**2 * members // targets, math.prod(self.grid)
        self.weight = nn.Parameter(torch.randn(networks, width, out) / width**0.5)
        self.bias = nn.Parameter(torch.zeros(networks, 1, out))
        with torch.no_grad():  # start with a standard deviation of about 0.4, whatever the input
            self.weight.view(networks, width, *self.grid)[:, :, :, 1].mul_(0.1)
            self.bias.view(networks, 1, *self.grid)[:, :, :, 1].fill_(-2.0)

    def forward(self, h: Tensor) -> tuple[Tensor, Tensor]:
        """h: (K, N, B, H) by source -> mean, log-variance: (B, K source, K target, d), float32.

        N networks a source: M members of one trunk, or, not shared, M of each of K targets. Each member gives every
        M-th of the d dimensions of every z.
        """
        out = torch.baddbmm(self.bias, h.flatten(0, 1), self.weight)
        if self.shared:
            out = out.view(self.k, self.members, -1, *self.grid).permute(2, 0, 3, 4, 5, 1)
        else:
            out = out.view(self.k, self.members, self.k, -1, *self.grid[1:]).permute(
                3, 0, 2, 4, 5, 1
            )
        out = out.flatten(-2).float()  # (B, K source, K target, 2, d)
        return out[:, :, :, 0], out[:, :, :, 1].clamp(-MAX_LOG_VARIANCE, MAX_LOG_VARIANCE)
