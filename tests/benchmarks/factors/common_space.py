"""The peer: one latent space that every modality's encoder infers, as methods with a common space do.

Cobolt's ELBOs (the product of experts over what is observed, and each modality by itself) with MultiVI's penalty on
paired cells, the symmetric KL between what their modalities infer. As many latent numbers as ours has in its full z;
inputs, dropout, likelihoods, optimizer, learning rate, batches and steps are those of our run. One network has as many
weights between hidden layers as our ensemble of narrower ones together.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import combinations

import numpy as np
import scipy.sparse as sp
import torch
from torch import Tensor, nn

from clue_dist.config import Config
from clue_dist.data.plan import weights
from clue_dist.model.likelihoods import OF_KIND, Params, log_likelihood
from clue_dist.model.posterior import kl_to_prior, product_of_experts, sample

ALIGNMENT = 1.0  # weight of the symmetric KL, as MultiVI's


@dataclass(frozen=True)
class Views:
    """One modality in cells: inputs of its encoder (cells, components), its counts; rows of cells without it are 0."""

    kind: str
    inputs: Tensor
    counts: Tensor


def mlp(width: int, hidden: int, depth: int, dropout: float) -> list[nn.Module]:
    layers: list[nn.Module] = []
    for before in [width, *[hidden] * (depth - 1)]:
        layers += [nn.Dropout(dropout), nn.Linear(before, hidden), nn.GELU(), nn.LayerNorm(hidden)]
    return layers


class CommonSpace(nn.Module):
    """An encoder and a decoder per modality around one z of `latent` numbers."""

    def __init__(self, views: list[Views], latent: int, config: Config) -> None:
        super().__init__()
        trunk, decoder = config.model.trunk, config.model.decoder
        width_of_trunk = round(trunk.hidden * trunk.members**0.5)
        self.latent, self.kinds = latent, [v.kind for v in views]
        self.encoders, self.decoders, self.theta = nn.ModuleList(), nn.ModuleList(), nn.ParameterList()
        for view in views:
            width, features = view.inputs.shape[1], view.counts.shape[1]
            hidden = mlp(width, width_of_trunk, trunk.depth, trunk.dropout)
            self.encoders.append(nn.Sequential(nn.LayerNorm(width), *hidden, nn.Linear(width_of_trunk, 2 * latent)))
            hidden = mlp(latent, decoder.hidden, decoder.depth, decoder.dropout)
            self.decoders.append(nn.Sequential(*hidden, nn.Linear(decoder.hidden, features)))
            self.theta.append(nn.Parameter(torch.zeros(features)))
            share = view.counts.sum(0).clamp_min(0.5) / view.counts.sum()
            self.decoders[-1][-1].bias.data.copy_(torch.logit(share))

    def encode(self, inputs: list[Tensor], observed: Tensor) -> tuple[Tensor, Tensor]:
        """Means and log-variances of q(z | everything observed), then of each q(z | x_k): (B, 1 + K, latent)."""
        experts = torch.stack([e(x) for e, x in zip(self.encoders, inputs, strict=True)], 1)  # (B, K, 2 latent)
        prior = experts.new_zeros(len(experts), 1, 2 * self.latent)
        mean, log_var = torch.cat([prior, experts], 1).clamp(-8, 8).chunk(2, -1)  # (B, 1 + K, latent)
        own = torch.eye(len(inputs), dtype=torch.bool).expand(len(observed), -1, -1)
        chosen = torch.cat([observed[:, None], own], 1)  # (B, 1 + K source, K): the experts behind each source
        chosen = torch.cat([torch.ones_like(chosen[..., :1]), chosen], -1)  # and the prior, behind all of them
        parts = [product_of_experts(mean[:, :, None], log_var[:, :, None], c) for c in chosen.unbind(1)]
        return torch.cat([p[0] for p in parts], 1), torch.cat([p[1] for p in parts], 1)

    def loss(self, inputs: list[Tensor], counts: list[Tensor], observed: Tensor) -> Tensor:
        mean, log_var = self.encode(inputs, observed)
        z = sample(mean, log_var, torch.randn_like(mean))
        kl = kl_to_prior(mean, log_var)  # (B, 1 + K)
        loss = kl[:, 0] + (kl[:, 1:] * observed).sum(1)
        for k, (decoder, x) in enumerate(zip(self.decoders, counts, strict=True)):
            rows = observed[:, k].nonzero()[:, 0]
            x, library = x[rows], x[rows].sum(1, keepdim=True).clamp_min(1)
            for source in (0, 1 + k):
                p = Params(decoder(z[rows, source]), self.theta[k], library)
                loss = loss.index_add(0, rows, -log_likelihood(OF_KIND[self.kinds[k]], x, p))
        for a, b in combinations(range(len(inputs)), 2):
            apart = symmetric_kl(mean[:, 1 + a], log_var[:, 1 + a], mean[:, 1 + b], log_var[:, 1 + b])
            loss = loss + ALIGNMENT * apart * observed[:, a] * observed[:, b]
        return loss.mean()


def symmetric_kl(m1: Tensor, v1: Tensor, m2: Tensor, v2: Tensor) -> Tensor:
    """KL(q1 || q2) + KL(q2 || q1) of diagonal Gaussians with means m and log-variances v, summed over the last axis."""
    apart = (m1 - m2) ** 2
    return 0.5 * ((v1.exp() + apart) * (-v2).exp() + (v2.exp() + apart) * (-v1).exp() - 2).sum(-1)


def placed(kind: str, inputs: np.ndarray, counts: sp.csr_matrix, rows: np.ndarray, n_cells: int) -> Views:
    """Place the cells that carry a modality at `rows` of all `n_cells`."""
    tables = torch.zeros(n_cells, inputs.shape[1]), torch.zeros(n_cells, counts.shape[1])
    for table, values in zip(tables, (inputs, counts.toarray()), strict=True):
        table[torch.from_numpy(rows)] = torch.from_numpy(values.astype(np.float32))
    return Views(kind, *tables)


def train(data: list[Views], observed: Tensor, config: Config, seed: int) -> CommonSpace:
    """Fit on the cells of `data` with the budget of a run's resolved config. observed: (cells, K)."""
    assert config.data.batch_size != "auto"
    assert config.train.epochs != "auto"
    torch.manual_seed(seed)
    model = CommonSpace(data, config.model.latent * len(data), config)
    chance = chances(observed, config)
    steps = max(1, round(config.train.epochs * len(observed) / config.data.batch_size))
    lr, warmup = config.train.lr, config.train.warmup
    optimizer = torch.optim.AdamW(model.parameters(), lr, weight_decay=config.train.weight_decay)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, steps, pct_start=warmup, cycle_momentum=False)
    for _ in range(steps):
        rows = torch.multinomial(chance, config.data.batch_size)
        inputs, counts = [v.inputs[rows] for v in data], [v.counts[rows] for v in data]
        loss = model.loss(inputs, counts, observed[rows])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return model.eval()


def chances(observed: Tensor, config: Config) -> Tensor:
    """How often each cell is drawn, (cells,): strata get the shares of a batch that ours gives them."""
    strata, of_cell, sizes = observed.unique(dim=0, return_inverse=True, return_counts=True)
    size = {str(i): int(n) for i, n in enumerate(sizes)}
    paired = {str(i): bool(s.sum() > 1) for i, s in enumerate(strata)}
    weight = weights(size, paired, config.data.paired_share)
    return torch.tensor([weight[str(i)] / size[str(i)] for i in range(len(strata))])[of_cell]


@torch.no_grad()
def embed(model: CommonSpace, inputs: list[np.ndarray]) -> list[np.ndarray]:
    """Posterior means of cells that have every modality: from all of them, then from each alone, (cells, latent)."""
    tensors = [torch.from_numpy(x.astype(np.float32)) for x in inputs]
    mean, _ = model.encode(tensors, torch.ones(len(tensors[0]), len(tensors), dtype=torch.bool))
    return [z.numpy() for z in mean.unbind(1)]
