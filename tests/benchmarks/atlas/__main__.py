"""Is anything slower, or larger in memory, with ten million cells than with one?

.venv/bin/python -m tests.benchmarks.atlas --json OUT.json [--quick] [--cells 1000000 3000000]
                                       [--methods convert train]
"""

import shutil
import sys
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import product
from pathlib import Path
from typing import ClassVar

import numpy as np

from tests.benchmarks import cells, stores
from tests.benchmarks.atlas.enlarge import enlarge_store
from tests.benchmarks.cells import Shape
from tests.benchmarks.command_cost import read_children_cpu, read_training
from tests.benchmarks.commands import read_last_json, run_command
from tests.benchmarks.report import Result, find_median
from tests.benchmarks.runner import Case, Option, Run
from tests.benchmarks.stores import MIB_OF_GB, StoreBenchmark
from tests.distributed.command import FAST, ROOT, launched

SIZES, QUICK_SIZES = [1_000_000, 3_000_000, 10_000_000], [40_000, 120_000]
LANE, QUICK_LANE = 500_000, 20_000  # cells of the files that all sizes are made of
FEATURES = {"rna": (2_000, 150), "adt": (20, 15)}  # and non-zeros a cell
METHODS = ("convert", "check", "stream", "train")
STORE, RUN = "atlas.zarr", "run"
BATCH, STEPS, QUICK_STEPS = 512, 200, 20  # of training
SHORT = ("open_ms", "step_ms", "far_step_ms", "first_ms", "far_first_ms")  # that is timed
ABSOLUTE = ("open_ms", "step_ms", "far_step_ms", "far_first_ms", "manifest_ms")


class Atlas(StoreBenchmark):
    """Stores of several sizes, converted, checked, streamed and trained on in turns."""

    name = "atlas"
    options: ClassVar = {
        "methods": Option(list(METHODS), list(METHODS), choices=METHODS),
        "cells": Option(SIZES, QUICK_SIZES),
        "repeats": Option(3, 1),
    }

    def list_cases(self) -> list[Case]:
        turns = product(self.args.methods, range(self.args.repeats), sorted(self.args.cells))
        return [(method, str(size), number, 0) for method, number, size in turns]

    def list_inputs(self, method: str, data_set: str) -> list[Path | str]:
        shapes = map(cells.digest_shape, self.list_shapes())
        how = f"{self.args.threads} {self.args.quick}"
        code = [*stores.SOURCES, Path(__file__).parent]
        if method == "train":
            # Its store is that of the same sources.
            code += [ROOT / "clue_dist", ROOT / "configs/atlas.json"]
        return [*shapes, *code, how]

    def list_extras(self) -> Result:
        return {}

    def list_shapes(self) -> list[Shape]:
        lane = QUICK_LANE if self.args.quick else LANE
        return [Shape(name, lane, n, nonzeros, False) for name, (n, nonzeros) in FEATURES.items()]

    def list_conversion(self, size: int, out: Path) -> list[str | Path]:
        """Convert `size` cells: the files over and over, every second time without proteins."""
        shapes = self.list_shapes()
        lanes, rest = divmod(size, shapes[0].cells)
        if rest or not lanes:
            raise ValueError(f"{size} cells are no multiple of {shapes[0].cells}")
        files = {shape.name: cells.find_file(shape, self.args.work) for shape in shapes}
        named = [(i, name) for i in range(lanes) for name in files if name == "rna" or i % 2]
        inputs = [f"lane{i:03d}:{name}={files[name]}" for i, name in named]
        return stores.list_conversion(inputs, out, str(self.args.threads))

    def measure(self, run: Run, folder: Path) -> Result:
        """Convert, check, read or train; the first store that is converted is kept for the others.

        `cells_per_s` of training is of its steps alone.
        """
        size, log, threads = int(run.data_set), folder / "log.txt", self.args.threads
        kept = self.find_store(run.data_set)
        if run.method in ("check", "stream") and not kept.exists():
            self.obtain(self.name_conversion(run.data_set))
        if run.method == "stream":
            seconds = ("--seconds", "1", "--warm", "0.5") if self.args.quick else ()
            probe = [sys.executable, "-m", "tests.benchmarks.atlas.probe", kept, *seconds]
            run_command(probe, log, threads)
            return read_last_json(log)
        words: list[str | Path] = [sys.executable, "-m", "data_prep", "check", kept]
        if run.method == "convert":
            words = self.list_conversion(size, folder / STORE)
        if run.method == "train":
            if not kept.exists():  # no conversion of so many cells was asked for
                smallest = str(min(self.args.cells))
                self.obtain(self.name_conversion(smallest))
                kept = folder / STORE
                enlarge_store(self.find_store(smallest), size, kept)
            words = self.list_training(size, kept, folder / RUN)
        before = read_children_cpu()
        with stores.watch_children() as peak:
            took = run_command(words, log, threads)
        cpu = read_children_cpu() - before
        if run.method == "convert" and run.fold:
            shutil.rmtree(folder / STORE)
        found = {"seconds": took, "cpu_s": cpu, "anon_mib": peak[0], "cells_per_s": size / took}
        return found | (read_training(folder / RUN) if run.method == "train" else {})

    def find_store(self, data_set: str) -> Path:
        """Find the store of a size, the first that was converted."""
        return self.name_conversion(data_set).folder(self.args.work) / STORE

    def name_conversion(self, data_set: str) -> Run:
        """Name the run that converts so many cells for the first time."""
        return Run("convert", data_set, 0, 0, self.digest("convert", data_set))

    def list_training(self, size: int, store: Path, run: Path) -> list[str | Path]:
        """Train for as many steps on any number of cells, on batches of one size."""
        steps = QUICK_STEPS if self.args.quick else STEPS
        batches = [f"data.batch_size={BATCH}", f"train.epochs={steps * BATCH / size}"]
        words = [*FAST, *batches, f"store={store}", f"run={run}"]
        return [*launched(1, "launch/train.py", "--config", "configs/atlas.json", "--set", *words)]

    def judge(self, records: Sequence[Result]) -> Iterator[Result]:
        """Judge the worst of all larger sizes against the smallest, and what size must not change.

        Where every repeat has been measured.
        """
        small, *larger = map(str, sorted(self.args.cells))
        median = partial(find_median, records, least=self.args.repeats)

        def compare(method: str, path: str, worst: Callable[[list[float]], float]) -> float:
            sizes = (median(path, method=method, data_set=size) for size in (small, *larger))
            first, *others = sizes
            return float(worst([other / first for other in others] or [np.nan]))

        sizes = " and ".join(f"{int(size):,}" for size in larger), f"{int(small):,}"
        for method in METHODS:
            for bar, path, worst in (
                ("speed", "cells_per_s", np.min),
                ("memory", "anon_mib", np.max),
            ):
                found = compare(method, path, worst)
                yield self.bars[bar].fill_name(method, *sizes).judge(found)
        for path in SHORT:
            name = path.removesuffix("_ms").replace("_", " ")
            found = compare("stream", path, np.max)
            yield self.bars["time"].fill_name(name, *sizes).judge(found)
        largest = (larger or [small])[-1]
        most = median("anon_mib", method="convert", data_set=largest)
        yield self.bars["gigabyte"].judge(most / MIB_OF_GB)
        for path in ABSOLUTE:
            yield self.bars[path].judge(median(path, method="stream", data_set=largest))


if __name__ == "__main__":
    Atlas.main()
