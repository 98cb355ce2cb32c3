"""The DeepSpeed engine: its process group, its config out of ours, its optimizers."""

from __future__ import annotations

import os
import warnings
from collections import defaultdict
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from clue_dist.config import Config
from clue_dist.deepspeed_internals import (
    choose_gathering,
    deepspeed,
    disable_shared_memory_collectives,
    forget_former_group,
    keep_flat_gradients,
    keep_gradient_memory,
    keep_gradients_local,
)
from clue_dist.losses.objective import Objective
from clue_dist.model.clue import CLUE, build_model
from clue_dist.ranks import Ranks
from clue_dist.train.gradients import average_scored_rows
from clue_dist.train.initial_weights import set_initial_weights
from clue_dist.train.setup import Setup


def join_process_group(ranks: Ranks) -> torch.device:
    """Join the process group; a single process makes a group of one.

    Returns:
        This rank's device.
    """
    device = ranks.choose_device()
    backend = "nccl" if device.type == "cuda" else "gloo"
    # NCCL is told its GPU, instead of guessing one at the first exchange.
    gpu = device if device.type == "cuda" else None
    if gpu is not None:
        torch.cuda.set_device(gpu)
    if ranks.world == 1 and not dist.is_initialized():
        store = dist.HashStore()  # type: ignore[attr-defined]
        dist.init_process_group(backend, store=store, rank=0, world_size=1, device_id=gpu)
    # DeepSpeed itself calls what torch will drop.
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")
    ranks.join_group(backend, gpu=gpu)
    os.environ["LOCAL_RANK"] = str(device.index or 0)  # DeepSpeed takes the device of this number
    disable_shared_memory_collectives()
    choose_gathering(backend)
    forget_former_group()
    deepspeed.init_distributed(dist_backend=backend, verbose=False)
    return device


def build_engine(
    setup: Setup,
    ranks: Ranks,
    device: torch.device,
    set_weights: Callable[[CLUE], None] | None = None,
) -> Any:
    """Build the DeepSpeed engine around an `Objective`, the same on every rank.

    Args:
        setup: what to train on what.
        ranks: this rank among all; every rank must call.
        device: this rank's.
        set_weights: sets the weights that rank 0 begins with, instead of a fresh initialisation.
    """
    config = setup.config
    torch.manual_seed(config.seed)
    model = build_model(setup.specs, setup.store.manifest.batch_vocabulary, config.model)
    if ranks.is_first:
        (set_weights or (lambda fresh: set_initial_weights(fresh, setup)))(model)
    objective = Objective(
        model, config.objective, weigh_modalities(setup), config.train.precision == "mixed"
    ).to(device)
    for tensor in [*objective.parameters(), *objective.buffers()]:
        dist.broadcast(tensor.data, 0)
    return build_objective_engine(objective, config, ranks.world, device)


def build_objective_engine(
    objective: Objective, config: Config, world: int, device: torch.device
) -> Any:
    """Build the DeepSpeed engine around an `Objective` on its device, with our optimizer.

    Args:
        objective: the same on every rank.
        config: what a person set.
        world: the number of ranks.
        device: this rank's.
    """
    groups = group_parameters(objective, config)
    guards_on_device = can_guard_on_device(config, world, device)
    optimizer = OPTIMIZERS[config.train.optimizer](groups, lr=config.train.lr, eps=EPSILON)
    optimizer.guards_on_device = guards_on_device
    n_weights = sum(weight.numel() for weight in objective.parameters())
    engine, *_ = deepspeed.initialize(
        model=objective,
        optimizer=optimizer,
        config=make_deepspeed_config(config, world, guards_on_device, n_weights),
        dist_init_required=False,
    )
    if keeps_gradients_local(config, world):
        keep_gradients_local(engine)
        average_scored_rows(objective.model)
        if choose_zero_stage(config, world) == 1:
            keep_flat_gradients(engine)
        elif device.type == "cpu":  # a GPU fills memory with zeros faster than it is told to
            keep_gradient_memory(engine)
    return engine


def keeps_gradients_local(config: Config, world: int) -> bool:
    """Whether DeepSpeed leaves gradients to `train.gradients`, which averages them over ranks.

    It does for weights in float32 where each rank has all gradients, which ZeRO-2 and 3 share out.
    """
    return config.train.precision != "bf16" and choose_zero_stage(config, world) < 2


def can_guard_on_device(config: Config, world: int, device: torch.device) -> bool:
    """Whether the optimizer clips and skips updates by itself, as torch's fused AdamW can.

    So the host need not wait for a GPU. In bf16, or under ZeRO-3, DeepSpeed looks at the gradient's
    norm on the host in any case. On a CPU DeepSpeed's norm under ZeRO-1 takes longer than the
    update.
    """
    settings, stage = config.train, choose_zero_stage(config, world)
    return (
        (stage < 3 if device.type == "cuda" else stage == 1)
        and settings.optimizer == "adamw"
        and settings.precision != "bf16"
    )


