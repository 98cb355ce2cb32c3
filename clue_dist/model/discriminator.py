"""q(k | z; psi), eq. 12: which modality was this z inferred from?"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from clue_dist.config import DiscriminatorConfig
from clue_dist.model.layers import MLP
from clue_dist.model.noise import Noise


class Discriminator(nn.Module):
    """z: (B, K source, K * a), the aligned dimensions as inferred from each source -> logits (B, K source, K)."""

    def __init__(self, n_modalities: int, latent: int, config: DiscriminatorConfig) -> None:
        super().__init__()
        self.mlp = MLP(n_modalities * latent, config.hidden, config.depth, config.dropout)
        self.out = nn.Linear(self.mlp.width, n_modalities)

    def forward(self, z: Tensor, noise: Noise | None) -> Tensor:
        # One pass over all sources: (K, B, .) flattened, each source with the dropout of its cell's row.
        n_cells, n_sources, width = z.shape
        flat = z.transpose(0, 1).reshape(-1, width).to(self.out.weight.dtype)
        rows = torch.arange(n_cells, device=z.device).repeat(n_sources)
        logits: Tensor = self.out(self.mlp(flat, noise, rows)).float()
        return logits.view(n_sources, n_cells, -1).transpose(0, 1)
