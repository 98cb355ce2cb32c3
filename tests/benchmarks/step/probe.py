"""Our steps and our encoding, in a process of its own: python -m tests.benchmarks.step.probe STORE.

It prints CPU seconds, of all threads of the process, so that the loader's work counts, too.
"""

import argparse
import itertools
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch.profiler import ProfilerActivity, profile

from clue_dist.config_file import load_config
from clue_dist.data.assembly import read_batch
from clue_dist.data.batch import Batch
from clue_dist.ranks import Ranks
from clue_dist.train.engine import build_engine, join_process_group
from clue_dist.train.setup import prepare_setup
from clue_dist.train.step import train_step
from clue_dist.train.trainer import Trainer
from tests.benchmarks.gpu.counting import count_work
from tests.benchmarks.peers import measure

WARM_UP_STEPS, PROFILED_STEPS = 4, 5
# What the time of a step goes into; what is not listed is the rest.
KINDS_OF_WORK = {
    "products": "mm bmm addmm baddbmm _embedding_bag_forward_only",
    "functions": "exp exp_ log log_ log1p lgamma digamma gelu gelu_backward softplus sigmoid "
    "softplus_backward log_sigmoid_forward log_sigmoid_backward",
    "norms": "native_layer_norm native_layer_norm_backward linalg_vector_norm",
    "draws": "random_ normal_ uniform_ randperm",
    "optimizer": "_fused_adamw_",
}
MATRIX, COPIED_BYTES = 1024, 2**28  # of what the machine's own rates are measured on


def time_calls(work: Callable[[], None], seconds: float) -> tuple[float, float]:
    """CPU seconds and seconds of a call of `work`, repeated for about so long."""
    work()
    calls, began, cpu_began = 0, time.perf_counter(), time.process_time()
    while not calls or time.process_time() - cpu_began < seconds:
        work()
        calls += 1
    return (
        (time.process_time() - cpu_began) / calls,
        (time.perf_counter() - began) / calls,
    )


def measure_training(trainer: Trainer, seconds: float) -> dict[str, float]:
    """Whole steps, batches from the loader."""
    steps, cells = itertools.count(), trainer.setup.plan.batch_size
    with trainer.open_loader(0) as loader:
        for _ in range(WARM_UP_STEPS):
            train_step(trainer, loader, next(steps))
        cpu, wall = time_calls(lambda: void(train_step(trainer, loader, next(steps))), seconds)
    return {"train": cells / cpu, "train_wall": cells / wall, "step_ms": 1e3 * cpu}


def measure_encoding(trainer: Trainer, encoded: int, seconds: float) -> dict[str, float]:
    """Cells of one modality, embedded as they are read from the store, and out of memory."""
    model, store = trainer.model.eval(), trainer.setup.store
    # As a trained model has one; the values do not change the speed.
    for buffer in model.space.buffers():
        buffer.uniform_(0.5, 1)
    rates = {}
    for number, name in enumerate(store.modalities):
        positions = np.arange(min(encoded, store.segments[name].n_cells))
        batch = read_batch(store, name, positions)

        def embed_stored(name: str = name, positions: np.ndarray = positions) -> None:
            model.embed_batch(read_batch(store, name, positions), per_modality=False)

        def embed_batch(batch: Batch = batch) -> None:
            model.embed_batch(batch, per_modality=False)

        with torch.inference_mode():
            for key, work in (("encode", embed_stored), ("ready", embed_batch)):
                rates[f"{key}_{number}"] = len(positions) / time_calls(work, seconds)[0]
    return rates


def measure_machine(seconds: float) -> dict[str, float]:
    """Rate of a matrix product, and of copying memory, by one thread."""
    a, b = torch.randn(2, MATRIX, MATRIX).unbind()
    source, target = torch.ones(2, COPIED_BYTES // 4).unbind()
    product, _ = time_calls(lambda: void(torch.mm(a, b)), seconds)
    copy, _ = time_calls(lambda: void(target.copy_(source)), seconds)
    return {"gflops": 2e-9 * MATRIX**3 / product, "copied_gb_per_s": 2e-9 * COPIED_BYTES / copy}


def measure_parts(trainer: Trainer) -> dict[str, float]:
    """Shares of a step's CPU time by kind of operation; operations and bytes of one step."""
    steps = itertools.count()
    with trainer.open_loader(0) as loader:
        for _ in range(WARM_UP_STEPS):
            train_step(trainer, loader, next(steps))
        with profile(activities=[ProfilerActivity.CPU]) as profiler:
            for _ in range(PROFILED_STEPS):
                train_step(trainer, loader, next(steps))
        with count_work() as counts:
            train_step(trainer, loader, next(steps))
    spent = {event.key: event.self_cpu_time_total for event in profiler.key_averages()}
    shares = {
        f"share_{kind}": sum(spent.get(f"aten::{name}", 0.0) for name in names.split())
        for kind, names in KINDS_OF_WORK.items()
    }
    shares = {kind: share / sum(spent.values()) for kind, share in shares.items()}
    return shares | {"operations": counts.launches, "gb_touched": 1e-9 * counts.bytes_touched}


def open_trainer(store: Path, batch: int) -> Trainer:
    """Open what trains `atlas.json` on a store, one thread, with weights drawn at random."""
    torch.set_num_threads(1)
    settings = [f"store={store}", f"run={store.parent / 'run'}", "log.wandb=disabled"]
    # The values of weights do not change the speed.
    settings += [f"data.batch_size={batch}", "model.trunk.projection_init=random"]
    setup = prepare_setup(load_config("configs/atlas.json", settings), 1, writes=False)
    ranks = Ranks.from_environment()
    device = join_process_group(ranks)
    return Trainer(build_engine(setup, ranks, device), setup, ranks, device)


def void(_: object) -> None:
    """Forget a result."""


def main() -> None:
    """Measure what the words of the command line ask for, and print it as JSON."""
    parser = argparse.ArgumentParser()
    parser.add_argument("store", type=Path)
    parser.add_argument("--batch", type=int, required=True)
    parser.add_argument("--encoded", type=int, required=True, help="cells at a time")
    parser.add_argument("--seconds", type=float, required=True, help="of each measurement")
    args = parser.parse_args()
    trainer = open_trainer(args.store, args.batch)
    result = measure_training(trainer, args.seconds)
    result |= measure_encoding(trainer, args.encoded, args.seconds)
    result |= measure_parts(trainer)
    result["peak_mib"] = measure.read_peak()
    measure.print_result(result | measure_machine(args.seconds / 5))


if __name__ == "__main__":
    main()
