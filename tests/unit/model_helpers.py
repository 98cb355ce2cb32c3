"""A small CLUE of normal likelihoods and twelve cells, of which half lack modalities."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from clue_dist.config import ModelConfig, ObjectiveConfig
from clue_dist.data.batch import Batch, ObservedModality
from clue_dist.losses.objective import Objective, Result
from clue_dist.model.clue import CLUE
from clue_dist.model.modality_spec import ModalitySpec
from clue_dist.model.noise import Noise

B, K, D = 12, 3, 4
OBSERVED = torch.tensor(
    [[1, 1, 1], [1, 1, 0], [1, 0, 0], [0, 1, 1], [0, 0, 1], [1, 0, 1]] * 2, dtype=torch.bool
)


class DirectEngine:
    """Takes the place of DeepSpeed's engine."""

    def __init__(self, module: Objective) -> None:
        self.module, self.eval, self.train = module, module.eval, module.train

    def __call__(self, compute: Callable[[Objective], Result]) -> Result:
        result: Result = self.module(compute)
        return result


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def kl64(mean: np.ndarray, log_var: np.ndarray) -> float:
    return sum(0.5 * (m * m + math.exp(v) - 1 - v) for m, v in zip(mean, log_var, strict=True))


def small_model(
    k: int = K, members: int = 1, shared: bool = True, private: float = 0.0, **objective: float
) -> tuple[Objective, Batch, Noise]:
    torch.manual_seed(0)
    specs = {f"m{i}": ModalitySpec(6, "none", "normal", None) for i in range(k)}
    config = ModelConfig(
        latent=D,
        private=private,
        trunk={"hidden": 8, "projection_lr": 1.0, "members": members, "shared": shared},
        discriminator={"hidden": 8},
        decoder={"hidden": 8},
    )
    model = Objective(CLUE(specs, 1, config), ObjectiveConfig(**objective), [1.0] * k)
    observed = OBSERVED[:, :k].clone()
    observed[~observed.any(1), 0] = True
    paired = observed.sum(1) > 1
    modalities = {}
    for i in range(k):
        rows = observed[:, i].nonzero()[:, 0]
        modalities[f"m{i}"] = ObservedModality(
            rows, draw(len(rows), 6, seed=i), paired[rows].nonzero()[:, 0]
        )
    return (
        model,
        Batch(observed, torch.zeros(B, dtype=torch.int64), modalities),
        Noise(0, 0, {"s": B}, 1),
    )


def repeat_cells(batch: Batch, times: int) -> Batch:
    """The same cells several times, with other noise."""
    modalities = {
        name: ObservedModality(
            torch.cat([seen.rows + B * i for i in range(times)]),
            torch.cat([seen.counts + 0.1 * draw(*seen.counts.shape, seed=i) for i in range(times)]),
            torch.cat([seen.paired + len(seen.rows) * i for i in range(times)]),
        )
        for name, seen in batch.modalities.items()
    }
    return Batch(batch.observed.repeat(times, 1), batch.batch_code.repeat(times), modalities)
