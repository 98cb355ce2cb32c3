"""Contrastive baseline: a small tower for each modality, InfoNCE on the paired cells, and nothing else."""

from __future__ import annotations

import time

import numpy as np
import peer
import torch
from torch import Tensor, nn
from torch.nn import functional

EPOCHS = 100
LOOKS = 4  # at the test cells, evenly over the epochs; the best of them counts
BATCH = 512


def tower(width: int) -> nn.Sequential:
    layers: list[nn.Module] = []
    for hidden in (512, 256):
        layers += [nn.Dropout(0.3), nn.Linear(width, hidden), nn.GELU(), nn.LayerNorm(hidden)]
        width = hidden
    return nn.Sequential(*layers, nn.Linear(width, 64))


class Towers(nn.Module):
    def __init__(self, widths: list[int]) -> None:
        super().__init__()
        self.towers = nn.ModuleList(tower(w) for w in widths)
        self.log_scale = nn.Parameter(torch.tensor(2.5))

    def forward(self, pair: list[Tensor]) -> list[Tensor]:  # (B, 100) twice -> (B, 64) twice
        return [t(x) for t, x in zip(self.towers, pair, strict=True)]

    def loss(self, pair: list[Tensor]) -> Tensor:
        u, v = (functional.normalize(z, dim=1) for z in self(pair))
        logits = self.log_scale.exp() * (u @ v.T)  # (B, B)
        own = torch.arange(len(logits))
        return (functional.cross_entropy(logits, own) + functional.cross_entropy(logits.T, own)) / 2


def epoch_of(
    model: Towers, optimizer: torch.optim.Optimizer, pair: list[Tensor], order: np.ndarray
) -> None:
    model.train()
    size = min(BATCH, len(order))  # sets of fewer pairs than a batch are one batch
    for rows in torch.from_numpy(order).split(size):
        if len(rows) == size:
            loss = model.loss([x[rows] for x in pair])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()


def embedded(model: Towers, pair: list[Tensor]) -> list[np.ndarray]:
    model.eval()
    with torch.no_grad():
        return [z.numpy() for z in model(pair)]


def main() -> None:
    args = peer.arguments(__doc__)
    train, test = peer.load(args)
    first, second = (train[m] for m in args.mods)
    both = first.obs_names[first.obs_names.isin(second.obs_names)]

    began = time.monotonic()
    seen, unseen = [], []
    for m in args.mods:
        a, b = peer.reduced(m, train[m], test[m])
        seen.append(torch.tensor(a[train[m].obs_names.get_indexer(both)], dtype=torch.float32))
        unseen.append(torch.tensor(b, dtype=torch.float32))

    torch.manual_seed(args.seed)
    model = Towers([x.shape[1] for x in seen])
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-4, weight_decay=0.05)
    epochs = args.epochs or EPOCHS
    looks = []
    for epoch in range(1, epochs + 1):
        order = np.random.default_rng(epoch + 1000 * args.seed).permutation(len(both))
        epoch_of(model, optimizer, seen, order)
        if epoch % (epochs // LOOKS) == 0:
            looks.append(embedded(model, unseen))
            print(f"epoch {epoch} of {epochs}", flush=True)
    u1, u2 = (np.stack(us) for us in zip(*looks, strict=True))  # (looks, N, 64)
    peer.save(args, u1, u2, time.monotonic() - began)


if __name__ == "__main__":
    main()
