"""Do half a million multiome cells go from files to scores with every process under 4 GB?

.venv/bin/python -m tests.benchmarks.multiome --json OUT.json [--quick] [--cells N] [--steps N]
"""

import json
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

from tests.benchmarks.command_cost import (
    read_children_cpu,
    read_largest_process,
    read_training,
)
from tests.benchmarks.commands import read_last_json, run_command
from tests.benchmarks.multiome import simulate
from tests.benchmarks.multiome.simulate import HELD_OUT, TEST, TRAIN, Lane
from tests.benchmarks.peers.measure import watch_peak
from tests.benchmarks.report import Result, find_median
from tests.benchmarks.runner import Benchmark, Case, Option, Run
from tests.benchmarks.stores import MIB_OF_GB, count_bytes
from tests.distributed.command import ROOT, launched

BATCH = 512  # cells of a step
SOURCES = 4  # pairs of files that training lanes are made of
STAGES = ("simulate", "convert", "split", "train", "evaluate", "embed", "estimate")
STORE, PART, RUN, EMBEDDING, SCORES = "cells.zarr", "{}.zarr", "run", "z.zarr", "scores.json"
SETTINGS = ("log.wandb=disabled", "log.tensorboard=false", "train.keep=1")
PAIR = "rna->atac"
Command = list[str | Path]


class Multiome(Benchmark):
    """One stage after another, each by the command that a person types."""

    name, work = "multiome", "multiome"
    columns = (
        "wall_s", "cpu_s", "rss_mib", "disk_gb", "cells_per_s", "foscttm", "recall10", "match",
        "mixing", "label_accuracy", "foscttm_error",
    )  # fmt: skip
    options: ClassVar = {
        "cells": Option(500_000, 4_000, "of all lanes"),
        "lane": Option(10_000, 1_000, "cells of a lane; those of the last one are for tests"),
        "workers": Option(2, 2, "threads of the conversion"),
        "steps": Option(200, 20, f"of training, of {BATCH} cells each"),
    }

    def list_cases(self) -> list[Case]:
        return [(stage, str(self.args.cells), 0, 0) for stage in STAGES]

    def list_inputs(self, method: str, data_set: str) -> list[Path | str]:
        """List the same of every stage: each goes on from what the one before left."""
        code = [ROOT / name for name in ("clue_dist", "data_prep", "configs/atlas.json")]
        shared = Path(__file__).parents[1] / "cells.py"
        args = self.args
        how = f"{args.lane} {args.steps} {args.threads} {args.workers}"
        return [*code, Path(__file__).parent, shared, how]

    def plan_lanes(self) -> list[Lane]:
        return simulate.plan_lanes(self.args.cells, self.args.lane, SOURCES)

    def find_folder(self, stage: str, run: Run) -> Path:
        """Find what another stage of a run left."""
        return Run(stage, run.data_set, run.fold, run.seed, run.digest).folder(self.args.work)

    def measure(self, run: Run, folder: Path) -> Result:
        """Run the command of a stage, and remove what no later one needs."""
        before = read_children_cpu()
        words = self.list_command(run.method, partial(self.find_folder, run=run))
        # To look is dear among many processes, and a process keeps its peak until it ends.
        with watch_peak(read_largest_process, every_s=1) as peak:
            seconds = run_command(words, folder / "log.txt", self.args.threads)
        cpu = read_children_cpu() - before
        found = self.read_results(run.method, folder)
        if run.method == "convert":
            for file in self.find_folder("simulate", run).glob("*.h5ad"):
                file.unlink()
        disk = {"disk_gb": count_bytes(folder) / 1e9}
        return {"seconds": seconds, "cpu_s": cpu, "rss_mib": peak[0], **disk, **found}

    def list_command(self, stage: str, find: Callable[[str], Path]) -> Command:
        """List the words of a stage's command; `find` knows the folder of each stage."""
        folder, run = find(stage), find("train") / RUN
        whole, test = find("convert") / STORE, find("split") / PART.format(TEST)
        data_prep: Command = [sys.executable, "-m", "data_prep", stage]
        module = f"{__package__}.{stage}"
        if stage == "simulate":
            sizes = ["--cells", str(self.args.cells), "--lane-cells", str(self.args.lane)]
            return [sys.executable, "-m", module, folder, *sizes, "--sources", str(SOURCES)]
        if stage == "convert":
            inputs = list_inputs_of_lanes(self.plan_lanes(), find("simulate"))
            keys = ["--batch-key", "donor", "--label-key", "cell_type", "--keep-obs", HELD_OUT]
            return [*data_prep, *inputs, "--out", whole, *keys, "--workers", str(self.args.workers)]
        if stage == "split":
            outs: Command = []
            for part in (TRAIN, TEST):
                outs += [f"--out-{part}", folder / PART.format(part)]
            return [*data_prep, whole, "--by", HELD_OUT, "--test", TEST, *outs]
        if stage == "train":
            store = find("split") / PART.format(TRAIN)
            words = [f"store={store}", f"run={run}", *SETTINGS, *self.list_settings()]
            recipe = ["launch/train.py", "--config", "configs/atlas.json", "--set", *words]
            return list(launched(1, *recipe))
        model: Command = [sys.executable, f"launch/{stage}.py", "--run", run]
        if stage == "embed":
            return [*model, "--store", whole, "--per-modality", "--out", folder / EMBEDDING]
        if stage == "evaluate":
            return [*model, "--store", test, "--out", folder / SCORES]
        return [sys.executable, "-m", module, find("embed") / EMBEDDING]

    def list_settings(self) -> list[str]:
        """List settings of training that follow from the number of steps."""
        lanes, steps = self.plan_lanes(), self.args.steps
        n_train = sum(not lane.is_test for lane in lanes) * self.args.lane
        every = max(1, steps // 4)
        return [
            f"data.batch_size={BATCH}",
            f"train.epochs={steps * BATCH / n_train}",
            f"train.validate_every={every}",
            f"train.checkpoint_every={2 * every}",
        ]

    def read_results(self, stage: str, folder: Path) -> Result:
        """Read what a stage found out, beside what it took."""
        if stage == "train":
            return read_training(folder / RUN)
        if stage == "evaluate":
            return read_scores(json.loads((folder / SCORES).read_text()))
        return read_last_json(folder / "log.txt") if stage == "estimate" else {}

    def judge(self, records: Sequence[Result]) -> Iterator[Result]:
        for stage in STAGES:
            most = find_median(records, "rss_mib", method=stage)
            yield self.bars["gigabytes"].fill_name(stage, self.args.cells).judge(most / MIB_OF_GB)


def list_inputs_of_lanes(lanes: Sequence[Lane], folder: Path) -> list[str]:
    """List the files of all lanes as `data_prep convert` takes them."""
    return [
        f"{lane.name}:{modality}={lane.find_file(folder, modality)}"
        for lane in lanes
        for modality in simulate.FEATURES
    ]


def read_scores(scores: Mapping[str, Any]) -> Result:
    """Read the scores of the test cells."""
    pair, joint = scores[PAIR], scores["joint"]
    found = {name: pair["global"][name] for name in ("foscttm", "recall10", "match")}
    accuracy = {"label_accuracy": joint["accuracy"]} if "accuracy" in joint else {}
    return {"scored_cells": pair["cells"], **found, "mixing": pair["mixing"], **accuracy}


if __name__ == "__main__":
    Multiome.main()
