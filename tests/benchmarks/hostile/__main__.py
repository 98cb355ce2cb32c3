"""Does broken or hostile input ever crash, hang, fill the memory, run code, or get served wrong?

.venv/bin/python -m tests.benchmarks.hostile --json OUT.json [--quick] [--groups manifest h5ad ...]

Inputs of each group are made one by one from a seed, and tried through the commands and classes that people use. Each
must be refused with an error that says what and where, or give right values.
"""

from __future__ import annotations

import argparse
import contextlib
import io
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from clue_dist.process import run_main
from tests.benchmarks import common
from tests.benchmarks.common import Bar, Result, Run
from tests.benchmarks.hostile.probe import GROUPS, LIMIT, MEMORY, Prober
from tests.distributed.command import ROOT

INPUTS, QUICK = 200, 12  # of each group
CRASHES = Bar(f"crashes of {len(GROUPS) * INPUTS} inputs", "<=", 0)
RAN = Bar("inputs that had something imported, unpickled or run", "<=", 0)
SOURCES = [
    f"clue_dist/{name}" for name in ("store", "data", "config.py", "errors.py", "train", "embed.py")
]
SOURCES += [
    f"tests/{name}" for name in ("benchmarks/hostile", "benchmarks/damage", "unit/prep_helpers.py")
]
SOURCES += ["data_prep", "configs"]

FOOTNOTES = f"""\
refused: a ClueError with exit code 2 that says what and where, no traceback, and no store is left behind
right: taken, with the values that were there, or that other readers find; in a store that was signed again, which says
itself what its values are: within their bounds
crashed: any other exception or exit, wrong values, {LIMIT} s without an end, {MEMORY >> 30} GiB asked for, a link that
was followed, anything that was imported, unpickled or run"""


def arguments(words: Sequence[str] | None = None) -> argparse.Namespace:
    parser = common.parser("hostile", __doc__, "hostile")
    parser.add_argument(
        "--groups", nargs="+", choices=list(GROUPS), default=list(GROUPS), help="default: all"
    )
    return parser.parse_args(words)


def runs_of(args: argparse.Namespace) -> list[Run]:
    digest = common.digest(*(ROOT / part for part in SOURCES), str(args.quick))
    return [Run(group, "inputs", 0, 0, digest) for group in args.groups]


def do(run: Run, folder: Path, args: argparse.Namespace) -> Result:
    """All inputs of a group."""
    return tried(run.method, folder, range(QUICK if args.quick else INPUTS), run.seed)


def tried(group: str, folder: Path, numbers: Sequence[int], seed: int) -> Result:
    """How the inputs of these numbers ended. folder: what they are made of is made in it, once."""
    make, _ = GROUPS[group]
    base = folder / "base"
    if not base.exists():
        base.mkdir(parents=True)
        with contextlib.redirect_stderr(io.StringIO()):
            make(base)
    prober = Prober(group, folder, seed)
    try:
        found = [prober.tried(number) for number in numbers]
    finally:
        prober.close()
    ends = {end: sum(f["end"] == end for f in found) for end in ("refused", "right", "crashed")}
    crashes = [f for f in found if f["end"] == "crashed"]
    most = max((f.get("grown_mb", 0) for f in found), default=0)
    slowest = max((f.get("seconds", 0.0) for f in found), default=0.0)
    ran = sum(bool(f["ran"]) for f in found)
    return {
        "inputs": len(found),
        **ends,
        "ran": ran,
        "seconds": slowest,
        "grown_mb": most,
        "crashes": crashes,
    }


def told(record: Result) -> str:
    return f"{record['inputs']} inputs, {record['crashed']} crashed"


def table(records: Sequence[Result]) -> str:
    rows = [["group", "inputs", "refused", "right", "crashed", "code run", "slowest", "memory"]]
    for r in records:
        numbers = [r[name] for name in ("inputs", "refused", "right", "crashed", "ran")]
        rows.append(
            [r["method"], *map(str, numbers), f"{r['seconds']:.1f} s", f"{r['grown_mb']} MB"]
        )
    totals = [
        sum(r[name] for r in records) for name in ("inputs", "refused", "right", "crashed", "ran")
    ]
    rows.append(["all", *map(str, totals), "", ""])
    crashes = [f"{r['method']} {_line(crash)}" for r in records for crash in r["crashes"]]
    return "\n".join([common.aligned(rows), *(["", "crashed:", *crashes] if crashes else [])])


def _line(crash: dict[str, Any]) -> str:
    ends = "; ".join(f"{name}: {text}" for name, text in crash["told"].items())
    return f"{crash['number']}: {crash['what']}: {ends} {' '.join(crash['ran'])}".replace("\n", " ")


def bars_of(records: Sequence[Result], args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Judged where all groups were tried, and never on a quick look."""
    whole = not args.quick and len(records) == len(GROUPS)
    yield CRASHES.judged(sum(r["crashed"] for r in records) if whole else None)
    yield RAN.judged(sum(r["ran"] for r in records) if whole else None)


def main() -> None:
    args = arguments()
    common.carry_out(
        args,
        runs_of(args),
        common.Steps(lambda run, folder: do(run, folder, args)),
        told,
        table,
        FOOTNOTES,
        lambda records: bars_of(records, args),
    )


if __name__ == "__main__":
    run_main(main)
