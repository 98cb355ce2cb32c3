"""What ranks exchange of the gradients in float32 under ZeRO-0 and 1.

Nearly all weights are a decoder's, a row for each feature, and every rank scores the same few
features in a step. So these rows are exchanged, instead of zeros for all others.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from clue_dist.model.clue import CLUE
from clue_dist.model.decoders import OutputLayer


def average_scored_rows(model: CLUE) -> None:
    """Have every backward pass average the gradients of scored features' weights over ranks."""
    for name, subset in model.features_per_step.items():
        decoder = model.get_decoder(name)
        for layer in (decoder.rate, decoder.gate):
            if subset and layer is not None:
                layer.row_hook = average_over_ranks


def average_over_ranks(gradient: Tensor) -> Tensor:
    """The mean over ranks of a tensor that each of them has, of the same shape."""
    mean = gradient / dist.get_world_size()
    dist.all_reduce(mean)
    return mean


def average_other_gradients(engine: Any) -> None:
    """Average over ranks, in place, all gradients that the backward pass has not averaged."""
    done = {
        layer.weight
        for layer in engine.module.modules()
        if isinstance(layer, OutputLayer) and layer.row_hook is not None
    }
    gradients = [weight.grad for weight in engine.module.parameters() if weight not in done]
    means = average_over_ranks(torch.cat([gradient.flatten() for gradient in gradients]))
    sizes = [gradient.numel() for gradient in gradients]
    for gradient, mean in zip(gradients, means.split(sizes), strict=True):
        gradient.copy_(mean.view_as(gradient))
