"""p(x_k | z_k): z_k and the cell's batch -> parameters of the modality's likelihood."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from clue_dist.config import DecoderConfig
from clue_dist.data.batch import Counts, SparseCounts, compute_library_size
from clue_dist.model.layers import MLP
from clue_dist.model.likelihoods import (
    LIKELIHOODS,
    LikelihoodParameters,
    compute_log_likelihood,
)
from clue_dist.model.noise import Noise

BATCH_WIDTH = 16  # components that describe a biological batch to the decoder


class Decoder(nn.Module):
    """z (n, d) and batch code (n,) -> ln p(x | z). Batch enters here alone, so an unseen batch can be embedded."""

    def __init__(
        self,
        likelihood: str,
        n_features: int,
        n_batches: int,
        latent: int,
        config: DecoderConfig,
    ) -> None:
        super().__init__()
        self.likelihood, self.n_features = LIKELIHOODS[likelihood], n_features
        self.batch = nn.Embedding(n_batches, BATCH_WIDTH) if n_batches > 1 else None
        self.mlp = MLP(
            latent + (BATCH_WIDTH if self.batch else 0), config.hidden, config.depth, config.dropout
        )
        self.rate = OutputLayer(self.mlp.width, n_features)
        self.gate = OutputLayer(self.mlp.width, n_features) if self.likelihood.has_gate else None
        self.theta = SecondParameter(n_features, self.likelihood.theta_learning_rate)

    def forward(
        self,
        z: Tensor,
        batch_code: Tensor,
        counts: Counts,
        noise: Noise | None = None,
        rows: Tensor | None = None,
        features: Tensor | None = None,
    ) -> Tensor:
        """ln p of each profile in nats, (n,), from z (n, d).

        features: (F,) sorted; score these alone and scale up, an unbiased estimate of the sum over all of them.
        """
        library = compute_library_size(counts).unsqueeze(1)
        if self.batch is not None:
            known = (batch_code >= 0).unsqueeze(1)  # an unknown batch is the zero vector
            z = torch.cat([z, self.batch(batch_code.clamp_min(0)) * known], 1)
        h = self.mlp(z.to(self.rate.weight.dtype), noise, rows)
        gate = None if self.gate is None else self.gate(h, features).float()
        p = LikelihoodParameters(
            self.rate(h, features).float(), self.theta(features).float(), library, gate
        )
        if features is None:
            return compute_log_likelihood(self.likelihood, counts, p)
        scale = self.n_features / len(features)
        return scale * compute_log_likelihood(self.likelihood, select_features(counts, features), p)


class OutputLayer(nn.Module):
    """Linear layer to all features or to some of them."""

    def __init__(self, width: int, n_features: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(n_features, width) * 0.1 / width**0.5)
        self.bias = nn.Parameter(torch.zeros(n_features))

    def forward(self, h: Tensor, features: Tensor | None) -> Tensor:
        if features is None:
            return h @ self.weight.T + self.bias
        return h @ self.weight[features].T + self.bias[features]


class SecondParameter(nn.Module):
    """The per-feature second parameter of a likelihood, a log. lr_scale: its learning rate, relative to `train.lr`."""

    def __init__(self, n_features: int, lr_scale: float = 1.0) -> None:
        super().__init__()
        self.lr_scale = lr_scale
        self.weight = nn.Parameter(torch.zeros(n_features))

    def forward(self, features: Tensor | None) -> Tensor:
        return self.weight if features is None else self.weight[features]


def select_features(counts: Counts, features: Tensor) -> Counts:
    """The columns `features` (sorted) of counts, renumbered."""
    if isinstance(counts, Tensor):
        return counts[:, features]
    place = torch.full((counts.n_features,), -1, dtype=torch.int32, device=features.device)
    place[features] = torch.arange(len(features), dtype=torch.int32, device=features.device)
    at = place[counts.indices.long()]
    keep = at >= 0
    kept = torch.cat(
        [keep.new_zeros(1, dtype=torch.int32), keep.cumsum(0, dtype=torch.int32)]
    )  # before each entry
    return SparseCounts(kept[counts.indptr.long()], at[keep], counts.values[keep], len(features))
