"""Tables of what ranks counted and timed: bytes, steps beside the model, GPUs by the model."""

from collections.abc import Sequence
from dataclasses import replace
from itertools import product
from statistics import median

import pandas as pd

from clue_dist.config import DecoderConfig, TrunkConfig
from clue_dist.train.engine import LARGEST_BUCKET
from tests.benchmarks.report import Result, format_table
from tests.benchmarks.sharding.step_model import (
    LIVE_WEIGHTS,
    UPDATE_BYTES,
    Machine,
    StepWork,
    calibrate_machine,
    count_wire_bytes,
    fit_features,
    predict_step,
    resize_work,
)

StepRecords = dict[int, list[Result]]  # the repeats of each number of ranks
GPU_MEMORY = 80e9
# Assumed, not measured: a tenth of an H100's rate of products in bf16, two thirds of its memory's,
# a link of 400 Gb/s, and 5 microseconds for each operator that the host asks for.
GPU = Machine("GPU, assumed", 1e14, 2e12, 4e10, latency_s=3e-5)
LAUNCH_S = 5e-6
GPU_RANKS, GPU_CELLS, ATLAS = (1, 8, 64), (64, 512), 10**8
FEATURE_WEIGHTS = DecoderConfig().hidden + 2  # with its bias and dispersion
# A feature's row of the projection, and its share of cells: every rank has them.
FEATURE_BUFFERS = 4 * (TrunkConfig().projection + 1)
LEFT_OUT = ("calls", "exchanged", "gflop", "operators", "touched_gb", "step_ms", "step_cpu_ms")


def count_held(stage: int, counted: Result) -> float:
    """Bytes of weights, gradients and optimizer that a rank holds.

    From ZeRO-2 on the gradients of a large model are shards but for those in the bucket.
    """
    parts = (*counted["parameters"].values(), *counted["optimizer"].values())
    return float(sum(parts) + counted["gradients_most" if stage < 2 else "gradients_kept"])


def tabulate_bytes(records: Sequence[Result]) -> str:
    """MB of each rank, and the features whose decoders fit into 80 GB by the bytes of a weight.

    Args:
        records: of every size; each has all stages of a number of ranks.
    """
    alone = {r["data_set"]: find_stage(r, 0) for r in records if r["method"] == "fp32-1"}
    rows = []
    for record in (r for r in records if r["fold"] == 0):
        for stage, counted in record["stages"].items():
            row = {"K": record["data_set"], "ranks": record["method"], "ZeRO": stage}
            sizes = pd.json_normalize({k: v for k, v in counted.items() if k not in LEFT_OUT})
            row |= (sizes.iloc[0] / 1e6).to_dict()
            if record["data_set"] in alone:
                weights = sum(alone[record["data_set"]]["parameters"].values()) / 4
                row["bytes a weight"] = count_held(int(stage), counted) / weights
                # What a large model has: a full bucket, and weights that ZeRO-3 has gathered.
                fixed = 4 * (LARGEST_BUCKET * (stage > "1") + LIVE_WEIGHTS * (stage == "3"))
                held = row["bytes a weight"] * FEATURE_WEIGHTS + FEATURE_BUFFERS
                fixed += alone[record["data_set"]]["activations"]
                row["million features"] = fit_features(GPU_MEMORY, fixed, held) / 1e6
            rows.append(row)
    return format_table(pd.DataFrame(rows).set_index(["K", "ranks", "ZeRO"]))


def tabulate_steps(steps: StepRecords, cores: int) -> str:
    """Milliseconds of a step, measured and by the model; MB that a rank sends, likewise."""
    rows, work, machine = [], describe_work(steps), describe_machine(steps, cores)
    for ranks, repeats in steps.items():
        for name, counted in repeats[0]["stages"].items():
            stage = int(name)
            cpu_ms = 1e3 * measure_step(repeats, stage, "step_cpu_ms")
            row = {"ranks": str(ranks), "ZeRO": name, "ms": 1e3 * measure_step(repeats, stage)}
            row |= {"ms by the model": 1e3 * predict_step(work, machine, ranks, stage)}
            row |= {"CPU ms": cpu_ms, "MB sent": sum_wire_bytes(counted["exchanged"], ranks) / 1e6}
            sent = count_wire_bytes(stage, work, ranks)
            rows.append(row | {"MB sent by the model": sent / 1e6})
    return format_table(pd.DataFrame(rows).set_index(["ranks", "ZeRO"]))


