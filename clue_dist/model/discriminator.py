"""q(k | z; psi) of eq. 12: which modality was this z inferred from?"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from clue_dist.config import DiscriminatorConfig
from clue_dist.model.layers import MLP
from clue_dist.model.noise import Noise


class Discriminator(nn.Module):
    """The aligned dimensions of z, K times a of them, -> logits of the K modalities."""

    def __init__(self, n_modalities: int, n_aligned: int, config: DiscriminatorConfig) -> None:
        super().__init__()
        self.mlp = MLP(n_modalities * n_aligned, config.hidden, config.depth, config.dropout)
        self.out = nn.Linear(self.mlp.width, n_modalities)

    def forward(self, z: Tensor, noise: Noise | None) -> Tensor:
        """z as inferred from each source, (B, K source, K * a) -> logits (B, K source, K)."""
        # All sources in one pass, one behind the other; a cell has the same dropout in each.
        n_cells, n_sources, width = z.shape
        flat = z.transpose(0, 1).reshape(-1, width).to(self.out.weight.dtype)
        rows = torch.arange(n_cells, device=z.device).repeat(n_sources)
        logits: Tensor = self.out(self.mlp(flat, noise, rows)).float()
        return logits.view(n_sources, n_cells, -1).transpose(0, 1)
