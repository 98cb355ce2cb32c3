"""How fast does the loader serve shuffled batches, next to annbatch and to what the machine can do?

.venv/bin/python -m tests.benchmarks.streaming --json OUT.json [--quick]
"""

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import ClassVar

import pytest

from tests.benchmarks import cells, stores
from tests.benchmarks.commands import read_last_json, run_command
from tests.benchmarks.report import Result, find_median
from tests.benchmarks.runner import Case, Option, Run
from tests.benchmarks.stores import METHODS, StoreBenchmark
from tests.s3 import serve

BATCH = 512
STEP_MS = 2.0
# Cells annbatch reads in a row, with as many chunks as fill the window; and its default.
CHUNKS, DEFAULT = (64, 128, 256, 512, 1024), (512, 32)
QUICK_SETTING = (512, 4)

# What is measured in turns with annbatch, and what of ours alone.
PAIRED = {"rna": ("csr", "dense", "step"), "atac": ("csr", "step")}
ALONE = {"rna": ("windows", "s3"), "atac": ("large", "windows", "s3")}
LIMITS = ("decode", "memcpy", "memset")
COPIES = 8  # of the cells that are in a store too large for the loader to keep decoded
# What our cells/s are compared with, where it is not the same of annbatch.
PEER = {"windows": "annbatch-csr", "large": "annbatch-csr", "s3": "ours-csr"}


class Streaming(StoreBenchmark):
    """Our loader and annbatch's in turns, each measurement in a process of its own."""

    name = "streaming"
    options: ClassVar = {
        **StoreBenchmark.options,
        "window": Option(8192, 2048, "cells mixed at a time"),
        "seconds": Option(10.0, 0.5, "of each measurement"),
    }

    @property
    def settings(self) -> dict[str, tuple[int, int]]:
        """annbatch's settings to try, chunk and chunks: all mix a window like ours, or more."""
        tried = sorted({(chunk, self.args.window // chunk) for chunk in CHUNKS} | {DEFAULT})
        chosen = [QUICK_SETTING] if self.args.quick else tried
        return {f"try-{chunk}x{preload}": (chunk, preload) for chunk, preload in chosen}

    def list_cases(self) -> Iterator[Case]:
        """Of each data set: the stores, annbatch's settings, then all measures in turns."""
        for name in self.args.sets:
            tries = [f"annbatch-{setting}" for setting in self.settings]
            for method in (*(f"{method}-disk" for method in METHODS), *tries):
                yield method, name, 0, 0
            turn = [f"{method}-{measure}" for measure in PAIRED[name] for method in METHODS]
            turn += [f"ours-{measure}" for measure in (*ALONE[name], *LIMITS)]
            for number in range(self.args.repeats):
                for method in turn:
                    yield method, name, number, 0

    def list_inputs(self, method: str, data_set: str) -> list[Path | str]:
        """Cells, sources and settings of both methods, as their ratio is what counts."""
        how = f"{self.args.window} {self.args.seconds} {self.args.threads}"
        digest = cells.digest_shape(self.choose_shape(data_set))
        return [digest, *stores.SOURCES, Path(__file__).parent, how]

    def measure(self, run: Run, folder: Path) -> Result:
        method, _, measure = run.method.partition("-")
        shape, args, log = self.choose_shape(run.data_set), self.args, folder / "log.txt"
        store = self.convert_once(method, shape, COPIES if measure == "large" else 1)
        if measure == "disk":
            nonzeros = cells.count_nonzeros(cells.find_file(shape, args.work))
            return {"bytes_per_nonzero": stores.count_bytes(store) / nonzeros}
        step = STEP_MS if measure == "step" else 0
        limits = {"batch": BATCH, "threads": args.threads, "seconds": args.seconds}
        limits |= {"warm": args.seconds / 3, "step-ms": step}
        words = [f"--{name}={value}" for name, value in limits.items()]
        if method == "ours":
            kind = "csr" if measure in ("step", "large", "s3") else measure
            probe = [sys.executable, "-m", "tests.benchmarks.streaming.probe"]
            with upload_store(store) if measure == "s3" else nullcontext(store) as place:
                command = [*probe, place, kind, "--window", str(args.window), *words]
                run_command(command, log, args.threads)
            return read_last_json(log)
        chunk, preload = self.choose_setting(run, measure)
        words += ["--chunk", str(chunk), "--preload", str(preload)]
        words += ["--dense"] if measure == "dense" else []
        run_command([*self.list_annbatch(store), *words], log, args.threads)
        return read_last_json(log) | {"chunk": chunk, "preload": preload}

    def choose_setting(self, run: Run, measure: str) -> tuple[int, int]:
        """The setting that a run of annbatch tries, or the fastest of all tried on the data set."""

        def find_speed(setting: str) -> float:
            tried = Run(f"annbatch-{setting}", run.data_set, 0, 0, run.digest)
            return float(self.obtain(tried)["cells_per_s"])

        settings = self.settings
        return settings[measure if measure in settings else max(settings, key=find_speed)]

    def tabulate(self, records: Sequence[Result]) -> str:
        lines = [super().tabulate(records), ""]
        for name in self.args.sets:
            ratios = list_ratios(records, name)
            lines += [f"{name}: {what}: {ratio:.2f}" for what, ratio in ratios if ratio == ratio]
        return "\n".join(lines)

    def judge(self, records: Sequence[Result]) -> Iterator[Result]:
        for key, bar in self.bars.items():
            (name, what), least = key.split(), self.args.repeats
            if what in ("waiting", "p99_ms"):
                where = {"method": "ours-step", "data_set": name}
                yield bar.judge(find_median(records, what, least, **where))
            else:
                yield bar.judge(compare_methods(records, name, what, least))


@contextmanager
def upload_store(store: Path) -> Iterator[str]:
    """The URL of a copy of the store on a server that the commands of this process find."""
    with serve() as server, pytest.MonkeyPatch.context() as patch:
        for name, value in server.environment.items():
            patch.setenv(name, value)
        yield server.upload(store, "store")


def compare_methods(records: Sequence[Result], name: str, what: str, least: int = 1) -> float:
    """What is ours to what is annbatch's: cells/s of a measure, or bytes per non-zero."""
    disk = what == "disk"
    path, least = ("bytes_per_nonzero", 1) if disk else ("cells_per_s", least)
    median = partial(find_median, records, path, least, data_set=name)
    return median(method=f"ours-{what}") / median(method=PEER.get(what, f"annbatch-{what}"))


def list_ratios(records: Sequence[Result], name: str) -> Iterator[tuple[str, float]]:
    """How we compare with annbatch, and how near the machine's limits we come."""
    shape, median = cells.SHAPES[name], partial(find_median, records, data_set=name)
    for what in ("disk", *PAIRED[name], *ALONE[name]):
        yield f"{what}, ours to {PEER.get(what, 'annbatch')}", compare_methods(records, name, what)
    which = "large" if "large" in ALONE[name] else "csr"
    entries = median("nonzeros_per_s", method=f"ours-{which}")
    yield f"{which}, share of decode", entries / median("nonzeros_per_s", method="ours-decode")
    # Of a non-zero an index and a value; batches of binary counts share their values.
    written = entries * (4 if shape.binary else 8)
    yield f"{which}, share of memcpy", written / median("bytes_per_s", method="ours-memcpy")
    rows = median("cells_per_s", method="ours-dense") * 4 * shape.features  # float32
    yield "dense, share of memset", rows / median("bytes_per_s", method="ours-memset")


if __name__ == "__main__":
    Streaming.main()
