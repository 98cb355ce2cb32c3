"""DeepSpeed: its config out of ours, and the engine."""

from __future__ import annotations

import os
import warnings
from collections import defaultdict
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from clue_dist.checkpoint.deepspeed_internals import (
    deepspeed,
    disable_shared_memory_collectives,
)
from clue_dist.config import Config
from clue_dist.model.clue import CLUE
from clue_dist.model.initialise import initialise_model
from clue_dist.objective import Objective
from clue_dist.ranks import Ranks
from clue_dist.train.setup import Setup


def join_process_group(ranks: Ranks) -> torch.device:
    """Join the process group and return this rank's device; a single process makes a group of one."""
    device = ranks.choose_device()
    backend = "nccl" if device.type == "cuda" else "gloo"
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if ranks.world == 1 and not dist.is_initialized():
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)  # type: ignore[attr-defined]
    warnings.filterwarnings(
        "ignore", category=FutureWarning, module="torch.distributed"
    )  # DeepSpeed's own calls
    ranks.join_group(backend)
    os.environ["LOCAL_RANK"] = str(device.index or 0)  # DeepSpeed takes the device of this number
    disable_shared_memory_collectives()
    deepspeed.init_distributed(dist_backend=backend, verbose=False)
    return device


def build_engine(
    setup: Setup, ranks: Ranks, device: torch.device, start: Callable[[CLUE], None] | None = None
) -> Any:
    """The DeepSpeed engine around an `Objective`, the same on every rank.

    start: sets the weights rank 0 begins with, instead of a fresh initialisation.
    """
    c = setup.config
    torch.manual_seed(c.seed)
    model = CLUE(setup.specs, len(setup.store.manifest.batches), c.model)
    if ranks.is_first and start is not None:
        start(model)
    elif ranks.is_first:
        initialise_model(
            model,
            setup.store,
            setup.train_cells,
            c.model.trunk.projection_init != "random",
            c.seed,
            setup.stored_svds,
        )
    objective = Objective(model, c.objective, weigh_modalities(setup)).to(device)
    for tensor in [*objective.parameters(), *objective.buffers()]:
        dist.broadcast(tensor.data, 0)
    engine, *_ = deepspeed.initialize(
        model=objective,
        optimizer=OPTIMIZERS[c.train.optimizer](
            group_parameters(objective, c), lr=c.train.lr, eps=EPSILON
        ),
        config=make_deepspeed_config(c, ranks.world),
        dist_init_required=False,
    )
    return engine


class SkippingOptimizer:
    """An optimizer that leaves an update out where it is told to: DeepSpeed itself does so under ZeRO alone."""

    skip = False

    def step(self, closure: Any = None) -> Any:
        return None if self.skip else super().step(closure)  # type: ignore[misc]


class AdamW(SkippingOptimizer, torch.optim.AdamW):
    pass


class RMSprop(SkippingOptimizer, torch.optim.RMSprop):
    pass


OPTIMIZERS = {"adamw": AdamW, "rmsprop": RMSprop}
# Above the rounding of a gradient: with torch's 1e-8 a gradient that is zero but for the order of a sum moves its
# weight by a good part of the learning rate, and another number of ranks by another part.
EPSILON = 1e-6


def weigh_modalities(setup: Setup) -> list[float]:
    own = setup.config.modalities
    return [own[m].weight if m in own else 1.0 for m in setup.specs]


def group_parameters(objective: nn.Module, config: Config) -> list[dict[str, Any]]:
    """Trained parameters in groups of equal learning rate, their module's `lr_scale` times `train.lr`, and decay.

    Biases, norms and temperatures are not decayed. Where the rate is larger, `EPSILON` is, by as much.
    """
    groups: dict[tuple[float, bool], list[nn.Parameter]] = defaultdict(list)
    for module in objective.modules():
        for name, p in module.named_parameters(recurse=False):
            matrix = p.ndim > 1 and name == "weight"
            groups[getattr(module, "lr_scale", 1.0), matrix].append(p)
    return [
        {
            "params": ps,
            "lr_scale": scale,
            "eps": EPSILON * max(scale, 1.0),
            "weight_decay": config.train.weight_decay if matrix else 0.0,
        }
        for (scale, matrix), ps in groups.items()
    ]


def make_deepspeed_config(config: Config, world: int) -> dict[str, Any]:
    """The few settings DeepSpeed needs. Everything a person may set lives in our own config."""
    t = config.train
    assert config.data.batch_size != "auto"
    bf16 = t.precision == "bf16"
    return {
        "train_batch_size": config.data.batch_size,
        "train_micro_batch_size_per_gpu": config.data.batch_size // (t.grad_accum * world),
        "gradient_accumulation_steps": t.grad_accum,
        "gradient_clipping": t.clip,
        "zero_optimization": {"stage": t.zero_stage},
        "zero_allow_untested_optimizer": True,
        "bf16": {"enabled": bf16},
        # ZeRO-0 knows gradients of the model's own type alone
        **({"data_types": {"grad_accum_dtype": "fp32"}} if bf16 and t.zero_stage else {}),
        "steps_per_print": 10**12,  # our own sinks report
    }
