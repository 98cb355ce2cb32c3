"""Everything of DeepSpeed that is not public and that this project reads or replaces.

Another release may rename any of it without a word. The versions that this file was written for
stand here, and both the version and each name are checked before they are relied on.
"""

from __future__ import annotations

import functools
import logging
import os
import re
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

# DeepSpeed chooses its accelerator while it is imported, and warns where it finds no GPU by itself.
if not torch.cuda.is_available():
    os.environ.setdefault("DS_ACCELERATOR", "cpu")

# Other modules take the package from here, so that it is prepared as above and below.
import deepspeed as deepspeed
from deepspeed.runtime import bf16_optimizer, compiler, utils
from deepspeed.runtime.zero import stage_1_and_2
from deepspeed.utils import groups

from clue_dist.errors import ClueError

OLDEST_VERSION = (0, 19, 8)
FIRST_UNKNOWN_VERSION = (0, 20)


@dataclass(frozen=True)
class ParameterShard:
    """Elements [start, start + numel) of a flattened parameter, in float32."""

    name: str  # name of the parameter
    start: int
    numel: int
    master: Tensor  # the tensor that the optimizer updates; it may hold many parameters end to end
    master_start: int  # where the shard begins in `master`

    def select_from(self, flat: Tensor) -> Tensor:
        """The shard's elements of a tensor that is laid out like `master`, as a view, (numel,)."""
        return flat.detach().view(-1).narrow(0, self.master_start, self.numel)


def require_known_deepspeed(package: ModuleType) -> None:
    """Check that the version of DeepSpeed is one whose private parts are known.

    Raises:
        ClueError: it is not.
    """
    version = tuple(int(number) for number in re.findall(r"\d+", package.__version__)[:3])
    if not OLDEST_VERSION <= version < FIRST_UNKNOWN_VERSION:
        raise _make_version_error(package, f"DeepSpeed {package.__version__}")


def read_private(owner: Any, name: str, package: ModuleType = deepspeed) -> Any:
    """Read an attribute that DeepSpeed does not promise to keep.

    Raises:
        ClueError: this version does not have it.
    """
    try:
        return getattr(owner, name)
    except AttributeError:
        title = owner.__name__ if isinstance(owner, ModuleType) else type(owner).__name__
        found = f"DeepSpeed {package.__version__}, whose {title} has no `{name}`"
        raise _make_version_error(package, found) from None


def _make_version_error(package: ModuleType, found: str) -> ClueError:
    oldest, newest = (
        ".".join(map(str, version)) for version in (OLDEST_VERSION, FIRST_UNKNOWN_VERSION)
    )
    return ClueError(
        "this version of DeepSpeed works differently inside",
        where=package.__file__,
        got=found,
        expected=f"{oldest} or later, but before {newest}",
        fix=f'pip install "deepspeed>={oldest},<{newest}"',
    )


def _skip_optimizer_compilation() -> None:
    """Have DeepSpeed leave alone what it would hand to torch.compile while it is imported.

    Those are parts of an optimizer that is not used here; they cost each rank a second and 45 MB.
    """
    read_private(compiler, "compile")
    compiler.compile = lambda: lambda function: function


def _silence_deepspeed() -> None:
    """Keep from the output what no user of this project can act on.

    DeepSpeed calls every optimizer untested that is not its own; those used here are tested under
    all its stages. Its optimizer for bf16 prints how full the memory is for each group of weights.
    """
    logging.getLogger("DeepSpeed").addFilter(
        lambda record: "untested optimizer" not in record.getMessage()
    )
    read_private(bf16_optimizer, "see_memory_usage")
    bf16_optimizer.see_memory_usage = lambda *_, **__: None


require_known_deepspeed(deepspeed)
_skip_optimizer_compilation()
_silence_deepspeed()


def disable_shared_memory_collectives() -> None:
    """Have DeepSpeed use gloo on CPUs.

    On first use it would compile shared-memory collectives; gloo needs no compiler and is tested.
    """
    # DeepSpeed looks up nothing else in this table. To fill it would start compilers on each rank.
    read_private(deepspeed.ops, "_probe_compatible_ops")
    deepspeed.ops.__compatible_ops__ = {"deepspeed_shm_comm": False}


