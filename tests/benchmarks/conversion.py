"""How fast, in what memory and to what size are cells converted from .h5ad, next to annbatch?

.venv/bin/python -m tests.benchmarks.conversion --json OUT.json [--quick]
"""

import shutil
from collections.abc import Iterator, Sequence
from itertools import product
from pathlib import Path

import numpy as np

from tests.benchmarks import cells, stores
from tests.benchmarks.cells import SHAPES
from tests.benchmarks.commands import run_command
from tests.benchmarks.report import Result, find_median
from tests.benchmarks.runner import Case, Run
from tests.benchmarks.stores import METHODS, MIB_OF_GB, StoreBenchmark


class Conversion(StoreBenchmark):
    """Conversion by us and by annbatch in turns, each in a process of its own."""

    name = "conversion"

    def list_cases(self) -> list[Case]:
        turns = product(self.args.sets, range(self.args.repeats), METHODS)
        return [(f"convert-{method}", name, number, 0) for name, number, method in turns]

    def list_inputs(self, method: str, data_set: str) -> list[Path | str]:
        digest = cells.digest_shape(self.choose_shape(data_set))
        return [digest, *stores.SOURCES, Path(__file__), str(self.args.threads)]

    def measure(self, run: Run, folder: Path) -> Result:
        """Convert once; what was written is looked at and removed."""
        method, shape = run.method.removeprefix("convert-"), self.choose_shape(run.data_set)
        command = self.list_command(method, shape, folder)
        with stores.watch_children() as peak:
            seconds = run_command(command, folder / "log.txt", self.args.threads)
        out, h5ad = folder / f"{method}.zarr", cells.find_file(shape, self.args.work)
        size = stores.count_bytes(out) / cells.count_nonzeros(h5ad)
        shutil.rmtree(out)
        anon, rss = peak
        rates = {"seconds": seconds, "cells_per_s": shape.cells / seconds}
        return rates | {"bytes_per_nonzero": size, "anon_mib": anon, "rss_mib": rss}

    def tabulate(self, records: Sequence[Result]) -> str:
        paths = ("cells_per_s", "anon_mib", "rss_mib", "bytes_per_nonzero")
        ratios: list[Result] = []
        for name in self.args.sets:
            ratio = {path: compare(records, name, path, least=1) for path in paths}
            ratios.append({"data_set": name, "method": "ratio"} | ratio)
        return super().tabulate([*records, *ratios])

    def judge(self, records: Sequence[Result]) -> Iterator[Result]:
        least = self.args.repeats
        for name in SHAPES:
            speed = compare(records, name, "cells_per_s", least)
            yield self.bars["speed"].fill_name(name).judge(speed)
        where = {"path": "anon_mib", "least": least, "method": "convert-ours"}
        peaks = [find_median(records, data_set=name, **where) for name in SHAPES]
        yield self.bars["memory"].judge(float(np.max(peaks)) / MIB_OF_GB)


def compare(records: Sequence[Result], name: str, path: str, least: int) -> float:
    ours, theirs = (
        find_median(records, path, least, method=f"convert-{method}", data_set=name)
        for method in METHODS
    )
    return ours / theirs


if __name__ == "__main__":
    Conversion.main()
