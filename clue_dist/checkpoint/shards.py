"""Where DeepSpeed keeps what is trained: each rank's pieces of every parameter and of its optimizer state, in float32.

A checkpoint is written as these pieces, under the parameter's name and the place where the piece begins, so that it
can be read by any number of ranks and under any ZeRO stage: nothing needs to be converted.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors import safe_open
from torch import Tensor

WEIGHTS = "weights"  # the key of a parameter itself, beside those of the optimizer ("exp_avg", ...)
UPDATES = "step"  # the optimizer's own count of updates, the same for every parameter


@dataclass(frozen=True)
class ParameterShard:
    """Elements [start, start + numel) of a flattened parameter.

    master: the tensor the optimizer knows, in which the piece begins at `at`.
    """

    name: str
    start: int
    numel: int
    master: Tensor
    at: int

    def of(self, flat: Tensor) -> Tensor:
        """The piece of a tensor laid out like `master`, a view."""
        return flat.detach().view(-1).narrow(0, self.at, self.numel)


def list_updated_shards(engine: Any) -> list[ParameterShard]:
    """What this rank updates: under ZeRO-0 everything, else a part."""
    return _pieces(engine, rank=0, world=1)


def list_saved_shards(engine: Any) -> list[ParameterShard]:
    """What this rank saves: those of all ranks together cover each parameter once."""
    return _pieces(engine, dist.get_rank(), dist.get_world_size())


def _pieces(engine: Any, rank: int, world: int) -> list[ParameterShard]:
    """rank of world: whose share of what every rank has."""
    find = _finder(engine, rank, world)
    found = [find(name, p) for name, p in engine.module.named_parameters()]
    return [piece for piece in found if piece is not None and piece.numel > 0]


def _finder(engine: Any, rank: int, world: int) -> Callable[[str, Any], ParameterShard | None]:
    """How the pieces of a parameter are found; DeepSpeed 0.19 has an optimizer of its own for each way of training."""
    optimizer = engine.optimizer
    whole = _masters_of_whole(engine)

    def find(name: str, p: Any) -> ParameterShard | None:
        if hasattr(p, "ds_id"):  # ZeRO-3: equal parts, the last of them padded
            group, at, part = optimizer.grad_position[optimizer.get_param_id(p)]
            start = min(dist.get_rank() * part, p.ds_numel)
            return ParameterShard(
                name,
                start,
                min(part, p.ds_numel - start),
                optimizer.fp32_partitioned_groups_flat[group],
                at,
            )
        if hasattr(p, "_hp_mapping"):  # ZeRO-1, ZeRO-2: parts of parameters laid end to end
            here = p._hp_mapping
            if here is None:
                return None
            masters = (
                optimizer.single_partition_of_fp32_groups
                if hasattr(optimizer, "single_partition_of_fp32_groups")
                else optimizer.fp32_groups_flat_partition
            )
            address = here.lp_fragment_address
            return ParameterShard(
                name,
                address.start,
                address.numel,
                masters[here.param_group_index],
                here.hp_fragment_address.start,
            )
        # ZeRO-0: every rank has everything
        start, end = p.numel() * rank // world, p.numel() * (rank + 1) // world
        return ParameterShard(name, start, end - start, whole[p], start)

    return find


def _masters_of_whole(engine: Any) -> dict[Any, Tensor]:
    """ZeRO-0: the float32 tensor of each parameter, itself unless the model is bf16."""
    low = getattr(engine.optimizer, "fp16_groups", None)
    if low is None or not hasattr(engine.optimizer, "fp32_groups"):
        return {p: p for p in engine.module.parameters()}
    pairs = zip(low, engine.optimizer.fp32_groups, strict=True)
    return {p: master for group, masters in pairs for p, master in zip(group, masters, strict=True)}


# --- out of an engine -------------------------------------------------------------------------------------------


def collect_tensors(engine: Any, optimizer: bool) -> dict[str, Tensor]:
    """This rank's part of a checkpoint: views of what is trained, and on rank 0 the buffers. optimizer: its state, too.

    Names are `key:start:parameter`.
    """
    out = {}
    for piece in list_saved_shards(engine):
        flat = {WEIGHTS: piece.master}
        if optimizer:
            state = engine.basic_optimizer.state.get(piece.master, {})
            flat |= {key: value for key, value in state.items() if key != UPDATES}
        for key, value in flat.items():
            out[f"{key}:{piece.start}:{piece.name}"] = piece.of(value)
    if dist.get_rank() == 0:
        out |= {
            f"{WEIGHTS}:0:{name}": b.detach().view(-1) for name, b in engine.module.named_buffers()
        }
    return out


def collect_shapes(engine: Any) -> dict[str, list[int]]:
    """Of every parameter and buffer."""
    parameters = {
        name: list(getattr(p, "ds_shape", p.shape)) for name, p in engine.module.named_parameters()
    }
    return parameters | {name: list(b.shape) for name, b in engine.module.named_buffers()}


def count_updates(engine: Any) -> int:
    """How many updates the optimizer has made."""
    for state in engine.basic_optimizer.state.values():
        return int(state[UPDATES])
    return 0


# --- into an engine ---------------------------------------------------------------------------------------------


def restore_shards(engine: Any, files: Iterable[Path], n_updates: int) -> None:
    """Set this rank's pieces and their optimizer state to what `files` hold; the module has its weights already.

    What no file holds of the optimizer's state begins at zero, as in a fresh one.

    Raises:
        KeyError: a parameter that the files lack in part.
    """
    wanted: dict[str, ParameterShard] = {piece.name: piece for piece in list_updated_shards(engine)}
    missing = {name: piece.numel for name, piece in wanted.items()}
    if n_updates:  # as the optimizer's first update leaves it; padding stays zero
        for master in {id(piece.master): piece.master for piece in wanted.values()}.values():
            engine.basic_optimizer.state[master] = {UPDATES: torch.tensor(float(n_updates))}
    for key, start, name, read in iterate_shards(files):
        piece = wanted.get(name)
        if piece is None:
            continue
        values = read(max(piece.start - start, 0), piece.start + piece.numel - start)
        if not len(values):
            continue
        flat = piece.master if key == WEIGHTS else _state(engine, piece.master, key)
        piece.of(flat).narrow(0, max(start - piece.start, 0), len(values)).copy_(values)
        missing[name] -= len(values) if key == WEIGHTS else 0
    absent = [name for name, n in missing.items() if n]
    if absent:
        raise KeyError(f"values of {', '.join(absent[:3])}")


def _state(engine: Any, master: Tensor, key: str) -> Tensor:
    state = engine.basic_optimizer.state[master]
    if key not in state:
        state[key] = torch.zeros_like(master)
    value: Tensor = state[key]
    return value


def assemble_tensors(files: Iterable[Path], keys: str = WEIGHTS) -> dict[str, Tensor]:
    """Whole tensors out of the pieces in `files`, by parameter: the weights, or an optimizer's state.

    Raises:
        KeyError: a parameter that the files lack in part.
    """
    files = list(files)
    out: dict[str, Tensor] = {}
    covered: dict[str, int] = {}
    layout = read_shapes(files)
    for key, start, name, read in iterate_shards(files):
        if key != keys:
            continue
        values = read(0, None)
        if name not in out:
            out[name] = torch.empty(_numel(layout[name]), dtype=torch.float32)
        out[name][start : start + len(values)] = values
        covered[name] = covered.get(name, 0) + len(values)
    absent = [
        name
        for name, shape in layout.items()
        if keys == WEIGHTS and covered.get(name, 0) != _numel(shape)
    ]
    if absent:
        raise KeyError(f"values of {', '.join(absent[:3])}")
    return {name: values.view(layout[name]) for name, values in out.items()}


def iterate_shards(
    files: Iterable[Path],
) -> Iterator[tuple[str, int, str, Callable[[int, int | None], Tensor]]]:
    """(key, start, parameter, read a range of it) of every piece in `files`; only what is read is loaded."""
    for path in files:
        with safe_open(path, "pt") as handle:
            for label in handle.keys():  # noqa: SIM118  not a dict
                key, start, name = label.split(":", 2)
                part = handle.get_slice(label)
                length = part.get_shape()[0]

                def read(
                    first: int, last: int | None, part: Any = part, length: int = length
                ) -> Tensor:
                    end = length if last is None else max(0, min(last, length))
                    values: Tensor = part[first:end] if first < end else torch.empty(0)
                    return values.float()

                yield key, int(start), name, read


def read_shapes(files: Iterable[Path]) -> Mapping[str, list[int]]:
    """Shapes of all parameters and buffers, as any of the files tells."""
    with safe_open(next(iter(files)), "pt") as handle:
        told: dict[str, list[int]] = json.loads(handle.metadata()["shapes"])
    return told


def _numel(shape: Iterable[int]) -> int:
    out = 1
    for n in shape:
        out *= n
    return out
