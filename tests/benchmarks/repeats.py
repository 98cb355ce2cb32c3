"""What the benchmarks of stores share: repeats that take turns, medians, ratios, the arguments."""

from __future__ import annotations

import argparse
import os
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from tests.benchmarks import cells
from tests.benchmarks.common import Result, Run
from tests.distributed.command import ROOT

REPEATS = 3


@dataclass(frozen=True)
class Repeat(Run):
    """One of several measurements of the same; `fold` counts them."""

    @property
    def name(self) -> str:
        return f"{self.method} on {self.data_set}, repeat {self.fold}"


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", type=Path, required=True, help="where to write results, bars, machine and versions")
    parser.add_argument("--quick", action="store_true", help="a look of a minute on few cells: no bar is judged")
    parser.add_argument("--sets", nargs="+", choices=cells.SHAPES, help="default: both")
    parser.add_argument("--repeats", type=int, help=f"default: {REPEATS}, of a quick look 1")
    parser.add_argument("--work", type=Path, default=ROOT / ".benchmarks" / "streaming", help="where all is kept")
    parser.add_argument("--threads", type=int, default=2, help="and processor cores, of each measurement")


def settle(args: argparse.Namespace) -> None:
    """Fill in what follows, and leave this process and all it starts as many cores as threads."""
    args.work = args.work.resolve()
    args.repeats = args.repeats or (1 if args.quick else REPEATS)
    # Pools size themselves by the cores they may use: TensorStore's and Rust's take no other limit from us.
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: args.threads])


def median(records: Sequence[Result], method: str, name: str, what: str, repeats: int = 1) -> float | None:
    """Over a method's repeats on a data set; None where fewer than `repeats` have been measured."""
    values = [r[what] for r in records if (r["method"], r["data_set"]) == (method, name)]
    return statistics.median(values) if len(values) >= max(repeats, 1) else None


def ratio(a: float | None, b: float | None) -> float | None:
    return None if a is None or not b else a / b


def shown(value: float | None, digits: int = 0) -> str:
    return "-" if value is None else f"{value:,.{digits}f}"
