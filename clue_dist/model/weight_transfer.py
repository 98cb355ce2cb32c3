"""From the weights of one model to another that knows some of the same modalities and batches."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from clue_dist.model.clue import CLUE
from clue_dist.model.posterior_encoder import FITTED_MODULES


@torch.no_grad()
def transfer_weights(
    model: CLUE,
    weights: Mapping[str, Tensor],
    modalities: Sequence[str],
    levels: Mapping[int, int],
) -> None:
    """Set a model to the weights of another one, as far as both know the same.

    What the other model does not know stays as it is: modalities, biological batches, and the
    discriminator where the modalities are not the same. So do the common space and the translation.

    Args:
        model: to be changed; of the sizes of the other model.
        weights: parameters and buffers of the other model, by name.
        modalities: the modalities of the other model, in its order.
        levels: the number of each known level of batches in the other model, by that in this one.

    Raises:
        RuntimeError: the other model has other sizes.
    """
    known = [name for name in modalities if name in model.modalities]
    places = [model.modalities.index(name) for name in known]
    sources = [modalities.index(name) for name in known]
    for name, tensor in model.state_dict().items():
        module, *rest = name.split(".")
        if module in FITTED_MODULES:  # the first validation fits them to these cells
            continue
        if module in ("trunks", "decoders"):  # one for each modality
            place = int(rest[0])
            if place not in places:
                continue
            name = ".".join([module, str(sources[places.index(place)]), *rest[1:]])
        if name not in weights:  # a decoder asks for the batch only where there are several
            continue
        values = weights[name]
        if module == "heads":
            _transfer_heads(model, rest[0], tensor, places, values, sources)
        elif module == "trunks" and rest[1] == "ensemble" and not model.heads.shared:
            _view_networks(model, tensor)[:, places] = _view_networks(model, values)[:, sources]
        elif rest[-2:] == ["batch", "weight"]:
            tensor[list(levels)] = values[list(levels.values())]
        elif module == "decoders" and tensor.ndim == 2:
            # The last inputs of a decoder describe the batch: one of the two may not have them.
            n_inputs = min(tensor.shape[1], values.shape[1])
            tensor[:, :n_inputs] = values[:, :n_inputs]
        elif module == "combine":
            tensor[places] = values[sources]
        elif module != "discriminator" or model.modalities == list(modalities):
            tensor.copy_(values)


def _transfer_heads(
    model: CLUE, name: str, tensor: Tensor, places: list[int], values: Tensor, sources: list[int]
) -> None:
    """Take over the heads from and to modalities; with low ranks, what they share as well."""
    rank, members = model.heads.rank, model.members
    if rank and name == "weight":  # one matrix a target, for all sources
        after, before = (
            weight.view(members, weight.shape[1], -1, 2 * model.latent // members)
            for weight in (tensor, values)
        )
        after[:, :, places] = before[:, :, sources]
    elif rank and name == "reduce":  # by source
        after, before = (weight.unflatten(0, (-1, members)) for weight in (tensor, values))
        after[places] = before[sources]
    else:
        _view_heads(model, tensor)[_cross(places)] = _view_heads(model, values)[_cross(sources)]


def _cross(places: list[int]) -> tuple[Tensor, Tensor]:
    """The index of all heads from and to modalities."""
    index = torch.tensor(places)
    return index[:, None], index[None, :]


def _view_heads(model: CLUE, values: Tensor) -> Tensor:
    """Weights or biases of all heads as (K source, K target, M, inputs, outputs), a view."""
    members, inputs = model.members, values.shape[1]
    width = 2 * model.latent // members  # mean and log-variance of one member
    if model.heads.shared:
        n_targets = values.shape[2] // width
        return values.view(-1, members, inputs, n_targets, width).movedim(3, 1)
    n_modalities = round((values.shape[0] / members) ** 0.5)
    return values.view(n_modalities, members, n_modalities, inputs, width).movedim(2, 1)


def _view_networks(model: CLUE, values: Tensor) -> Tensor:
    """Weights of a trunk that has networks for each target, as (M, K target, ...), a view."""
    return values.view(model.members, -1, *values.shape[1:])
