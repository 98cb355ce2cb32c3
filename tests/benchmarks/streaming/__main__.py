"""How fast does the loader serve shuffled batches, next to others and to what the machine can do?

.venv/bin/python -m tests.benchmarks.streaming --json OUT.json [--quick]
"""

import sys
from collections.abc import Iterator, Sequence
from functools import partial
from itertools import product
from pathlib import Path
from typing import ClassVar

from tests.benchmarks import cells, stores
from tests.benchmarks.commands import read_last_json, read_pins, run_command
from tests.benchmarks.report import Result, find_median
from tests.benchmarks.runner import Case, Option, Run
from tests.benchmarks.stores import METHODS, StoreBenchmark
from tests.benchmarks.streaming.s3_server import serve_store

BATCH = 512
STEP_MS = 2.0
# Cells annbatch reads in a row, with as many chunks as fill the window; and its default.
CHUNKS, DEFAULT = (64, 128, 256, 512, 1024), (512, 32)
QUICK_CHUNKS = {(512, 4)}
# Cells scDataset reads in a row, out of a window like ours.
BLOCKS = (64, 512)

# What is measured in turns with annbatch, and what of ours alone.
PAIRED = {"rna": ("csr", "dense", "step"), "atac": ("csr", "step")}
OTHERS = ("scdl", "scdataset", "anndata")  # peers that are measured by these alone:
BY_OTHERS = ("csr", "dense")
ALONE = {"rna": ("windows", "s3"), "atac": ("large", "windows", "s3")}
LIMITS = ("decode", "memcpy", "memset")
COPIES = 8  # of the cells that are in a store too large for the loader to keep decoded
# What our cells/s are compared with, where it is not the same of annbatch.
PEER = {"windows": "annbatch-csr", "large": "annbatch-csr", "s3": "ours-csr"}


Setting = dict[str, int]  # options of a peer's script


