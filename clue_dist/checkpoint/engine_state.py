"""From a DeepSpeed engine to the shards of a checkpoint, and back."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from clue_dist.checkpoint.run_folder import UNFIT, RunState, list_shard_files, load_weights
from clue_dist.checkpoint.shards import WEIGHTS, format_label, iterate_shards, require_no_missing
from clue_dist.deepspeed_internals import (
    ParameterShard,
    find_whole_shape,
    list_saved_shards,
    list_updated_shards,
)
from clue_dist.errors import ResumeError
from clue_dist.model.clue import CLUE

UPDATES = "step"  # the optimizer's own count of updates, the same for every parameter


def collect_tensors(engine: Any, with_optimizer: bool) -> dict[str, Tensor]:
    """Collect this rank's part of a checkpoint.

    Args:
        engine: the DeepSpeed engine.
        with_optimizer: whether the optimizer's state belongs to it, or the weights alone.

    Returns:
        Flat views of what is trained, and on rank 0 of the buffers, by `shards.format_label`.
    """
    tensors = {}
    for shard in list_saved_shards(engine):
        state = {WEIGHTS: shard.master}
        if with_optimizer:
            state |= engine.basic_optimizer.state.get(shard.master, {})
            state.pop(UPDATES, None)
        for key, values in state.items():
            tensors[format_label(key, shard.start, shard.name)] = shard.select_from(values)
    if dist.get_rank() == 0:
        for name, buffer in engine.module.named_buffers():
            tensors[format_label(WEIGHTS, 0, name)] = buffer.detach().view(-1)
    return tensors


def collect_shapes(engine: Any) -> dict[str, list[int]]:
    """Collect the shape of every parameter and buffer, by name."""
    module = engine.module
    shapes = {name: find_whole_shape(parameter) for name, parameter in module.named_parameters()}
    return shapes | {name: list(buffer.shape) for name, buffer in module.named_buffers()}


def count_updates(engine: Any) -> int:
    """Count the updates that the optimizer has made."""
    for state in engine.basic_optimizer.state.values():  # empty before the first update
        return int(state[UPDATES])
    return 0


def restore_engine(
    build: Callable[[Callable[[CLUE], None]], Any], checkpoint: Path, state: RunState
) -> Any:
    """Build an engine in the state of a checkpoint.

    Args:
        build: makes the engine, given the function that sets the weights which it begins with.
        checkpoint: a committed folder.
        state: the state of the run that the folder holds.

    Raises:
        ResumeError: the checkpoint holds another model or another optimizer.
    """
    # The weights first: an optimizer that keeps float32 copies takes them when it is built.
    fix = "go on with the version of clue_dist that began the run"
    engine = build(lambda model: load_weights(model, checkpoint, fix))
    try:
        restore_shards(engine, list_shard_files(checkpoint), state.updates)
    except UNFIT as error:
        raise ResumeError(
            "the checkpoint does not fit the model", where=checkpoint, got=error, fix=fix
        ) from error
    return engine


def restore_shards(engine: Any, files: Iterable[Path], n_updates: int) -> None:
    """Set what this rank updates, and the optimizer's state of it, to what files hold.

    The module has its weights already. The part of the optimizer's state that no file holds begins
    at zero, as in a fresh optimizer.

    Raises:
        KeyError: the files lack a parameter, or elements of it.
    """
    shards = {shard.name: shard for shard in list_updated_shards(engine)}
    missing = {name: shard.numel for name, shard in shards.items()}
    if n_updates:  # as the optimizer's first update leaves it; padding stays zero
        for master in {id(shard.master): shard.master for shard in shards.values()}.values():
            # A fused optimizer counts on the device.
            device = master.device if engine.basic_optimizer.defaults.get("fused") else "cpu"
            n_done = torch.tensor(float(n_updates), device=device)
            engine.basic_optimizer.state[master] = {UPDATES: n_done}
    for key, start, name, read in iterate_shards(files):
        shard = shards.get(name)
        if shard is None:  # another rank updates this parameter
            continue
        # The part of the shard in the file that this rank updates; the ranks that saved it may have
        # been others.
        values = read(max(shard.start - start, 0), shard.start + shard.numel - start)
        if not len(values):
            continue
        elements = shard.select_from(_find_destination(engine, shard, key))
        elements.narrow(0, max(start - shard.start, 0), len(values)).copy_(values)
        missing[name] -= len(values) if key == WEIGHTS else 0
    require_no_missing(missing)


def _find_destination(engine: Any, shard: ParameterShard, key: str) -> Tensor:
    """The tensor that holds the shard's weights, or its optimizer state, zeros if it has none."""
    if key == WEIGHTS:
        return shard.master
    state = engine.basic_optimizer.state[shard.master]
    if key not in state:
        state[key] = torch.zeros_like(shard.master)
    tensor: Tensor = state[key]
    return tensor
