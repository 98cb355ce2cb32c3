"""What is told of results: values, bars, tables, and where they were measured."""

import math
import operator
import os
import platform
import re
import statistics
import tomllib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import reduce
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pandas as pd
import psutil

OPERATORS = {"<": operator.lt, "<=": operator.le, ">": operator.gt, ">=": operator.ge}
RUN = ("data_set", "method", "fold", "seed", "wall_s")
Result = dict[str, Any]  # what one run gave, as JSON


def select_values(records: Iterable[Result], path: str, **where: Any) -> list[Any]:
    """What records have at a dotted path, of those whose fields are as `where` says."""
    chosen = (r for r in records if all(r[field] == value for field, value in where.items()))
    return [reduce(operator.getitem, path.split("."), record) for record in chosen]


def find_median(records: Iterable[Result], path: str, least: int = 1, **where: Any) -> float:
    """The median over the repeats of a measurement; NaN where fewer than `least` were made."""
    values = select_values(records, path, **where)
    return statistics.median(values) if len(values) >= max(least, 1) else math.nan


@dataclass(frozen=True)
class Bar:
    """A number to reach: a value must compare with `bar` as `op`, of OPERATORS, says."""

    name: str
    op: str
    bar: float

    def fill_name(self, *values: Any) -> "Bar":
        return replace(self, name=self.name.format(*values))

    def judge(self, value: float | None, deviation: float | None = None) -> Result:
        """Judge a value, None or NaN where not all was run that the bar is about: it stays open.

        deviation: of the values that `value` is the mean of.
        """
        value = None if value is None or math.isnan(value) else value
        holds = None if value is None else bool(OPERATORS[self.op](value, self.bar))
        judged = {"name": self.name, "value": value, "op": self.op, "bar": self.bar, "holds": holds}
        return judged if deviation is None else judged | {"deviation": deviation}

    def judge_mean(self, values: Sequence[float]) -> Result:
        """Judge by the mean of values, with their standard deviation; open where there are none."""
        deviation = statistics.stdev(values) if len(values) > 1 else None
        return self.judge(statistics.fmean(values) if values else None, deviation)


def load_bars(benchmark: str) -> dict[str, Bar]:
    bars = tomllib.loads(Path(__file__).with_name("bars.toml").read_text())[benchmark]
    return {key: Bar(*bar) for key, bar in bars.items()}


def describe_bars(bars: Iterable[Result]) -> Iterator[str]:
    """One line for each bar that was judged."""
    words = {True: "holds ", False: "MISSED", None: "open  "}
    for bar in bars:
        value = "not run" if bar["value"] is None else f"{bar['value']:.4g}"
        value += f" ± {bar['deviation']:.2g}" if "deviation" in bar else ""
        yield f"{words[bar['holds']]}  {bar['name']}: {value} {bar['op']} {bar['bar']:g}"


def format_value(value: Any) -> str:
    """Four digits of a number, and all of those before the point; nothing of NaN."""
    if isinstance(value, str) or pd.isna(value):
        return value if isinstance(value, str) else ""
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"


def format_spread(values: Iterable[float]) -> str:
    """Mean ± standard deviation, where there are several values."""
    known = [value for value in values if not math.isnan(value)]
    told = [
        find(known) for find, n in ((statistics.fmean, 1), (statistics.stdev, 2)) if len(known) >= n
    ]
    return " ± ".join(map(format_value, told))


def select_columns(records: Sequence[Result], paths: Sequence[str]) -> pd.DataFrame:
    """What records have at some paths, or every number that they have, under its name."""
    frame = pd.json_normalize(records)
    numbers = [path for path in frame.select_dtypes("number") if path not in RUN]
    return frame.reindex(columns=[*RUN, *(paths or numbers)]).rename(columns=name_column)


def tabulate_records(records: Sequence[Result], paths: Sequence[str], counted: str) -> str:
    """A row for each method on a data set, with what its records have at some paths.

    counted: of a "fold" mean and deviation are told, of a "repeat" the median, else the value.
    """
    # What no record has gets no column.
    frame = select_columns(records, paths).dropna(axis=1, how="all")
    groups = frame.drop(columns=list(RUN[2:]), errors="ignore").groupby(list(RUN[:2]), sort=False)
    table = groups.agg({"fold": format_spread, "repeat": "median"}.get(counted, "first"))
    if counted:
        table.insert(0, f"{counted}s", groups.size())
    return format_table(table)


def name_column(path: str) -> str:
    return path if path in RUN else path.removeprefix("scores.global.").replace("_", " ")


def format_table(table: pd.DataFrame) -> str:
    """The whole table as text, the names of its rows first."""
    return table.reset_index().map(format_value).to_string(index=False, justify="left")


def describe_place(packages: Iterable[str]) -> Result:
    """The machine, and the versions of Python, of ours, of torch and of packages."""
    models = re.findall(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())
    machine = {
        "platform": platform.platform(),
        "cpu": models[0] if models else platform.processor(),
        "cores": len(os.sched_getaffinity(0)),
        "memory_gib": round(psutil.virtual_memory().total / 2**30, 1),
    }
    versions = {name: version(name) for name in ("clue-dist", "torch", *packages)}
    return {"machine": machine, "versions": {"python": platform.python_version()} | versions}
