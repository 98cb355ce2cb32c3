"""Is anything slower, or larger in memory, with ten million cells than with one?

.venv/bin/python -m tests.benchmarks.atlas --json OUT.json [--quick] [--cells 1000000 3000000 10000000]

Stores of several sizes are converted, checked and streamed in turns, each in a process of its own. All are made of the
same two files, RNA of half a million simulated cells and proteins of the same: each size takes them so often, as data
sets of their own, every second one without its proteins. Runs that have been done are kept: typed again, it goes on.
"""

from __future__ import annotations

import argparse
import shutil
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from clue_dist.process import run_main
from tests.benchmarks import cells, common, repeats
from tests.benchmarks.atlas.probe import MANY
from tests.benchmarks.cells import Shape
from tests.benchmarks.common import Bar, Result, Run
from tests.benchmarks.conversion import stores
from tests.benchmarks.conversion.__main__ import MIB_OF_GB
from tests.benchmarks.conversion.memory import TreePeak
from tests.benchmarks.repeats import Repeat, median, ratio, shown

SIZES, QUICK_SIZES = (1_000_000, 3_000_000, 10_000_000), (40_000, 120_000)
LANE, QUICK_LANE = 500_000, 20_000  # cells of the files that all sizes are made of
FEATURES = {"rna": (2_000, 150), "adt": (20, 15)}  # and non-zeros a cell
METHODS = ("convert", "check", "stream")
STORE = "atlas.zarr"

FLAT, MEMORY = Bar("", ">=", 0.9), Bar("", "<=", 1.1)
SHORT = Bar("", "<=", 1.5)
GIGABYTE = Bar("GB of memory at the peak of the largest conversion", "<", 1.0)
ABSOLUTE = {
    "open_ms": Bar("ms to open the largest store", "<", 100),
    "step_ms": Bar("ms to find the cells of step 0 of it", "<", 10),
    "far_step_ms": Bar("ms to find the cells of step 10^9 of it", "<", 10),
    "far_first_ms": Bar("ms to go on from step 10^9 of it, to the first batch", "<", 500),
    "manifest_ms": Bar(f"ms to read the manifest of {MANY:,} cells", "<", 1000),
}

FOOTNOTES = f"""\
medians over repeats in turns; cells/s of convert and check from start to end of the command, MiB of anonymous and
shared memory at the peak of all its processes together; of stream those of the process that reads batches of 512
open: a store; step, far step: which cells are in step 0, in step 10^9; first, far first: a loader's first batch there
manifest: of {MANY:,} such cells; names: barcode, batch and label of a cell on disk, read only when asked for"""


def arguments(words: Sequence[str] | None = None) -> argparse.Namespace:
    parser = common.parser("atlas", __doc__, "streaming")
    parser.add_argument(
        "--cells", nargs="+", type=int, help=f"default: {' '.join(map(str, SIZES))}"
    )
    parser.add_argument(
        "--repeats", type=int, help=f"default: {repeats.REPEATS}, of a quick look 1"
    )
    args = parser.parse_args(words)
    args.cells = sorted(args.cells or (QUICK_SIZES if args.quick else SIZES))
    args.repeats = args.repeats or (1 if args.quick else repeats.REPEATS)
    return args


def runs_of(args: argparse.Namespace) -> list[Run]:
    """All sizes take turns."""
    return [
        Repeat(method, str(size), number, 0, digest_of(args))
        for method in METHODS
        for number in range(args.repeats)
        for size in args.cells
    ]


def digest_of(args: argparse.Namespace) -> str:
    shapes = map(cells.digest_of, shapes_of(args.quick).values())
    return common.digest(
        *shapes, stores.sources(), Path(__file__).parent, str(args.threads), str(args.quick)
    )


def shapes_of(quick: bool) -> dict[str, Shape]:
    lane = QUICK_LANE if quick else LANE
    return {name: Shape(name, lane, features, n, False) for name, (features, n) in FEATURES.items()}


def command(size: int, out: Path, args: argparse.Namespace) -> list[str | Path]:
    """Converts `size` cells: the files over and over, every second time without proteins."""
    shapes = shapes_of(args.quick)
    files = {name: cells.file_of(shape, args.work) for name, shape in shapes.items()}
    lanes, rest = divmod(size, shapes["rna"].cells)
    if rest or not lanes:
        raise ValueError(f"{size} cells are no multiple of {shapes['rna'].cells}")
    given = [
        f"lane{i:03d}:{name}={path}"
        for i in range(lanes)
        for name, path in files.items()
        if name == "rna" or i % 2
    ]
    keys = ("--batch-key", "plate", "--label-key", "cell_type", "--workers", str(args.threads))
    return [sys.executable, "-m", "data_prep", "convert", *given, "--out", out, *keys]


