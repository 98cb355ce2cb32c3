"""How fast, in what memory and to what size are cells converted from .h5ad, next to annbatch?

.venv/bin/python -m tests.benchmarks.conversion --json OUT.json [--quick]

Ours (`python -m data_prep convert`) and annbatch (`DatasetCollection.add_adatas`, its defaults) convert the same file
in turns, each in a process of its own. Runs that have been done are kept: typed again, it goes on.
"""

from __future__ import annotations

import argparse
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from clue_dist.process import run_main
from tests.benchmarks import cells, common, repeats
from tests.benchmarks.common import Bar, Result, Run
from tests.benchmarks.conversion import stores
from tests.benchmarks.conversion.memory import TreePeak
from tests.benchmarks.repeats import Repeat, median, ratio, shown

FASTER = Bar("", ">=", 4.0)
MEMORY = Bar("GB of anonymous memory at the peak of our conversion, the larger set", "<", 1.0)
MIB_OF_GB = 1e9 / 2**20

FOOTNOTES = """\
medians over repeats in turns, from start to end of the command; the input lies in the page cache if it fits
anon MiB: the most anonymous and shared memory of all processes together; rss MiB: with mapped files
ratio: ours to annbatch's, of the medians"""


def arguments(words: Sequence[str] | None = None) -> argparse.Namespace:
    return repeats.parsed(repeats.parser("conversion", __doc__), words)


def runs_of(args: argparse.Namespace) -> list[Run]:
    """Ours and annbatch take turns on each data set."""
    return [
        Repeat(f"convert-{method}", name, number, 0, digest_of(name, args))
        for name in args.sets
        for number in range(args.repeats)
        for method in stores.METHODS
    ]


def digest_of(name: str, args: argparse.Namespace) -> str:
    shape = cells.shape_of(name, args.quick)
    return common.digest(
        cells.digest_of(shape), stores.sources(), Path(__file__).parent, str(args.threads)
    )


def steps_of(args: argparse.Namespace) -> common.Steps:
    return common.Steps(lambda run, folder: do(run, folder, args))


def do(run: Run, folder: Path, args: argparse.Namespace) -> Result:
    """Convert once; what was written is looked at and removed."""
    method = run.method.removeprefix("convert-")
    shape = cells.shape_of(run.data_set, args.quick)
    h5ad = cells.file_of(shape, args.work)
    command = stores.command(method, h5ad, folder, shape.name, args.threads, args.work)
    with TreePeak() as peak:
        seconds = common.call(command, folder / "log.txt", args.threads)
    out = stores.path_in(folder, method)
    size = stores.bytes_in(out) / cells.nonzeros_in(h5ad)
    shutil.rmtree(out)
    memory = {"anon_mib": peak.anon, "rss_mib": peak.rss}
    return {
        "seconds": seconds,
        "cells_per_s": shape.cells / seconds,
        "bytes_per_nonzero": size,
        **memory,
    }


def told(record: Result) -> str:
    return f"{record['cells_per_s']:,.0f} cells/s, {record['anon_mib']:,.0f} MiB"


COLUMNS = {"cells_per_s": 0, "anon_mib": 0, "rss_mib": 0, "bytes_per_nonzero": 2}


def table(records: Sequence[Result]) -> str:
    rows = [["set", "method", "cells/s", "anon MiB", "rss MiB", "bytes/non-zero"]]
    for name in cells.SHAPES:
        got = {
            m: [median(records, f"convert-{m}", name, what) for what in COLUMNS]
            for m in stores.METHODS
        }
        if any(value is not None for values in got.values() for value in values):
            for method, values in got.items():
                rows.append([name, method, *map(shown, values, COLUMNS.values())])
            ratios = [ratio(a, b) for a, b in zip(*got.values(), strict=True)]
            rows.append([name, "ratio", *(shown(r, 2) for r in ratios)])
    return common.aligned(rows)


def bars_of(records: Sequence[Result], args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Judged where every repeat has been measured, and never on a quick look."""

    def value(method: str, name: str, what: str) -> float | None:
        return (
            None if args.quick else median(records, f"convert-{method}", name, what, args.repeats)
        )

    for name in cells.SHAPES:
        bar = Bar(f"cells/s of conversion, times annbatch's ({name})", FASTER.op, FASTER.bar)
        yield bar.judged(
            ratio(value("ours", name, "cells_per_s"), value("annbatch", name, "cells_per_s"))
        )
    peaks = [value("ours", name, "anon_mib") for name in cells.SHAPES]
    known = [peak / MIB_OF_GB for peak in peaks if peak is not None]
    yield MEMORY.judged(max(known) if len(known) == len(peaks) else None)


def main() -> None:
    args = arguments()
    repeats.settle(args)
    common.carry_out(
        args,
        runs_of(args),
        steps_of(args),
        told,
        table,
        FOOTNOTES,
        lambda records: bars_of(records, args),
        packages=stores.PACKAGES,
        peers={"annbatch": common.pins(stores.PEERS / "annbatch.txt")},
    )


if __name__ == "__main__":
    run_main(main)
