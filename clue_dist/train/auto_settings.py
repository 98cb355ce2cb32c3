"""What the config leaves at "auto"; it follows from the store's cells and from the processor."""

from __future__ import annotations

import math
import time

import torch

from clue_dist.config import Config, ModelConfig, TrainConfig

AUTO_STEPS = 1500  # a small data set is seen often enough to make so many steps ...
MOST_EPOCHS = 90.0  # ... but never more often than this
# Fewer cells are learnt by heart sooner: of 480 bone marrow cells, 90 epochs matched others worse
# (docs/results.md). Larger batches make fewer steps of an epoch, so that 1,999 cells take more of
# them than 2,000 do.
FEW_CELLS = 2000
MOST_EPOCHS_OF_FEW_CELLS = 60.0
MOST_STEPS_BETWEEN = 2000  # two validations, or two checkpoints
# Batch sizes with the number of training cells from which on the next one is taken.
BATCH_SIZES = ((128, 2_000), (256, 4_000), (512, 500_000), (1024, 1_000_000), (2048, 4_000_000))
LARGEST_BATCH_SIZE = 4096
# From so many modalities on, heads with matrices of their own would be over a quarter of the
# encoders' weights.
MANY_MODALITIES = 4
HEAD_RANK = 16
TIMED_WIDTH, TIMED_REPEATS = 512, 9  # of matrices whose product is timed


def resolve_auto_settings(config: Config, n_train: int, n_modalities: int) -> Config:
    """Put what the data and the processor ask for where the config says "auto".

    Small data get small batches and many epochs, an atlas gets large batches and one epoch.

    Args:
        config: what a person set.
        n_train: the number of training cells.
        n_modalities: K.
    """
    training, data = config.train, config.data
    multiple = data.lanes * training.grad_accum  # a batch is made of so many equal parts
    auto_batch_size = multiple * -(-_choose_batch_size(n_train) // multiple)
    batch_size = data.batch_size if data.batch_size != "auto" else auto_batch_size
    epoch_steps = max(1.0, n_train / batch_size)
    most_epochs = MOST_EPOCHS if n_train >= FEW_CELLS else MOST_EPOCHS_OF_FEW_CELLS
    auto_epochs = round(min(max(1.0, AUTO_STEPS / epoch_steps), most_epochs), 2)
    epochs = training.epochs if training.epochs != "auto" else auto_epochs
    total_steps = max(1, round(epochs * epoch_steps))
    numbers: dict[str, float] = {"epochs": epochs}
    if training.validate_every == "auto":
        numbers["validate_every"] = max(1, min(total_steps // 20, MOST_STEPS_BETWEEN))
    if training.checkpoint_every == "auto":
        numbers["checkpoint_every"] = max(1, min(total_steps // 4, MOST_STEPS_BETWEEN))
    return config.model_copy(
        update={
            "model": _resolve_head_rank(config.model, n_modalities),
            "data": data.model_copy(update={"batch_size": batch_size}),
            "train": _resolve_precision(training.model_copy(update=numbers)),
        }
    )


def _resolve_precision(training: TrainConfig) -> TrainConfig:
    if training.precision != "auto":
        return training
    return set_found_precision(training, "mixed" if multiplies_faster_in_bfloat16() else "fp32")


def set_found_precision(training: TrainConfig, precision: str) -> TrainConfig:
    """Set the precision that machines can do, where nobody named one.

    So a run that began on another processor goes on as it began.
    """
    resolved = training.model_copy(update={"precision": precision})
    resolved.model_fields_set.discard("precision")
    return resolved


def multiplies_faster_in_bfloat16() -> bool:
    """Whether the GPU, or the processor where there is none, gains by products in bfloat16.

    A GPU does if it has instructions for them. Of two processors that have some, one takes half as
    long as in float32 (AMD EPYC), one twice as long (Intel Xeon without AMX). So one product is
    timed.
    """
    if torch.cuda.is_available():
        return torch.cuda.is_bf16_supported(including_emulation=False)
    # Earlier versions of torch do not tell.
    capabilities: dict[str, bool] = getattr(torch.cpu, "get_capabilities", dict)()
    if not any(capabilities.get(name, False) for name in ("avx512_bf16", "amx_bf16")):
        return False
    lower, full = time_products(torch.bfloat16, torch.float32)
    return lower < full


def time_products(*dtypes: torch.dtype) -> list[float]:
    """CPU seconds of this thread for the product of two matrices, the least of some repeats.

    The dtypes take turns, so that what else runs on the machine weighs on all alike.
    """
    matrices = [torch.ones(2, TIMED_WIDTH, TIMED_WIDTH, dtype=dtype).unbind() for dtype in dtypes]
    seconds = [math.inf] * len(dtypes)
    for _ in range(TIMED_REPEATS):
        for number, (left, right) in enumerate(matrices):
            began = time.thread_time()
            left @ right
            seconds[number] = min(seconds[number], time.thread_time() - began)
    return seconds


def _resolve_head_rank(model: ModelConfig, n_modalities: int) -> ModelConfig:
    if model.head_rank != "auto":
        return model
    rank = HEAD_RANK if n_modalities >= MANY_MODALITIES and model.trunk.shared else 0
    resolved = model.model_copy(update={"head_rank": rank})
    # Nobody named it: a run that is older than this setting goes on without it.
    resolved.model_fields_set.discard("head_rank")
    return resolved


def _choose_batch_size(n_train: int) -> int:
    """A power of two that grows with the data."""
    return next((size for size, limit in BATCH_SIZES if n_train < limit), LARGEST_BATCH_SIZE)
