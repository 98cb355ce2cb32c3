"""Do scores and a trained model's calls stay within a minute and a few gigabytes on many cells?

.venv/bin/python -m tests.benchmarks.scale --json OUT.json [--quick] [--methods exact] [--cells N]
"""

import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import ClassVar

from clue_dist.api import fit
from tests.benchmarks import cells, stores
from tests.benchmarks.cells import Shape
from tests.benchmarks.commands import read_last_json, run_command
from tests.benchmarks.kept import compute_digest, make_once
from tests.benchmarks.report import Result, find_median
from tests.benchmarks.runner import Benchmark, Case, Option, Run
from tests.benchmarks.scale import profiles
from tests.benchmarks.scale.probe import CALLS, SCORES
from tests.benchmarks.stores import MIB_OF_GB
from tests.distributed.command import ROOT

FEATURES = {"rna": (500, 60), "adt": (20, 15)}  # and non-zeros a cell
LANE, QUICK_LANE = 100_000, 2_000  # cells of the files that the store is made of
TRAINING = {"train.epochs": 0.2, "train.validate_every": 1_000_000}
STORE = "cells.zarr"


class Scale(Benchmark):
    """Exact and estimated scores, and calls on a store, each in a process of its own."""

    name, work, limits_cores = "scale", "scale", True
    columns = (
        "seconds", "cpu_s", "rss_mib", "anon_mib", "foscttm", "foscttm_error", "recall10",
        "recall10_error", "match", "mixing",
    )  # fmt: skip
    options: ClassVar = {
        "methods": Option([*SCORES, *CALLS], [*SCORES, *CALLS], choices=[*SCORES, *CALLS]),
        "pairs": Option(100_000, 2_000, "cells whose scores are exact"),
        "estimated": Option([100_000, 1_000_000, 10_000_000], [2_000, 8_000]),
        "cells": Option(1_000_000, 8_000, "cells of the store"),
    }

    def list_cases(self) -> Iterator[Case]:
        args = self.args
        sizes = {"exact": [args.pairs], "approximate": args.estimated}
        for method in args.methods:
            for size in sizes.get(method, [args.cells]):
                yield method, str(size), 0, 0

    def list_inputs(self, method: str, data_set: str) -> list[Path | str]:
        code = [Path(__file__).parent, str(self.args.threads)]
        if method in SCORES:
            names = ("matching", "matching_estimate", "integration", "partner_ranks", "neighbours")
            tiles = ("distance_tiles", "distance_kernels")
            return [*code, *(ROOT / f"clue_dist/{name}.py" for name in (*names, *tiles))]
        shapes = map(cells.digest_shape, self.list_shapes())
        return [*code, *shapes, ROOT / "clue_dist", ROOT / "data_prep"]

    def list_shapes(self) -> list[Shape]:
        lane = QUICK_LANE if self.args.quick else LANE
        return [Shape(name, lane, n, nonzeros, False) for name, (n, nonzeros) in FEATURES.items()]

    def measure(self, run: Run, folder: Path) -> Result:
        words = [sys.executable, "-m", "tests.benchmarks.scale.probe", run.method]
        if run.method in SCORES:
            profiles.find_profiles(int(run.data_set), self.args.work)  # not among what is measured
            words += ["--cells", run.data_set, "--work", str(self.args.work)]
        else:
            made = self.prepare_cells(int(run.data_set))
            words += ["--run", str(made / "run"), "--store", str(made / STORE)]
            words += ["--reference", str(made / "reference.zarr"), "--out", str(folder)]
        run_command(words, folder / "log.txt", self.args.threads)
        return read_last_json(folder / "log.txt")

    def prepare_cells(self, n_cells: int) -> Path:
        """A store of many cells, one of a lane alone, and a model that was trained on the latter.

        How well it was trained changes no time and no memory.
        """

        def make(folder: Path) -> None:
            for name, size in ((STORE, n_cells), ("reference.zarr", self.list_shapes()[0].cells)):
                command = self.list_conversion(size, folder / name)
                run_command(command, folder / "log.txt", self.args.threads)
            fit(str(folder / "reference.zarr"), folder / "run", settings=TRAINING)

        shapes = compute_digest(*map(cells.digest_shape, self.list_shapes()), Path(__file__))
        return make_once(self.args.work / "stores" / f"{n_cells}-{shapes[:8]}", make)

    def list_conversion(self, n_cells: int, out: Path) -> list[str | Path]:
        """Convert so many cells, all of them with both modalities: the files over and over."""
        shapes = self.list_shapes()
        lanes, rest = divmod(n_cells, shapes[0].cells)
        if rest or not lanes:
            raise ValueError(f"{n_cells} cells are no multiple of {shapes[0].cells}")
        files = {shape.name: cells.find_file(shape, self.args.work) for shape in shapes}
        inputs = [
            f"lane{i:03d}:{name}={file}" for i in range(lanes) for name, file in files.items()
        ]
        return stores.list_conversion(inputs, out, str(self.args.threads))

    def judge(self, records: Sequence[Result]) -> Iterator[Result]:
        """Time and memory of all; and how far the estimate is from the exact FOSCTTM."""
        pairs, bars = str(self.args.pairs), self.bars
        exact = {"method": "exact", "data_set": pairs}
        yield bars["seconds"].judge(find_median(records, "seconds", **exact))
        yield bars["gigabyte"].judge(find_median(records, "rss_mib", **exact) / MIB_OF_GB)
        estimate = {"method": "approximate", "data_set": pairs}
        off = find_median(records, "foscttm", **exact) - find_median(records, "foscttm", **estimate)
        error = find_median(records, "foscttm_error", **estimate)
        yield bars["errors"].judge(abs(off) / error)
        for method in CALLS:
            memory = find_median(records, "rss_mib", method=method, data_set=str(self.args.cells))
            yield bars["call"].fill_name(method).judge(memory / MIB_OF_GB)


if __name__ == "__main__":
    Scale.main()