class SkippingOptimizer:
    """An optimizer that can leave an update out; of DeepSpeed's own only those of ZeRO can."""

    skip = False  # whether the next update is left out
    # Whether the tensors `found_inf` and `grad_scale` say on the device what to leave out and by
    # what to divide gradients, as torch's fused optimizers read them.
    guards_on_device = False

    def step(self, closure: Any = None) -> Any:
        """As torch's, unless the update is to be left out."""
        return None if self.skip else super().step(closure)  # type: ignore[misc]


class AdamW(SkippingOptimizer, torch.optim.AdamW):
    """torch's AdamW, which updates a weight in one pass over memory."""

    def __init__(self, groups: list[dict[str, Any]], lr: float, eps: float) -> None:
        super().__init__(groups, lr=lr, eps=eps, fused=True)


class RMSprop(SkippingOptimizer, torch.optim.RMSprop):
    """torch's RMSprop."""


OPTIMIZERS = {"adamw": AdamW, "rmsprop": RMSprop}
# Above the rounding of a gradient. With torch's 1e-8, a gradient that would be zero were it not for
# the order of a sum moves its weight by a good part of the learning rate, and by another part on
# another number of ranks.
EPSILON = 1e-6
# Gradients that DeepSpeed lines up before ranks exchange them: its own default.
LARGEST_BUCKET = 500_000_000
MATRICES = "weight", "reduce", "expand"  # names of parameters that decay


def weigh_modalities(setup: Setup) -> list[float]:
    """Weigh the modalities, in the order of the model, as the config says, else by 1."""
    settings = setup.config.modalities
    return [settings[name].weight if name in settings else 1.0 for name in setup.specs]


def group_parameters(objective: nn.Module, config: Config) -> list[dict[str, Any]]:
    """Group the parameters by learning rate and weight decay, as torch's optimizers take them.

    The learning rate is `train.lr` times the `lr_scale` of the parameter's module. Biases, norms
    and temperatures are not decayed. Where the rate is larger, so is `EPSILON`.
    """
    groups: dict[tuple[float, bool], list[nn.Parameter]] = defaultdict(list)
    for module in objective.modules():
        for name, parameter in module.named_parameters(recurse=False):
            is_matrix = parameter.ndim > 1 and name in MATRICES
            groups[getattr(module, "lr_scale", 1.0), is_matrix].append(parameter)
    return [
        {
            "params": parameters,
            "lr_scale": scale,
            "eps": EPSILON * max(scale, 1.0),
            "weight_decay": config.train.weight_decay if is_matrix else 0.0,
        }
        for (scale, is_matrix), parameters in groups.items()
    ]


def choose_zero_stage(config: Config, world: int) -> int:
    """Choose what DeepSpeed shards, as `train.zero_stage` numbers it.

    A single rank shards nothing, unless its weights are bf16: ZeRO would copy every gradient and
    weight in each step.
    """
    settings = config.train
    return 0 if world == 1 and settings.precision != "bf16" else settings.zero_stage


def make_deepspeed_config(
    config: Config,
    world: int,
    guards_on_device: bool,
    n_weights: int,
) -> dict[str, Any]:
    """Make the few settings that DeepSpeed needs; all that a person may set is in our config.

    Args:
        config: what a person set.
        world: the number of ranks.
        guards_on_device: whether the optimizer clips gradients, in place of DeepSpeed.
        n_weights: parameters of the model.
    """
    settings = config.train
    assert config.data.batch_size != "auto"
    is_bf16 = settings.precision == "bf16"
    stage = choose_zero_stage(config, world)
    return {
        "train_batch_size": config.data.batch_size,
        "train_micro_batch_size_per_gpu": config.data.batch_size // (settings.grad_accum * world),
        "gradient_accumulation_steps": settings.grad_accum,
        # Under ZeRO-0, unless in bf16, `train.step` clips by the norm that it needs in any case.
        "gradient_clipping": settings.clip if is_bf16 or (stage and not guards_on_device) else 0.0,
        "zero_optimization": {
            "stage": stage,
            # It needs no copy of gradients that it does not exchange.
            "contiguous_gradients": not keeps_gradients_local(config, world),
            # DeepSpeed takes memory for the whole bucket, be the model as small as it may.
            "reduce_bucket_size": max(1, min(n_weights, LARGEST_BUCKET)),
            **({"compute_grad_norm": False} if guards_on_device and stage else {}),
        },
        "zero_allow_untested_optimizer": True,
        "bf16": {"enabled": is_bf16},
        # ZeRO-0 knows gradients of the model's own type alone.
        **({"data_types": {"grad_accum_dtype": "fp32"}} if is_bf16 and stage else {}),
        "steps_per_print": 10**12,  # our sinks report
    }
