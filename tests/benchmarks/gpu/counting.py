"""What a piece of work would ask of a GPU, counted while it runs on a CPU.

A GPU is kept busy as long as the host runs ahead of it. Whatever needs a value, or a number of
values, on the host makes the host wait for the GPU: here it is called a sync. A copy to the device
out of pageable memory waits, too. On a CPU neither costs anything, so that nothing but a count
shows them.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

# Operators whose result has a size, or a value, that only the device knows.
SYNC_OPERATORS = {
    "aten::nonzero",
    "aten::masked_select",
    "aten::_local_scalar_dense",
    "aten::_unique2",
    "aten::unique_dim",
    "aten::unique_consecutive",
    "aten::bincount",
    "aten::equal",
}
# Methods that bring values to the host and that no operator stands for.
SYNC_METHODS = {"tolist", "cpu", "numpy"}
COPYING_FUNCTIONS = {"tensor", "as_tensor", "new_tensor"}  # of values that the host has
# Operators that launch nothing: they look at the same memory in another way.
VIEWS = {
    "aten::" + name
    for name in (
        "view", "_unsafe_view", "as_strided", "expand", "permute", "t", "transpose", "select",
        "slice", "unsqueeze", "squeeze", "split", "split_with_sizes", "unbind", "detach", "alias",
        "diagonal", "unfold", "narrow", "lift_fresh", "movedim", "flatten", "unflatten", "empty",
        "empty_like", "empty_strided", "new_empty", "new_empty_strided", "_reshape_alias", "set_",
    )
}  # fmt: skip
PACKAGES = Path(torch.__file__).parents[1]  # where torch and DeepSpeed lie
PROJECT = Path(__file__).parents[3]


@dataclass
class WorkCounts:
    """What was counted; by place in the source where that says something."""

    launches: int = 0  # operators that are no views
    bytes_touched: int = 0  # of their inputs and outputs
    operators: Counter[str] = field(default_factory=Counter)  # calls by operator
    syncs: Counter[str] = field(default_factory=Counter)  # calls by place and name
    blocking_copies: Counter[str] = field(default_factory=Counter)  # to the device, by place
    copies: int = 0  # to the device, out of pinned memory
    bytes_copied: int = 0  # by these

    def format_places(self) -> str:
        """List every sync and every copy that waits, by place, one a line."""
        lines = [f"{n:4d} sync  {place}" for place, n in sorted(self.syncs.items())]
        lines += [f"{n:4d} copy  {place}" for place, n in sorted(self.blocking_copies.items())]
        return "\n".join(lines)


@contextmanager
def count_work(on_host: Sequence[str] = ("torch/optim/",)) -> Iterator[WorkCounts]:
    """Count what the work inside asks of the device.

    Args:
        on_host: parts of paths of files whose small tensors stay on the host on a GPU, too, as an
            optimizer's count of steps does: what they read of them is no sync.

    Yields:
        The counts, complete once the work has ended.
    """
    counts = WorkCounts()
    with _FunctionCounter(counts, on_host), _OperatorCounter(counts, on_host):
        yield counts


class _OperatorCounter(TorchDispatchMode):
    """Counts operators, those of the backward pass among them."""

    def __init__(self, counts: WorkCounts, on_host: Sequence[str]) -> None:
        super().__init__()
        self.counts, self.on_host = counts, on_host

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        name = func.name().partition(".")[0]
        self.counts.operators[name] += 1
        if name not in VIEWS:
            self.counts.launches += 1
            tensors = _list_tensors([args, list((kwargs or {}).values()), result])
            self.counts.bytes_touched += sum(t.numel() * t.element_size() for t in tensors)
        if name in SYNC_OPERATORS or _needs_nonzero(name, args, kwargs or {}):
            _count_sync(self.counts, name, self.on_host)
        return result


class _FunctionCounter(TorchFunctionMode):
    """Counts calls that a CPU answers without any operator."""

    def __init__(self, counts: WorkCounts, on_host: Sequence[str]) -> None:
        super().__init__()
        self.counts, self.on_host = counts, on_host

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name, options = getattr(func, "__name__", ""), kwargs or {}
        if name in SYNC_METHODS and args and isinstance(args[0], Tensor):
            _count_sync(self.counts, name, self.on_host)
        elif name in COPYING_FUNCTIONS:
            if options.get("device") is not None or name == "new_tensor":
                self.counts.blocking_copies[f"{_find_place()} {name}"] += 1
        elif name == "to" and _names_device(args[1:], options) and _is_called_by_project():
            if options.get("non_blocking"):
                self.counts.copies += 1
                self.counts.bytes_copied += args[0].numel() * args[0].element_size()
            else:
                self.counts.blocking_copies[f"{_find_place()} to"] += 1
        return func(*args, **options)


def _is_called_by_project() -> bool:
    """Whether the project itself calls: what torch and DeepSpeed move lies on the device already.

    On a CPU a tensor of the host looks like one of the device.
    """
    return not Path(sys._getframe(2).f_code.co_filename).is_relative_to(PACKAGES)


def _names_device(args: Sequence[Any], options: dict[str, Any]) -> bool:
    """Whether arguments of `Tensor.to` name a device, instead of a type alone."""
    return options.get("device") is not None or any(
        isinstance(value, str | torch.device) for value in args
    )


def _needs_nonzero(name: str, args: Sequence[Any], options: dict[str, Any]) -> bool:
    """Whether an operator has to know how many elements it takes."""
    if name == "aten::repeat_interleave":
        return options.get("output_size") is None
    if name not in ("aten::index", "aten::index_put", "aten::index_put_", "aten::_index_put_impl_"):
        return False
    masks = (torch.bool, torch.uint8)
    return any(isinstance(index, Tensor) and index.dtype in masks for index in args[1])


def _count_sync(counts: WorkCounts, name: str, on_host: Sequence[str]) -> None:
    frame: Any = sys._getframe(2)
    while frame is not None:
        if any(part in frame.f_code.co_filename for part in on_host):
            return
        frame = frame.f_back
    counts.syncs[f"{_find_place()} {name}"] += 1


def _find_place() -> str:
    """The innermost line of the source that is neither torch's nor this file's."""
    frame: Any = sys._getframe(1)
    while frame is not None:
        path = Path(frame.f_code.co_filename)
        if path != Path(__file__) and not path.is_relative_to(PACKAGES / "torch"):
            if path.is_relative_to(PACKAGES):
                return f"{path.relative_to(PACKAGES)}:{frame.f_lineno}"
            if path.is_relative_to(PROJECT):
                return f"{path.relative_to(PROJECT)}:{frame.f_lineno}"
        frame = frame.f_back
    return "torch"


def _list_tensors(values: Any) -> list[Tensor]:
    """All tensors in nested lists and tuples."""
    if isinstance(values, Tensor):
        return [values]
    if isinstance(values, list | tuple):
        return [tensor for value in values for tensor in _list_tensors(value)]
    return []
