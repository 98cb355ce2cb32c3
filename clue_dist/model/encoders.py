"""The K x K grid of encoders q(z_j | x_k): small heads on K trunks, one batched product."""

from __future__ import annotations

import torch
from torch import Tensor, nn

MAX_LOG_VARIANCE = 8.0


class Heads(nn.Module):
    """h of every source modality -> mean and log-variance of every target's z. The wide layers are in the trunks, so
    parameters grow as K there and as K^2 only here."""

    def __init__(self, n_modalities: int, width: int, latent: int) -> None:
        super().__init__()
        self.k, self.latent = n_modalities, latent
        out = n_modalities * 2 * latent
        self.weight = nn.Parameter(torch.randn(n_modalities, width, out) / width**0.5)
        self.bias = nn.Parameter(torch.zeros(n_modalities, 1, out))
        with torch.no_grad():  # start with a standard deviation of about 0.4, whatever the input
            grid = self.weight.view(n_modalities, width, n_modalities, 2, latent)
            grid[:, :, :, 1].mul_(0.1)
            self.bias.view(n_modalities, 1, n_modalities, 2, latent)[:, :, :, 1].fill_(-2.0)

    def forward(self, h: Tensor) -> tuple[Tensor, Tensor]:
        """h: (K, B, H) by source -> mean, log-variance: (B, K source, K target, d), float32."""
        out = torch.baddbmm(self.bias, h, self.weight)  # (K, B, K * 2 * d)
        out = out.view(self.k, -1, self.k, 2, self.latent).transpose(0, 1).float()
        return out[:, :, :, 0], out[:, :, :, 1].clamp(-MAX_LOG_VARIANCE, MAX_LOG_VARIANCE)
