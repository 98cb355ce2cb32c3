"""The files of a checkpoint: shards of every parameter and of the optimizer's state, in float32.

Each rank writes the shards that it keeps, each under the name of its parameter and the place where
it begins. So any number of ranks can read them under any ZeRO stage, and nothing is converted.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import safe_open
from torch import Tensor

WEIGHTS = "weights"  # the key of a parameter itself, beside those of the optimizer ("exp_avg", ...)
FORMER_NAMES = {"batch_told": "batch_separation"}  # of buffers, as earlier versions saved them


class SavedShard(NamedTuple):
    """A shard in a file. Its values are loaded only when `read` is called."""

    key: str  # WEIGHTS, or what the optimizer calls this part of its state
    start: int  # where in the flattened parameter it begins
    name: str  # name of the parameter or buffer
    read: Callable[[int, int | None], Tensor]  # elements [first, last) of the shard, float32


def format_label(key: str, start: int, name: str) -> str:
    """Format the label under which a file holds a shard, which `iterate_shards` parses."""
    return f"{key}:{start}:{name}"


def assemble_tensors(files: Iterable[Path], wanted_key: str = WEIGHTS) -> dict[str, Tensor]:
    """Put whole tensors together out of the shards in files.

    Args:
        files: the files of all ranks.
        wanted_key: WEIGHTS, or a key of the optimizer's state.

    Returns:
        Each tensor in the shape of its parameter or buffer, by name.

    Raises:
        KeyError: the files lack a parameter, or elements of it.
    """
    files = list(files)
    shapes = read_shapes(files)
    tensors: dict[str, Tensor] = {}
    covered: dict[str, int] = {}  # elements found so far
    for key, start, name, read in iterate_shards(files):
        if key != wanted_key:
            continue
        values = read(0, None)
        if name not in tensors:
            tensors[name] = torch.empty(math.prod(shapes[name]), dtype=torch.float32)
        tensors[name][start : start + len(values)] = values
        covered[name] = covered.get(name, 0) + len(values)
    if wanted_key == WEIGHTS:  # the optimizer has no state of buffers, nor before the first update
        require_no_missing(
            {name: math.prod(shape) - covered.get(name, 0) for name, shape in shapes.items()}
        )
    return {name: values.view(shapes[name]) for name, values in tensors.items()}


def require_no_missing(missing: Mapping[str, int]) -> None:
    """Check that no elements are missing. `missing` counts them by parameter.

    Raises:
        KeyError: some are; the first parameters are named.
    """
    names = [name for name, numel in missing.items() if numel]
    if names:
        raise KeyError(f"values of {', '.join(names[:3])}")


def iterate_shards(files: Iterable[Path]) -> Iterator[SavedShard]:
    """Iterate over all shards in files; a file stays open until its last shard has been taken."""
    for path in files:
        with safe_open(path, "pt") as handle:
            for label in handle.keys():  # noqa: SIM118  not a dict
                key, start, name = label.split(":", 2)
                reader = _make_reader(handle.get_slice(label))
                yield SavedShard(key, int(start), find_present_name(name), reader)


def _make_reader(elements: Any) -> Callable[[int, int | None], Tensor]:
    """Make the function that reads a range of a shard; out of range, it reads nothing."""
    length = elements.get_shape()[0]

    def read_range(first: int, last: int | None) -> Tensor:
        end = length if last is None else max(0, min(last, length))
        values: Tensor = elements[first:end] if first < end else torch.empty(0)
        return values.float()

    return read_range


def read_shapes(files: Iterable[Path]) -> Mapping[str, list[int]]:
    """Read the shapes of all parameters and buffers, which every file holds."""
    with safe_open(next(iter(files)), "pt") as handle:
        shapes: dict[str, list[int]] = json.loads(handle.metadata()["shapes"])
    return {find_present_name(name): shape for name, shape in shapes.items()}


def find_present_name(name: str) -> str:
    """The present name of a parameter or buffer, which an earlier version may have named."""
    parent, _, last = name.rpartition(".")
    return f"{parent}.{FORMER_NAMES[last]}" if last in FORMER_NAMES else name
