"""What does each rank hold under ZeRO, what do ranks exchange, and do two train twice as fast?

.venv/bin/python -m tests.benchmarks.sharding --json OUT.json [--quick] [--steps 0]

DeepSpeed's engine as training builds it, by gloo on CPUs; batches lie in memory.
"""

import os
from collections.abc import Iterable, Iterator, Sequence
from itertools import product
from pathlib import Path
from typing import ClassVar

from tests.benchmarks.commands import read_last_json, run_command
from tests.benchmarks.report import Result
from tests.benchmarks.runner import Benchmark, Case, Option, Run
from tests.benchmarks.sharding import predictions
from tests.distributed.command import ROOT, spawned


class Sharding(Benchmark):
    """Ranks of one core each; every number of ranks is one run, with all stages in it."""

    name = work = "sharding"
    counted = "repeat"
    packages = ("deepspeed",)
    options: ClassVar = {
        "modalities": Option([2, 8], [2]),
        "ranks": Option([1, 2, 4], [1, 2]),
        "stages": Option([0, 1, 2, 3], [1, 3], choices=[0, 1, 2, 3]),
        "precisions": Option(["fp32", "bf16"], ["fp32"], choices=["fp32", "bf16"]),
        "cells": Option(512, 32, "of each rank in a step"),
        "steps": Option(5, 1, "that are timed; 0: bytes alone"),
        "repeats": Option(3, 1, "of the fewest modalities in fp32"),
    }

    def list_cases(self) -> Iterator[Case]:
        """Every size once; then the one whose steps are timed, the numbers of ranks in turns."""
        args = self.args
        for precision, k, ranks in product(args.precisions, args.modalities, args.ranks):
            yield f"{precision}-{ranks}", f"K={k}", 0, 0
        for repeat, ranks in product(range(1, args.repeats), args.ranks):
            yield f"fp32-{ranks}", f"K={min(args.modalities)}", repeat, 0

    def list_inputs(self, method: str, data_set: str) -> Iterable[Path | str]:
        args = self.args
        code = (ROOT / f"clue_dist/{name}" for name in ("model", "train", "losses/objective.py"))
        return *code, Path(__file__).parent, repr((args.stages, args.cells, args.steps, args.quick))

    def measure(self, run: Run, folder: Path) -> Result:
        args, (precision, ranks) = self.args, run.method.split("-")
        # A single rank of fp32 shards nothing, whatever the stage.
        stages = [0] if run.method == "fp32-1" else args.stages
        words = ["--modalities", run.data_set.removeprefix("K="), "--precision", precision]
        words += ["--stages", *map(str, stages), "--cells", str(args.cells)]
        words += ["--steps", str(args.steps), *["--quick"] * args.quick]
        command = spawned(int(ranks), "-m", "tests.benchmarks.sharding.probe", *words)
        run_command(command, folder / "log.txt", threads=1)
        return read_last_json(folder / "log.txt")

    def describe(self, record: Result) -> str:
        stages = record["stages"].items()
        held = ((name, predictions.count_held(int(name), c)) for name, c in stages)
        sizes = (f"ZeRO-{name} {size / 1e6:.0f} MB" for name, size in held)
        return ", ".join(sizes)

    def tabulate(self, records: Sequence[Result]) -> str:
        tables = {"MB of a rank": predictions.tabulate_bytes(records)} if records else {}
        steps = predictions.select_steps(records)
        if 1 in steps:
            cores = len(os.sched_getaffinity(0))
            if self.args.steps:
                tables["a step here"] = predictions.tabulate_steps(steps, cores)
            tables["MODEL, not measured: GPUs"] = predictions.tabulate_gpus(steps)
        return "\n\n".join(f"{title}\n{table}" for title, table in tables.items())

    def judge(self, records: Sequence[Result]) -> Iterator[Result]:
        """Weak scaling: cells per second of two ranks over those of two times one."""
        steps = predictions.select_steps(records)
        runs = [steps.get(ranks, []) for ranks in (1, 2)]
        known = self.args.steps and all(len(r) == self.args.repeats for r in runs)
        for clock, bar in self.bars.items():
            times = [predictions.measure_step(r, 1, clock) for r in runs] if known else []
            yield bar.judge(times[0] / times[1] if times else None)


if __name__ == "__main__":
    Sharding.main()