def tabulate_gpus(steps: StepRecords) -> str:
    """What the model says of GPUs whose rates are assumed: nothing of it was measured."""
    rows = []
    machine = replace(GPU, launches_s=LAUNCH_S * find_stage(steps[1][0], 0)["operators"])
    for cells, ranks in product(GPU_CELLS, GPU_RANKS):
        work = resize_work(describe_work(steps), cells)
        for stage in work.collectives:
            step_s = predict_step(work, machine, ranks, stage)
            row = {"cells a GPU": str(cells), "GPUs": str(ranks), "ZeRO": str(stage)}
            row |= {"ms a step": 1e3 * step_s, "cells/s": ranks * cells / step_s}
            rows.append(row | {"hours for 10^8 cells": ATLAS * step_s / (ranks * cells) / 3600})
    return format_table(pd.DataFrame(rows).set_index(["cells a GPU", "GPUs", "ZeRO"]))


def select_steps(records: Sequence[Result]) -> StepRecords:
    """The repeats that steps are timed with, by ranks: those of fp32 and the fewest modalities."""
    smallest = min((r["data_set"] for r in records), key=lambda name: int(name[2:]), default="")
    chosen: StepRecords = {}
    for record in records:
        if record["method"].startswith("fp32") and record["data_set"] == smallest:
            chosen.setdefault(record["ranks"], []).append(record)
    return chosen


def find_stage(record: Result, stage: int) -> Result:
    """What was counted under a stage; a single rank of fp32 has one stage alone."""
    stages = record["stages"]
    return dict(stages[str(stage)] if str(stage) in stages else next(iter(stages.values())))


def measure_step(repeats: Sequence[Result], stage: int, clock: str = "step_ms") -> float:
    """Seconds of a step, by the clock or of CPU, the median of repeats."""
    return median(find_stage(record, stage)[clock] for record in repeats) / 1e3


def describe_work(steps: StepRecords) -> StepWork:
    """What the ranks counted of a step; what is more on many ranks than on one is InfoNCE's."""
    most = max(steps)
    alone, together = find_stage(steps[1][0], 0), steps[most][0]["stages"]
    first = next(iter(together.values()))  # every stage computes the same
    weights = sum(alone["parameters"].values()) / 4
    more = 1e9 * (first["gflop"] - alone["gflop"]) / max(1, most - 1)
    # Under ZeRO-0 and 1 nothing else is gathered, and the latents' gradients are summed, too.
    exchanged = next((together[stage]["exchanged"] for stage in "01" if stage in together), {})
    latents = exchanged.get("allgather", 0) / most
    return StepWork(
        cells=steps[1][0]["cells"],
        flops=1e9 * alone["gflop"] - more,
        contrast_flops=more,
        weights=weights,
        latents=latents,
        gradients=max(0.0, exchanged.get("allreduce", 0) - latents * most),
        collectives={int(stage): sum(c["calls"].values()) for stage, c in together.items()},
        bytes_touched=1e9 * alone["touched_gb"] - UPDATE_BYTES * weights,
    )


def describe_machine(steps: StepRecords, cores: int) -> Machine:
    """This machine, as one rank and the most ranks measured it."""
    alone, together = (steps[ranks][0]["machine"] for ranks in (1, max(steps)))
    machine = Machine(
        "cores",
        flops_per_s=1.0,
        copied_per_s=1e9 * alone["copied_gb_per_s"],
        exchanged_per_s=1e9 * together.get("exchanged_gb_per_s", 1.0),
        latency_s=together.get("latency_ms", 0.0) / 1e3,
        cores=cores,
    )
    return calibrate_machine(machine, describe_work(steps), measure_step(steps[1], 0))


def sum_wire_bytes(exchanged: Result, ranks: int) -> float:
    """Bytes that a rank sends, of those handed over: a sum goes round the ring twice."""
    sizes = exchanged.items()
    whole = sum(size * (2 if kind == "allreduce" else 1) for kind, size in sizes)
    return float(whole * (ranks - 1) / ranks)