_gather_parts = read_private(utils, "all_gather_into_tensor_dp_groups")


def choose_gathering(backend: str) -> None:
    """Have DeepSpeed gather what the ranks updated by broadcasts over gloo, else in its own way.

    gloo's own gathering copies everything twice, into memory that is new each time, which takes
    four times as long.
    """
    utils.all_gather_into_tensor_dp_groups = (
        _broadcast_parts if backend == "gloo" else _gather_parts
    )


def _broadcast_parts(
    _: list[Tensor], parts_of_groups: list[list[Tensor]], process_groups: list[Any]
) -> None:
    """Send every rank's part of each group of weights to all others."""
    for parts, process_group in zip(parts_of_groups, process_groups, strict=True):
        if len(parts) > 1:  # a part for each rank
            for rank, part in enumerate(parts):
                dist.broadcast(part, group=process_group, group_src=rank)


def forget_former_group() -> None:
    """Have DeepSpeed make its copy of the process group anew.

    It keeps the copy for good, also where that group was left and another one is joined, as by a
    second training in one process.
    """
    read_private(groups, "_WORLD_GROUP")
    groups._WORLD_GROUP = None


def keep_gradients_local(engine: Any) -> None:
    """Have an engine under ZeRO-0 or 1 leave gradients as the backward pass made them.

    It would copy all of them into one tensor, and back, to exchange them, be it with nobody.
    """
    read_private(engine, "enable_backward_allreduce")
    engine.enable_backward_allreduce = False


def keep_gradient_memory(engine: Any) -> None:
    """Have an engine under ZeRO-0 in float32 set gradients to zero after a step, and keep them.

    It would free them. Memory that is new in each step takes longer to fill with zeros than to
    update the weights, and a step writes few rows of the largest gradients, those of decoders.
    """
    read_private(engine, "_take_model_step")  # which calls `zero_grad`
    engine.zero_grad = functools.partial(engine.basic_optimizer.zero_grad, set_to_none=False)


def keep_flat_gradients(engine: Any) -> None:
    """Have an engine under ZeRO-1 in float32 update from where the backward pass adds gradients up.

    They lie as DeepSpeed lays out the weights, end to end, in memory that is kept. So this rank's
    part of them is one piece, which the optimizer takes as it is.
    """
    optimizer = engine.optimizer
    memory = [torch.zeros_like(flat) for flat in read_private(optimizer, "bit16_groups_flat")]

    def zero_grad(set_to_none: bool = True) -> None:
        for number, flat in enumerate(memory):
            part = optimizer.get_data_parallel_partitions(flat.zero_(), number)[dist.get_rank()]
            group = stage_1_and_2.GradPartitionBufferGroup([part], part)
            read_private(optimizer, "averaged_gradients")[number] = group
            for weight in read_private(optimizer, "bit16_groups")[number]:
                gradient = flat.narrow(0, weight.storage_offset(), weight.numel())
                weight.grad = gradient.view_as(weight)

    read_private(engine, "_take_model_step")  # which calls `zero_grad`
    optimizer.zero_grad = zero_grad
    zero_grad()


def checks_gradients(engine: Any) -> bool:
    """Whether the engine skips an update by itself where a gradient is not finite.

    Only ZeRO-0 in float32 does not: its optimizer is torch's, which knows no overflow.
    """
    return hasattr(engine.optimizer, "overflow")


def fill_missing_gradients(engine: Any) -> None:
    """Give weights that no cell of a batch concerns the gradient zero, as several ranks do.

    Else the optimizer would leave them out, and count fewer updates of them than of others.
    """
    if checks_gradients(engine):  # such an engine does it by itself
        return
    for weight in list_optimized(engine):
        if weight.grad is None:
            weight.grad = torch.zeros_like(weight)


def list_optimized(engine: Any) -> list[Tensor]:
    """List the weights that torch's optimizer updates. A walk through all modules takes longer."""
    return [weight for group in engine.optimizer.param_groups for weight in group["params"]]