def do(run: Run, folder: Path, args: argparse.Namespace) -> Result:
    size, log = int(run.data_set), folder / "log.txt"
    kept = Repeat("convert", run.data_set, 0, 0, run.digest).folder(args.work) / STORE
    if run.method == "stream":
        seconds = ("--seconds", "1", "--warm", "0.5") if args.quick else ()
        common.call(
            [sys.executable, "-m", "tests.benchmarks.atlas.probe", kept, *seconds],
            log,
            args.threads,
        )
        return common.last_json(log)
    words = command(size, folder / STORE, args)
    if run.method == "check":
        words = [sys.executable, "-m", "data_prep", "check", kept]
    with TreePeak() as peak:
        seconds_taken = common.call(words, log, args.threads)
    if run.method == "convert" and run.fold:  # the first one's store is looked at further
        shutil.rmtree(folder / STORE)
    return {"seconds": seconds_taken, "cells_per_s": size / seconds_taken, "anon_mib": peak.anon}


def told(record: Result) -> str:
    return f"{record['cells_per_s']:,.0f} cells/s, {record['anon_mib']:,.0f} MiB"


SHORTS = {"open_ms": 1, "step_ms": 2, "far_step_ms": 2, "first_ms": 1, "far_first_ms": 1}
MANIFEST = {"manifest_mb": 1, "manifest_ms": 0, "names_bytes": 1}


def table(records: Sequence[Result]) -> str:
    sizes = sorted({r["data_set"] for r in records}, key=int)
    rows = [["cells", *(f"{m} {unit}" for m in METHODS for unit in ("cells/s", "MiB"))]]
    more = [
        [
            "cells",
            *(name.removesuffix("_ms").replace("_", " ") + " ms" for name in SHORTS),
            *MANIFEST,
        ]
    ]
    for size in sizes:
        values = [
            median(records, m, size, what) for m in METHODS for what in ("cells_per_s", "anon_mib")
        ]
        rows.append([f"{int(size):,}", *map(shown, values)])
        times = [
            shown(median(records, "stream", size, k), d) for k, d in (SHORTS | MANIFEST).items()
        ]
        more.append([f"{int(size):,}", *times])
    return f"{common.aligned(rows)}\n\n{common.aligned(more)}"


def bars_of(records: Sequence[Result], args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Every larger size against the smallest, the worst of them counts; and what is bounded whatever the size. Judged
    where every repeat has been measured, never on a quick look."""
    small, *larger = map(str, args.cells)

    def of(method: str, size: str, what: str) -> float | None:
        return None if args.quick else median(records, method, size, what, args.repeats)

    def worst(method: str, what: str, which: Callable[[Iterable[float]], float]) -> float | None:
        """What a larger size has, as so many times what the smallest has."""
        known = [ratio(of(method, size, what), of(method, small, what)) for size in larger]
        return which(k for k in known if k is not None) if known and None not in known else None

    sizes = f"of {' and '.join(f'{int(size):,}' for size in larger)} cells, times that of {int(small):,}"
    for method in METHODS:
        yield Bar(f"{method}: cells/s {sizes}", FLAT.op, FLAT.bar).judged(
            worst(method, "cells_per_s", min)
        )
        yield Bar(f"{method}: memory {sizes}", MEMORY.op, MEMORY.bar).judged(
            worst(method, "anon_mib", max)
        )
    for what in SHORTS:
        name = what.removesuffix("_ms").replace("_", " ")
        yield Bar(f"time of {name} {sizes}", SHORT.op, SHORT.bar).judged(worst("stream", what, max))
    most = of("convert", str(args.cells[-1]), "anon_mib")
    yield GIGABYTE.judged(None if most is None else most / MIB_OF_GB)
    for what, bar in ABSOLUTE.items():
        yield bar.judged(of("stream", str(args.cells[-1]), what))


def main() -> None:
    args = arguments()
    repeats.settle(args)
    common.carry_out(
        args,
        runs_of(args),
        common.Steps(lambda run, folder: do(run, folder, args)),
        told,
        table,
        FOOTNOTES,
        lambda records: bars_of(records, args),
        packages=stores.PACKAGES,
    )


if __name__ == "__main__":
    run_main(main)
