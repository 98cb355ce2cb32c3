"""Contrastive baseline: a small tower for each modality, InfoNCE on the paired cells alone."""

import time

import numpy as np
import peer
import torch
from torch import Tensor, nn
from torch.nn import functional

EPOCHS = 100
LOOKS = 4  # at the test cells, evenly over the epochs; the best of them counts
BATCH = 512


def make_tower(width: int) -> nn.Sequential:
    layers: list[nn.Module] = []
    for hidden in (512, 256):
        layers += [nn.Dropout(0.3), nn.Linear(width, hidden), nn.GELU(), nn.LayerNorm(hidden)]
        width = hidden
    return nn.Sequential(*layers, nn.Linear(width, 64))


class Towers(nn.Module):
    def __init__(self, widths: list[int]) -> None:
        super().__init__()
        self.towers = nn.ModuleList(make_tower(width) for width in widths)
        self.log_scale = nn.Parameter(torch.tensor(2.5))

    def forward(self, pair: list[Tensor]) -> list[Tensor]:  # (B, 100) twice -> (B, 64) twice
        return [tower(x) for tower, x in zip(self.towers, pair, strict=True)]

    def compute_loss(self, pair: list[Tensor]) -> Tensor:
        u, v = (functional.normalize(z, dim=1) for z in self(pair))
        logits = self.log_scale.exp() * (u @ v.T)  # (B, B)
        partner = torch.arange(len(logits))
        return sum(functional.cross_entropy(x, partner) for x in (logits, logits.T)) / 2


def train_epoch(
    model: Towers, optimizer: torch.optim.Optimizer, pair: list[Tensor], order: np.ndarray
) -> None:
    model.train()
    size = min(BATCH, len(order))  # sets of fewer pairs than a batch are one batch
    for rows in torch.from_numpy(order).split(size):
        if len(rows) == size:
            optimizer.zero_grad()
            model.compute_loss([x[rows] for x in pair]).backward()
            optimizer.step()


def main() -> None:
    args = peer.parse_arguments(__doc__)
    train, test = peer.load_split(args)
    first, second = (train[m] for m in args.mods)
    both = first.obs_names[first.obs_names.isin(second.obs_names)]

    began = time.monotonic()
    seen, unseen = [], []
    for m in args.mods:
        a, b = peer.reduce_cells(m, train[m], test[m])
        seen.append(torch.tensor(a[train[m].obs_names.get_indexer(both)], dtype=torch.float32))
        unseen.append(torch.tensor(b, dtype=torch.float32))

    torch.manual_seed(args.seed)
    model = Towers([x.shape[1] for x in seen])
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-4, weight_decay=0.05)
    epochs, looks = args.epochs or EPOCHS, []
    for epoch in range(1, epochs + 1):
        order = np.random.default_rng(epoch + 1000 * args.seed).permutation(len(both))
        train_epoch(model, optimizer, seen, order)
        if epoch % (epochs // LOOKS) == 0:
            model.eval()
            with torch.no_grad():
                looks.append([z.numpy() for z in model(unseen)])
            print(f"epoch {epoch} of {epochs}", flush=True)
    u1, u2 = (np.stack(us) for us in zip(*looks, strict=True))  # (looks, N, 64)
    peer.save_embedding(args, u1, u2, time.monotonic() - began)


if __name__ == "__main__":
    main()