def list_reduced_gradients(engine: Any) -> tuple[list[Tensor], bool]:
    """List the gradients that the next update takes, under ZeRO-0, 1 and 2 in float32.

    Returns:
        The gradients, already averaged over ranks, and whether each rank has a share of them alone.
    """
    if not checks_gradients(engine):
        weights = list_optimized(engine)
        return [weight.grad for weight in weights if weight.grad is not None], False
    groups = read_private(engine.optimizer, "averaged_gradients")
    return [gradient for gradients in groups.values() for gradient in gradients], True


def find_whole_shape(parameter: Any) -> list[int]:
    """The shape of a whole parameter, of which ZeRO-3 leaves the module only an empty one."""
    return list(getattr(parameter, "ds_shape", parameter.shape))


# --- where an engine keeps parameters in float32 ----------------------------------------------


def list_updated_shards(engine: Any) -> list[ParameterShard]:
    """List what this rank updates: everything under ZeRO-0, its share under other stages."""
    return _list_shards(engine, rank=0, world=1)


def list_saved_shards(engine: Any) -> list[ParameterShard]:
    """List what this rank saves: the shards of all ranks together cover each parameter once."""
    return _list_shards(engine, dist.get_rank(), dist.get_world_size())


def _list_shards(engine: Any, rank: int, world: int) -> list[ParameterShard]:
    """List this rank's shards; of what every rank has whole, the share of `rank` among `world`."""
    optimizer, masters = engine.optimizer, _find_whole_masters(engine)
    shards: list[ParameterShard] = []
    shard: ParameterShard | None
    for name, parameter in engine.module.named_parameters():
        # DeepSpeed has an optimizer of its own for each of these, and marks the parameters.
        if hasattr(parameter, "ds_id"):
            shard = _locate_in_zero_3(optimizer, name, parameter)
        elif hasattr(parameter, "_hp_mapping"):
            shard = _locate_in_zero_1_or_2(optimizer, name, parameter)
        else:
            shard = _locate_in_zero_0(name, masters[parameter], rank, world)
        if shard is not None and shard.numel > 0:
            shards.append(shard)
    return shards


def _locate_in_zero_3(optimizer: Any, name: str, parameter: Any) -> ParameterShard:
    """Every rank has an equal part of every parameter; the last part is padded."""
    number = read_private(optimizer, "get_param_id")(parameter)
    group, master_start, part_numel = read_private(optimizer, "grad_position")[number]
    start = min(dist.get_rank() * part_numel, parameter.ds_numel)
    numel = min(part_numel, parameter.ds_numel - start)
    master = read_private(optimizer, "fp32_partitioned_groups_flat")[group]
    return ParameterShard(name, start, numel, master, master_start)


def _locate_in_zero_1_or_2(optimizer: Any, name: str, parameter: Any) -> ParameterShard | None:
    """The parameters are laid end to end and cut into one part for each rank."""
    mapping = parameter._hp_mapping
    if mapping is None:  # all of this parameter lies with other ranks
        return None
    in_parameter = read_private(mapping, "lp_fragment_address")
    in_master = read_private(mapping, "hp_fragment_address")
    # Under ZeRO-1 the bf16 optimizer has other names for them.
    zero = hasattr(optimizer, "single_partition_of_fp32_groups")
    masters = read_private(
        optimizer, "single_partition_of_fp32_groups" if zero else "fp32_groups_flat_partition"
    )
    master = masters[read_private(mapping, "param_group_index")]
    return ParameterShard(name, in_parameter.start, in_parameter.numel, master, in_master.start)


def _locate_in_zero_0(name: str, master: Tensor, rank: int, world: int) -> ParameterShard:
    """Every rank has everything, so that each takes an equal share."""
    start, end = (master.numel() * number // world for number in (rank, rank + 1))
    return ParameterShard(name, start, end - start, master, start)


def _find_whole_masters(engine: Any) -> dict[Any, Tensor]:
    """Under ZeRO-0: the float32 tensor of each parameter, which is itself unless it is bf16."""
    # These are bf16 parameters, in spite of the name.
    groups = getattr(engine.optimizer, "fp16_groups", None)
    if groups is None or not hasattr(engine.optimizer, "fp32_groups"):
        return {parameter: parameter for parameter in engine.module.parameters()}
    pairs = zip(groups, engine.optimizer.fp32_groups, strict=True)
    return {
        parameter: master
        for parameters, masters in pairs
        for parameter, master in zip(parameters, masters, strict=True)
    }
