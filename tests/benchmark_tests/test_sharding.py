"""The benchmark of sharding: what it counts of an engine, and its model of a step."""

from dataclasses import replace
from typing import Any

import pytest
import torch

from clue_dist.ranks import Ranks
from clue_dist.train.engine import join_process_group
from tests.benchmarks.gpu.training import make_trainer
from tests.benchmarks.gpu.workload import TINY, TINY_MODEL, make_batch
from tests.benchmarks.sharding import counting, predictions, probe
from tests.benchmarks.sharding.__main__ import Sharding
from tests.benchmarks.sharding.step_model import (
    Machine,
    StepWork,
    calibrate_machine,
    count_wire_bytes,
    predict_step,
    resize_work,
)

WORK = StepWork(512, 8e9, 1e9, 1e6, 1e3, 1e5, {0: 3, 1: 10, 3: 100}, bytes_touched=1e8)
MACHINE = Machine("any", 1e11, 1e10, 1e9, latency_s=1e-3)


def test_a_rank_alone_holds_all_of_everything() -> None:
    join_process_group(Ranks())
    trainer = make_trainer(TINY, torch.device("cpu"), "fp32", TINY_MODEL, stage=0)
    weights = 4 * sum(weight.numel() for weight in trainer.engine.module.parameters())
    batch = make_batch(TINY)
    counted = probe.count_stage(trainer, iter([batch, batch]))
    assert sum(counted["parameters"].values()) == weights
    # Two moments, but for tensors of one number, of which moments look like a count of steps.
    assert sum(counted["optimizer"].values()) == pytest.approx(2 * weights, rel=1e-3)
    assert counted["gradients_kept"] == counted["gradients_most"] == weights
    assert counted["bucket"] == 0 < counted["buffers"]
    heads = trainer.engine.module.model.heads
    assert counted["parameters"]["heads"] == 4 * sum(w.numel() for w in heads.parameters())
    # What the backward pass needs is more than the components that it begins with.
    assert counted["activations"] > 4 * 3 * TINY.n_cells * TINY_MODEL.trunk.projection
    assert counted["gflop"] > 0
    assert not counted["calls"]  # it has nobody to ask


def test_more_modalities_are_small_ones() -> None:
    shape = probe.choose_shape(8, 64, quick=True)
    batch = make_batch(replace(shape, n_cells=8))
    assert len(batch.modalities) == 8
    assert probe.choose_shape(2, 64, quick=False).n_panels == 0


def test_collectives_are_counted_by_what_belongs_to_all_ranks() -> None:
    join_process_group(Ranks())
    with counting.CollectiveCounter() as counter:
        torch.distributed.all_reduce(torch.ones(6))
        torch.distributed.all_gather_into_tensor(torch.empty(5), torch.ones(5))
    assert counter.calls == {"allreduce": 1, "allgather": 1}
    assert counter.sizes == {"allreduce": 24, "allgather": 20}
    assert predictions.sum_wire_bytes(dict(counter.sizes), 2) == 24 + 10


def test_means_over_ranks_keep_the_places_of_numbers() -> None:
    two = [{"a": 1, "b": {"c": 4.0}}, {"a": 3, "b": {"c": 0.0}}]
    assert probe.average_values(two) == {"a": 2, "b": {"c": 2}}


@pytest.mark.parametrize(
    ("stage", "n_bytes"), [(0, 2 * 40), (1, 2 * 40 + 400), (2, 3 * 400), (3, 2 * 400)]
)
def test_all_but_one_part_of_what_is_exchanged_goes_round_the_ring(
    stage: int, n_bytes: int
) -> None:
    work = replace(WORK, weights=100, gradients=40, latents=0)
    assert count_wire_bytes(stage, work, 1) == 0
    assert count_wire_bytes(stage, work, 4) == n_bytes * 3 / 4
    assert count_wire_bytes(stage, replace(work, latents=10), 4) == n_bytes * 3 / 4 + 90


def test_a_step_of_several_ranks_adds_exchange_and_shards_the_update() -> None:
    alone = predict_step(WORK, MACHINE, 1, 0)
    assert alone == pytest.approx(9e9 / 1e11 + 1e6 * 28 / 1e10)
    more = 1e9 / 1e11  # InfoNCE compares with the cells of the other rank, too
    sent = count_wire_bytes(0, WORK, 2) / 1e9 + 3e-3
    assert predict_step(WORK, MACHINE, 2, 0) == pytest.approx(alone + more + sent)
    unsharded, sharded = (
        predict_step(WORK, replace(MACHINE, exchanged_per_s=1e30), 2, s) for s in (0, 1)
    )
    assert unsharded - sharded == pytest.approx(1e6 * 28 / 1e10 / 2 - 7e-3)


