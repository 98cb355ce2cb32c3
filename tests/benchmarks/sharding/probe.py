"""One rank of the benchmark: what it holds, exchanges and computes under each stage of ZeRO.

Rank 0 prints everything as JSON.
"""

import argparse
import itertools
import os
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

import torch
import torch.distributed as dist
from torch.utils.flop_counter import FlopCounterMode

from clue_dist.allocator import keep_freed_memory
from clue_dist.config import Config
from clue_dist.data.batch import Batch
from clue_dist.deepspeed_internals import fill_missing_gradients
from clue_dist.ranks import Ranks
from clue_dist.train.auto_settings import resolve_auto_settings
from clue_dist.train.engine import join_process_group
from clue_dist.train.step import train_step
from clue_dist.train.trainer import Trainer
from tests.benchmarks.gpu.counting import count_work
from tests.benchmarks.gpu.training import make_trainer
from tests.benchmarks.gpu.workload import Shape, make_batch
from tests.benchmarks.peers import measure
from tests.benchmarks.report import Result
from tests.benchmarks.sharding import counting

WARM_UP_STEPS = 2
LARGE, CALLS = 2**24, 20  # bytes and calls that exchanges are timed with
COPIED = 2**26  # bytes


def choose_core(ranks: Ranks) -> None:
    """Give this rank one core, which it shares where ranks are more than cores."""
    cores = sorted(os.sched_getaffinity(0))
    os.sched_setaffinity(0, {cores[ranks.rank % len(cores)]})
    torch.set_num_threads(1)


def time_calls(work: Callable[[], object], calls: int) -> tuple[float, float]:
    """Seconds and CPU seconds of a call of `work`."""
    began, cpu_began = time.perf_counter(), time.process_time()
    for _ in range(calls):
        work()
    return (time.perf_counter() - began) / calls, (time.process_time() - cpu_began) / calls


def measure_machine(ranks: Ranks) -> Result:
    """Bytes that a rank copies and exchanges in a second; the latency of an exchange."""
    source, target = torch.ones(2, COPIED // 4).unbind()
    copy_s, _ = time_calls(lambda: target.copy_(source), 5)
    rates = {"copied_gb_per_s": 2e-9 * COPIED / copy_s}
    if ranks.world > 1:
        small, large = torch.ones(2), torch.ones(LARGE // 4)
        dist.all_reduce(large)
        latency_s, _ = time_calls(lambda: dist.all_reduce(small), CALLS)
        seconds, _ = time_calls(lambda: dist.all_reduce(large), CALLS // 4)
        wire = 2 * LARGE * (ranks.world - 1) / ranks.world
        rates |= {"latency_ms": 1e3 * latency_s, "exchanged_gb_per_s": 1e-9 * wire / seconds}
    return rates


def choose_shape(modalities: int, cells: int, quick: bool) -> Shape:
    """RNA, ATAC and as many small modalities as are missing."""
    sizes = (400, 900) if quick else (20_000, 100_000)
    entries = (100, 200) if quick else (1_500, 3_500)
    few = Shape("", cells, *sizes, genes_per_cell=entries[0], peaks_per_cell=entries[1])
    return replace(few, n_panels=modalities - len(sizes))


def count_stage(trainer: Trainer, batches: Iterator[Batch]) -> Result:
    """Bytes of everything that this rank holds, of one step; what another step exchanges."""
    engine = trainer.engine
    watch, saved = counting.GradientWatch(engine), counting.SavedTensors(engine.module)
    with saved:
        loss, _ = trainer.compute_loss(next(batches), 0, 0)
    engine.backward(loss)
    watch.close()
    fill_missing_gradients(engine)
    kept = counting.count_gradients(engine)
    engine.step()
    exchanged, flops = counting.CollectiveCounter(), FlopCounterMode(display=False)
    with flops, count_work() as touched, exchanged:
        train_step(trainer, batches, 1)
    return {
        "parameters": counting.count_parameters(engine.module),
        "optimizer": counting.count_optimizer(engine),
        "gradients_most": max(watch.most, kept),
        "gradients_kept": kept,
        "bucket": watch.bucket,
        "buffers": counting.count_buffers(engine.module),
        "activations": saved.size,
        "calls": dict(exchanged.calls),
        "exchanged": dict(exchanged.sizes),
        "gflop": 1e-9 * flops.get_total_flops(),
        "operators": touched.launches,
        "touched_gb": 1e-9 * touched.bytes_touched,
    }


def measure_stage(args: argparse.Namespace, stage: int, ranks: Ranks) -> Result:
    """Count and time one stage; means over the ranks, whose shards are of different parts."""
    shape = choose_shape(args.modalities, args.cells, args.quick)
    model = resolve_auto_settings(Config(), args.cells, args.modalities).model
    cpu = torch.device("cpu")
    trainer = make_trainer(shape, cpu, args.precision, model, stage, ranks)
    # It lies in memory: what the loader takes is another benchmark's.
    batches, steps = itertools.repeat(make_batch(shape, ranks.rank)), itertools.count(2)
    result = count_stage(trainer, batches)
    if args.steps:
        for _ in range(WARM_UP_STEPS):
            train_step(trainer, batches, next(steps))
        ranks.barrier()
        wall_s, cpu_s = time_calls(lambda: train_step(trainer, batches, next(steps)), args.steps)
        result |= {"step_ms": 1e3 * wall_s, "step_cpu_ms": 1e3 * cpu_s}
    trainer.engine.destroy()
    return average_values(ranks.gather_values(result))


def average_values(results: Sequence[Result]) -> Result:
    """The mean of numbers at every place of results that are alike."""
    return {
        name: average_values([result[name] for result in results])
        if isinstance(value, dict)
        else statistics.fmean(result[name] for result in results)
        for name, value in results[0].items()
    }


def main() -> None:
    """Measure every stage that the command line asks for."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--modalities", type=int, required=True)
    parser.add_argument("--precision", required=True)
    parser.add_argument("--stages", type=int, nargs="+", required=True)
    parser.add_argument("--cells", type=int, required=True, help="of each rank in a step")
    parser.add_argument("--steps", type=int, required=True, help="that are timed")
    parser.add_argument("--quick", action="store_true", help="few features")
    args = parser.parse_args()
    ranks = Ranks.from_environment()
    choose_core(ranks)
    keep_freed_memory()  # as the loader of a training does
    join_process_group(ranks)
    stages = {str(stage): measure_stage(args, stage, ranks) for stage in args.stages}
    result: Result = {"ranks": ranks.world, "cells": args.cells, "stages": stages}
    if args.steps:
        result["machine"] = measure_machine(ranks)
    if ranks.is_first:
        measure.print_result(result)
    ranks.leave_group()


if __name__ == "__main__":
    main()
