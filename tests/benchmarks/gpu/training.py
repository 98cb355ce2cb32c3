"""How fast a GPU trains and embeds, next to what it could do at most, and what it waits for."""

from __future__ import annotations

import functools
import itertools
import time
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode

from clue_dist.config import Config, ModelConfig
from clue_dist.data.batch import Batch
from clue_dist.data.device_batches import DeviceBatches
from clue_dist.model.fused import has_triton
from clue_dist.ranks import Ranks
from clue_dist.train.engine import build_objective_engine, join_process_group
from clue_dist.train.outcome import OutcomeReader
from clue_dist.train.step import train_step
from clue_dist.train.trainer import Trainer
from tests.benchmarks.gpu.clock import time_calls, wait_for_device
from tests.benchmarks.gpu.counting import count_work
from tests.benchmarks.gpu.workload import (
    ATLAS_TERMS,
    Shape,
    code_batch,
    make_batch,
    make_objective,
)

WARM_UP_STEPS = 5
DISTINCT_BATCHES = 4  # which are copied to the device in turns
# Calls of CUDA that make the host wait, by the names that the profiler gives.
SYNC_CALLS = "cudaStreamSynchronize", "cudaDeviceSynchronize", "cudaEventSynchronize"
LAUNCH_CALLS = "cudaLaunchKernel", "cudaLaunchKernelExC", "cuLaunchKernel", "cuLaunchKernelEx"


class RepeatedBatches:
    """Stands for a loader: a few batches of the host over and over, coded for a GPU."""

    def __init__(self, shape: Shape, coded: bool) -> None:
        self._batches: Iterator[Batch] = itertools.cycle(_make_batches(shape, coded))

    def __next__(self) -> Batch:
        return next(self._batches)

    def close(self) -> None:
        """Nothing is under way."""


@functools.lru_cache(maxsize=1)
def _make_batches(shape: Shape, coded: bool) -> list[Batch]:
    batches = [make_batch(shape, seed) for seed in range(DISTINCT_BATCHES)]
    return [code_batch(batch) for batch in batches] if coded else batches


def make_trainer(
    shape: Shape,
    device: torch.device,
    precision: str,
    model: ModelConfig | None = None,
    stage: int = 1,
    ranks: Ranks | None = None,
) -> Trainer:
    """Make what a rank trains with, around DeepSpeed's engine, without a store.

    Args:
        shape: of the batch of each rank.
        device: where.
        precision: "fp32", "mixed" or "bf16".
        model: sizes of the model; those of `configs/atlas.json` by default.
        stage: of ZeRO.
        ranks: this rank among all; alone by default.
    """
    ranks = ranks or Ranks()
    n_cells = shape.n_cells * ranks.world
    config = Config(
        model=model or ModelConfig(latent=64, posterior="gpoe"),
        objective=ATLAS_TERMS,
        data={"batch_size": n_cells, "lanes": shape.lanes},
        train={"precision": precision, "zero_stage": stage},
    )
    objective = make_objective(shape, model, precision == "mixed").to(device)
    engine = build_objective_engine(objective, config, ranks.world, device)
    plan = SimpleNamespace(compose_batch=lambda _: {"all": n_cells}, lanes=shape.lanes)
    setup: Any = SimpleNamespace(config=config, total_steps=10_000, plan=plan)
    return Trainer(engine, setup, ranks, device)


def measure_training(
    shape: Shape,
    device: torch.device,
    precision: str,
    rates: dict[str, float],
    seconds: float = 6.0,
    model: ModelConfig | None = None,
) -> dict[str, Any]:
    """Train on a shape: speed, share of the roofline, waiting, launches, syncs, memory.

    Args:
        shape: of the batch.
        device: where.
        precision: "fp32", "mixed" or "bf16".
        rates: what `clock.measure_rates` gave.
        seconds: about how long steps are timed.
        model: sizes of the model; those of `configs/atlas.json` by default.
    """
    join_process_group(Ranks())
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    trainer, reader, steps = make_trainer(shape, device, precision, model), OutcomeReader(), 0
    loader: Any = RepeatedBatches(shape, coded=device.type == "cuda" and has_triton())
    with DeviceBatches(loader, device) as batches:

        def take_step() -> None:
            nonlocal steps
            reader.read_outcomes(train_step(trainer, batches, steps), wait_for_latest=False)
            steps += 1

        for _ in range(WARM_UP_STEPS):
            take_step()
        wait_for_device(device)
        started, waited, first = time.perf_counter(), batches.waited_seconds, steps
        while time.perf_counter() - started < seconds:
            take_step()
        wait_for_device(device)
        step_s = (time.perf_counter() - started) / (steps - first)
        waiting = (batches.waited_seconds - waited) / (step_s * (steps - first))
        calls = _profile_calls(take_step, device)
        with FlopCounterMode(display=False) as flops, count_work() as work:
            take_step()
    trainer.engine.destroy()
    multiplied = "fp32" if precision == "fp32" else "bf16"
    at_limit = max(
        flops.get_total_flops() / (rates[f"{multiplied}_tflops"] * 1e12),
        work.bytes_touched / (rates["gb_per_s"] * 1e9),
    )
    return {
        "cells_per_s": shape.n_cells / step_s,
        "step_ms": 1e3 * step_s,
        "gflop": flops.get_total_flops() / 1e9,
        "gb_touched": work.bytes_touched / 1e9,
        "share_of_roofline": at_limit / step_s,
        "waiting_for_data": waiting,
        "operators": work.launches,
        "syncs_by_source": dict(work.syncs),
        **calls,
        "peak_gb": _read_peak_memory(device),
    }


def _profile_calls(work: Any, device: torch.device) -> dict[str, int]:
    """Count launches and waits of the host in one call; nothing where there is no GPU."""
    if device.type != "cuda":
        return {}
    wait_for_device(device)
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiler:
        work()
    counts = {event.key: event.count for event in profiler.key_averages()}
    return {
        "launches": sum(counts.get(name, 0) for name in LAUNCH_CALLS),
        # One of them is the profiler's own, as it ends.
        "syncs": sum(counts.get(name, 0) for name in SYNC_CALLS) - 1,
    }


def measure_embedding(
    shape: Shape, device: torch.device, model: ModelConfig | None = None
) -> dict[str, Any]:
    """Embed batches that lie on the device."""
    clue, batch = make_objective(shape, model).model.to(device).eval(), make_batch(shape).to(device)
    seconds = time_calls(lambda: clue.embed_batch(batch), device)
    return {"cells_per_s": shape.n_cells / seconds, "peak_gb": _read_peak_memory(device)}


def _read_peak_memory(device: torch.device) -> float | None:
    return torch.cuda.max_memory_allocated(device) / 2**30 if device.type == "cuda" else None