class Streaming(StoreBenchmark):
    """Our loader and others in turns, each measurement in a process of its own."""

    name = "streaming"
    options: ClassVar = {
        **StoreBenchmark.options,
        "window": Option(8192, 2048, "cells mixed at a time"),
        "seconds": Option(10.0, 0.5, "of each measurement"),
        "others": Option(list(OTHERS), [], "measured beside annbatch;", OTHERS),
    }

    def list_settings(self, peer: str) -> dict[str, Setting]:
        """The settings of a peer that are tried, all of which mix a window like ours, or more."""
        window = self.args.window
        if peer == "annbatch":
            fitting = {(chunk, window // chunk) for chunk in CHUNKS} | {DEFAULT}
            tried = sorted(QUICK_CHUNKS if self.args.quick else fitting)
            return {f"try-{c}x{n}": {"chunk": c, "preload": n} for c, n in tried}
        workers = sorted({0, self.args.threads})
        if peer == "scdataset":
            fetch, choices = window // BATCH, product(BLOCKS, workers)
            return {
                f"try-{block}-{n}": {"block": block, "fetch": fetch, "workers": n}
                for block, n in choices
            }
        return {f"try-{n}": {"workers": n} for n in workers}

    def list_cases(self) -> Iterator[Case]:
        """Of each data set: the stores, the peers' settings, then all measures in turns."""
        peers = ("annbatch", *self.args.others)
        for name in self.args.sets:
            tries = [f"{peer}-{setting}" for peer in peers for setting in self.list_settings(peer)]
            kept = [method for method in ("ours", *peers) if method in stores.MADE_BY]
            for method in (*(f"{method}-disk" for method in kept), *tries):
                yield method, name, 0, 0
            turn = []
            for measure in PAIRED[name]:
                others = self.args.others if measure in BY_OTHERS else ()
                turn += [f"{method}-{measure}" for method in (*METHODS, *others)]
            turn += [f"ours-{measure}" for measure in (*ALONE[name], *LIMITS)]
            for number in range(self.args.repeats):
                for method in turn:
                    yield method, name, number, 0

    def list_inputs(self, method: str, data_set: str) -> list[Path | str]:
        """Cells, sources and settings of all methods, as their ratio is what counts."""
        how = f"{self.args.window} {self.args.seconds} {self.args.threads}"
        digest = cells.digest_shape(self.choose_shape(data_set))
        return [digest, *stores.SOURCES, *stores.TORCH_PEER[:2], Path(__file__).parent, how]

    def list_extras(self) -> Result:
        peers = ("annbatch", *self.args.others)
        return {"peers": {peer: read_pins(stores.SCRIPTS[peer][1]) for peer in peers}}

    def measure(self, run: Run, folder: Path) -> Result:
        method, _, measure = run.method.partition("-")
        shape, args, log = self.choose_shape(run.data_set), self.args, folder / "log.txt"
        place = self.find_cells(method, shape, COPIES if measure == "large" else 1)
        if measure == "disk":
            nonzeros = cells.count_nonzeros(cells.find_file(shape, args.work))
            return {"bytes_per_nonzero": stores.count_bytes(place) / nonzeros}
        step = STEP_MS if measure == "step" else 0
        limits = {"batch": BATCH, "threads": args.threads, "seconds": args.seconds}
        limits |= {"warm": args.seconds / 3, "step-ms": step}
        words = [f"--{name}={value}" for name, value in limits.items()]
        if method == "ours":
            if measure == "s3":
                return self.measure_s3(place, words, folder)
            kind = "csr" if measure in ("step", "large") else measure
            return self.probe_store(place, kind, words, log)
        setting = self.choose_setting(run, measure)
        words += [f"--{name}={value}" for name, value in setting.items()]
        words += ["--dense"] if measure == "dense" else []
        run_command([*self.list_peer(method, place), *words], log, args.threads)
        return read_last_json(log) | setting

    def probe_store(self, place: Path | str, kind: str, words: Sequence[str], log: Path) -> Result:
        """What our probe measures of a store."""
        probe = [sys.executable, "-m", "tests.benchmarks.streaming.probe", place, kind]
        run_command([*probe, "--window", str(self.args.window), *words], log, self.args.threads)
        return read_last_json(log)

    def measure_s3(self, store: Path, words: Sequence[str], folder: Path) -> Result:
        """CSR batches out of an S3 server, then plain GETs of the same bytes."""
        args, log = self.args, folder / "log.txt"
        gets = [sys.executable, "-m", "tests.benchmarks.streaming.gets"]
        with serve_store(store, args.work, folder, args.threads) as url:
            found = self.probe_store(url, "csr", words, log)
            run_command([*gets, url, *words], log, args.threads)
        plain = read_last_json(log)
        rates = ("cells_per_s", "cells_per_cpu_s")
        return found | {f"plain_{rate}": plain[rate] for rate in rates}

    def choose_setting(self, run: Run, measure: str) -> Setting:
        """The setting that a run of a peer tries, or the fastest of all tried on the data set."""
        peer, _, _ = run.method.partition("-")

        def find_speed(setting: str) -> float:
            tried = Run(f"{peer}-{setting}", run.data_set, 0, 0, run.digest)
            return float(self.obtain(tried)["cells_per_s"])

        settings = self.list_settings(peer)
        return settings[measure if measure in settings else max(settings, key=find_speed)]

    def tabulate(self, records: Sequence[Result]) -> str:
        lines = [super().tabulate(records), ""]
        for name in self.args.sets:
            ratios = [*list_ratios(records, name), *compare_others(records, name)]
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


def compare_methods(records: Sequence[Result], name: str, what: str, least: int = 1) -> float:
    """What is ours to what is annbatch's: cells/s of a measure, or bytes per non-zero."""
    disk = what == "disk"
    path, least = ("bytes_per_nonzero", 1) if disk else ("cells_per_s", least)
    median = partial(find_median, records, path, least, data_set=name)
    return median(method=f"ours-{what}") / median(method=PEER.get(what, f"annbatch-{what}"))


def compare_others(records: Sequence[Result], name: str) -> Iterator[tuple[str, float]]:
    """What is ours to what is a peer's, in cells by CPU seconds and, but of annbatch, by seconds.

    What other processes do on the machine changes ratios by CPU seconds less.
    """
    median = partial(find_median, records, data_set=name)
    for peer, what in product(("annbatch", *OTHERS), BY_OTHERS):
        paths = {"cells_per_s": "", "cells_per_cpu_s": ", by CPU time"}
        for path, unit in list(paths.items())[peer == "annbatch" :]:
            ratio = median(path, method=f"ours-{what}") / median(path, method=f"{peer}-{what}")
            yield f"{what}, ours to {peer}{unit}", ratio


def list_ratios(records: Sequence[Result], name: str) -> Iterator[tuple[str, float]]:
    """How we compare with annbatch, and how near the machine's limits we come."""
    shape, median = cells.SHAPES[name], partial(find_median, records, data_set=name)
    for what in ("disk", *PAIRED[name], *ALONE[name]):
        yield f"{what}, ours to {PEER.get(what, 'annbatch')}", compare_methods(records, name, what)
    served = {"path": "plain_cells_per_s", "method": "ours-s3"}
    yield "s3, share of plain GETs", median("cells_per_s", method="ours-s3") / median(**served)
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
