"""The K x K grid of encoders q(z_j | x_k): small heads on K trunks, one batched product."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

MAX_LOG_VARIANCE = 8.0


class Heads(nn.Module):
    """h of every source modality -> mean and log-variance of every target's z. The wide layers are in the trunks, so
    parameters grow as K there and as K^2 only here."""

    def __init__(self, n_modalities: int, members: int, width: int, latent: int) -> None:
        super().__init__()
        self.grid = (n_modalities, 2, latent // members)  # of what one member says: (K target, 2, d / M)
        k, out = n_modalities * members, math.prod(self.grid)
        self.weight = nn.Parameter(torch.randn(k, width, out) / width**0.5)
        self.bias = nn.Parameter(torch.zeros(k, 1, out))
        with torch.no_grad():  # start with a standard deviation of about 0.4, whatever the input
            self.weight.view(k, width, *self.grid)[:, :, :, 1].mul_(0.1)
            self.bias.view(k, 1, *self.grid)[:, :, :, 1].fill_(-2.0)

    def forward(self, h: Tensor) -> tuple[Tensor, Tensor]:
        """h: (K, M, B, H) by source -> mean, log-variance: (B, K source, K target, d), float32.

        Each of the M members of a trunk gives d / M of the d dimensions of every z.
        """
        k, members, n, _ = h.shape
        out = torch.baddbmm(self.bias, h.flatten(0, 1), self.weight)  # (K * M, B, K * 2 * d / M)
        out = out.view(k, members, n, *self.grid).permute(2, 0, 3, 4, 1, 5).flatten(-2).float()  # (B, K, K, 2, d)
        return out[:, :, :, 0], out[:, :, :, 1].clamp(-MAX_LOG_VARIANCE, MAX_LOG_VARIANCE)
