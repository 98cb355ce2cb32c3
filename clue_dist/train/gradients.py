"""What ranks exchange of the gradients in float32 under ZeRO-0 and 1.

Nearly all weights are a decoder's, a row for each feature, and every rank scores the same few
features in a step. So these rows are exchanged, instead of zeros for all others.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from clue_dist.losses.objective import Objective
from clue_dist.model.clue import CLUE
from clue_dist.model.decoders import OutputLayer


def average_scored_rows(model: CLUE) -> None:
    """Have every backward pass average the gradients of scored features' weights over ranks."""
    for layer in list_subset_layers(model):
        layer.row_hook = average_rows


def list_subset_layers(model: CLUE) -> list[OutputLayer]:
    """List the layers of decoders that score a subset of their features in a step."""
    decoders = [
        model.get_decoder(name) for name, subset in model.features_per_step.items() if subset
    ]
    return [
        layer for decoder in decoders for layer in (decoder.rate, decoder.gate) if layer is not None
    ]


def average_rows(rows: Tensor) -> Tensor:
    """The mean over ranks of a gradient, which autograd does not let a hook change."""
    return rows if dist.get_world_size() == 1 else average_over_ranks(rows.clone())


def average_over_ranks(gradient: Tensor) -> Tensor:
    """Average a tensor over ranks, each of which has one of the same shape, in place."""
    gradient /= dist.get_world_size()
    dist.all_reduce(gradient)
    return gradient


def average_other_gradients(objective: Objective) -> None:
    """Average over ranks, in place, all gradients that the backward pass has not averaged."""
    done = {layer.weight for layer in list_subset_layers(objective.model)}
    gradients: list[Tensor] = []
    for weight in objective.parameters():
        if weight not in done:
            assert weight.grad is not None  # `fill_missing_gradients` leaves none out
            gradients.append(weight.grad)
    means = average_over_ranks(torch.cat([gradient.flatten() for gradient in gradients]))
    sizes = [gradient.numel() for gradient in gradients]
    for gradient, mean in zip(gradients, means.split(sizes), strict=True):
        gradient.copy_(mean.view_as(gradient))
