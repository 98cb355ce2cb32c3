"""What the benchmarks of stores share: repeats that take turns, medians, ratios, the arguments."""

from __future__ import annotations

import argparse
import os
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from tests.benchmarks import cells, common
from tests.benchmarks.common import Result, Run

REPEATS = 3


@dataclass(frozen=True)
class Repeat(Run):
    """One of several measurements of the same; `fold` counts them."""

    @property
    def name(self) -> str:
        return f"{self.method} on {self.data_set}, repeat {self.fold}"


def parser(name: str, doc: str | None) -> argparse.ArgumentParser:
    """What the benchmarks of stores are told on the command line."""
    out = common.parser(name, doc, "streaming")
    out.add_argument(
        "--sets", nargs="+", choices=cells.SHAPES, help="default: both, of a quick look rna"
    )
    out.add_argument("--repeats", type=int, help=f"default: {REPEATS}, of a quick look 1")
    return out


def parsed(parser: argparse.ArgumentParser, words: Sequence[str] | None) -> argparse.Namespace:
    """The arguments, and what follows where they do not say."""
    args = parser.parse_args(words)
    args.sets = args.sets or (["rna"] if args.quick else list(cells.SHAPES))
    args.repeats = args.repeats or (1 if args.quick else REPEATS)
    return args


def settle(args: argparse.Namespace) -> None:
    """Leave this process and all it starts as many cores as threads."""
    # Pools size themselves by the cores they may use: TensorStore's and Rust's take no other limit from us.
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: args.threads])


def median(
    records: Sequence[Result], method: str, name: str, what: str, repeats: int = 1
) -> float | None:
    """Over a method's repeats on a data set; None where fewer than `repeats` have been measured."""
    values = [r[what] for r in records if (r["method"], r["data_set"]) == (method, name)]
    return statistics.median(values) if len(values) >= max(repeats, 1) else None


def ratio(a: float | None, b: float | None) -> float | None:
    return None if a is None or not b else a / b


def shown(value: float | None, digits: int = 0) -> str:
    return "-" if value is None else f"{value:,.{digits}f}"
