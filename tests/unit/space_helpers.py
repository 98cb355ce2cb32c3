"""Modalities that share a part of what they tell, and the space in which they meet."""

from __future__ import annotations

import torch
from torch import Tensor

from clue_dist.model.common_space import CommonSpace, find_directions
from tests.unit.model_helpers import draw

N, D = 2000, 12


def draw_modalities(n_cells: int = N, k: int = 2, noise: float = 0.3, seed: int = 0) -> Tensor:
    """(n_cells, k, D): four factors that all modalities tell, and two that each has of its own.

    What is its own is by far the larger part, so that raw neighbours come from one modality.
    """
    shared = draw(n_cells, 4, seed=seed)
    views = []
    for modality in range(k):
        rotation = torch.linalg.qr(draw(D, D, seed=100 + modality))[0]
        own = 6 * draw(n_cells, 2, seed=seed + 10 + modality)
        told = shared + noise * draw(n_cells, 4, seed=seed + 20 + modality)
        views.append(torch.cat([told, own, torch.zeros(n_cells, D - 6)], 1) @ rotation)
    return torch.stack(views, 1)


def fit_space(
    mean: Tensor, observed: Tensor, exponent: float = 2.0, ridge: float = 0.05, pole: float = 0.0
) -> CommonSpace:
    directions = find_directions(mean, observed, ridge)
    assert directions is not None
    space = CommonSpace(mean.shape[1], mean.shape[2])
    space.set_directions(directions, exponent, pole, torch.ones(mean.shape[1]))
    return space


def place_cells(space: CommonSpace, mean: Tensor) -> Tensor:
    """(B, K, R), of length 1."""
    coordinates, _ = space.project_experts(mean, torch.zeros_like(mean))
    return space.weigh_profiles(coordinates)


def share_of_other_modality(first: Tensor, second: Tensor, neighbours: int = 30) -> float:
    pool = torch.cat([first, second])
    modality = torch.arange(len(pool)) // len(first)
    distance = torch.cdist(pool, pool).fill_diagonal_(torch.inf)
    near = distance.topk(neighbours, largest=False).indices
    return float((modality[near] != modality[:, None]).double().mean())