def test_a_step_is_bound_by_memory_launches_and_shared_cores() -> None:
    slow_memory = replace(MACHINE, copied_per_s=1e9)
    assert predict_step(WORK, slow_memory, 1, 0) == pytest.approx(0.1 + 0.028)
    assert predict_step(WORK, replace(MACHINE, launches_s=2.0), 1, 0) == 2.0
    free, shared = (predict_step(WORK, replace(MACHINE, cores=n), 4, 0) for n in (4, 2))
    busy = (8e9 + 4e9) / 1e11 + 1e6 * 28 / 1e10
    assert shared - free == pytest.approx(busy)


def test_calibrated_machines_take_as_long_as_was_measured() -> None:
    machine = calibrate_machine(MACHINE, WORK, 0.5)
    assert predict_step(WORK, machine, 1, 0) == pytest.approx(0.5)


def test_more_cells_compare_with_more_cells() -> None:
    work = resize_work(WORK, 2 * WORK.cells)
    assert (work.flops, work.contrast_flops, work.latents) == (16e9, 4e9, 2e3)
    assert work.weights == WORK.weights


def make_record(ranks: int, step_ms: float, **stages: dict[str, Any]) -> dict[str, Any]:
    counted = {
        "parameters": {"heads": 400.0, "rest": 3600.0},
        "optimizer": {"heads": 800.0, "rest": 7200.0},
        **{"gradients_most": 4000.0, "gradients_kept": 4000.0, "bucket": 0.0, "buffers": 8.0},
        **{"activations": 16.0, "calls": {"allreduce": 2.0}, "operators": 1000.0},
        **{"exchanged": {"allreduce": 4000.0, "allgather": 64.0 * ranks}, "touched_gb": 1e-3},
        **{"gflop": 1.0 + 0.5 * ranks, "step_ms": step_ms, "step_cpu_ms": step_ms},
    }
    names = ("0",) if ranks == 1 else ("0", "1")
    machine = {"copied_gb_per_s": 10.0, "exchanged_gb_per_s": 1.0, "latency_ms": 0.1}
    record = {"method": f"fp32-{ranks}", "data_set": "K=2", "fold": 0, "ranks": ranks, "cells": 8}
    return record | {"stages": dict.fromkeys(names, counted), "machine": machine}


def test_work_is_told_apart_from_infonce_by_two_numbers_of_ranks() -> None:
    steps = predictions.select_steps([make_record(1, 100.0), make_record(2, 105.0)])
    work = predictions.describe_work(steps)
    assert work.flops == pytest.approx(1e9)
    assert work.contrast_flops == pytest.approx(0.5e9)
    assert (work.weights, work.latents, work.gradients) == (1000, 64, 4000 - 2 * 64)
    machine = predictions.describe_machine(steps, cores=2)
    assert predict_step(work, machine, 1, 0) == pytest.approx(0.1)
    assert "ms by the model" in predictions.tabulate_steps(steps, 2)
    assert len(predictions.tabulate_gpus(steps).splitlines()) == 1 + 2 * 3 * 2


def test_a_rank_holds_shards_of_gradients_from_zero_2_on() -> None:
    record = make_record(1, 1.0)
    counted = record["stages"]["0"] | {"gradients_kept": 1000.0}
    # A weight, its gradient and two moments of 4 bytes each, of 1000 weights.
    assert [predictions.count_held(stage, counted) for stage in (0, 1, 2, 3)] == [
        16_000.0,
        16_000.0,
        13_000.0,
        13_000.0,
    ]
    assert "bytes a weight" in predictions.tabulate_bytes([record])


def test_the_bar_is_about_two_ranks_and_twice_one() -> None:
    benchmark = Sharding(["--json", "x.json", "--repeats", "1"])
    one, two = make_record(1, 100.0), make_record(2, 105.0)
    two["stages"]["1"] = two["stages"]["1"] | {"step_cpu_ms": 125.0}
    wall, cpu = benchmark.judge([one, two])
    assert (wall["value"], wall["holds"]) == (pytest.approx(100 / 105), True)
    assert (cpu["value"], cpu["holds"]) == (pytest.approx(0.8), False)
    assert all(bar["holds"] is None for bar in benchmark.judge([one]))
    assert all(bar["holds"] is None for bar in benchmark.judge([]))


def test_a_rank_alone_in_fp32_has_one_case_of_each_size() -> None:
    cases = list(Sharding(["--json", "x.json", "--repeats", "2"]).list_cases())
    assert len(cases) == 2 * 2 * 3 + 3
    assert cases[-1] == ("fp32-4", "K=2", 1, 0)
