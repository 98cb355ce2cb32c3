"""Does a run survive what clusters do: a hundred kills, ten thousand steps, stops, damaged checkpoints, slow saving?

.venv/bin/python -m tests.benchmarks.faults --json OUT.json [--quick] [--only kills ...]
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from clue_dist.process import run_main
from tests.benchmarks import common
from tests.benchmarks.common import Bar, Result, Run
from tests.benchmarks.faults.campaigns import CAMPAIGNS, Size
from tests.distributed.command import ROOT

FULL = Size(steps=10_000, kills=100, stops=20, damages=100, saves=12, features=20_000)
QUICK = Size(steps=60, kills=1, stops=1, damages=6, saves=4, features=200)
SOURCES = (
    "clue_dist",
    "launch/train.py",
    "configs/zero3.json",
    "tests/benchmarks/faults",
    "tests/benchmarks/common.py",
    "tests/stores.py",
    "tests/distributed/command.py",
    "tests/faults/command.py",
)

BARS = {
    "kills": [
        Bar("kills after which the run went on", ">=", FULL.kills),
        Bar("seconds from a kill to the job's end, at most", "<=", 10),
        Bar("save intervals done again where no checkpoint was half written, at most", "<=", 1),
        Bar("save intervals done again where one was, at most", "<=", 2),
        Bar("difference of weights and losses to the unbroken run", "<=", 0),
    ],
    "steady": [
        Bar("memory at the end to that after a tenth of the steps", "<=", 1.05),
        Bar("descriptors and threads more than after a tenth of the steps", "<=", 0),
    ],
    "stops": [
        Bar("seconds from a stop signal to the last commit, at most", "<=", 25),
        Bar("steps lost by stops", "<=", 0),
    ],
    "damages": [
        Bar("damaged checkpoints used", "<=", 0),
        Bar("sound ones before them found", ">=", 3 * FULL.damages),
    ],
    "saving": [
        Bar("waiting for a checkpoint, in steps of the large config", "<=", 0.05),
        Bar("waiting where best weights are kept at the same step", "<=", 0.05),
        Bar("what a step takes longer as a checkpoint is written, a core free", "<=", 0.05),
        Bar("seconds from a stop signal amid a save to the last commit", "<=", 25),
    ],
}

FOOTNOTES = """\
kills: SIGKILL of rank 0, of rank 1 or of both, two ranks under the deepspeed launcher, a checkpoint every 5 steps; in
  turns within 6 ms after a checkpoint is seen being written, at any time of training, and in the first 8 s of the
  processes, of which starting takes 6; then the same command again. Where a checkpoint is half written, the one before
  it stands, which is up to two intervals old
steady: the same run unbroken, with wandb offline and TensorBoard; memory is the resident set of a rank, the larger one
stops: USR1 to the ranks, as Slurm sends it, and SIGTERM to the launcher, in turns
damages: a flipped byte, a truncation, a missing file, at a random place of the newest checkpoint
saving: configs/zero3.json in float32, a thread a rank, on two cores: two ranks leave none free, one rank does; the
  stop is USR1 as a save begins, which is committed first, and then the step that was reached"""


def arguments(words: Sequence[str] | None = None) -> argparse.Namespace:
    parser = common.parser("faults", __doc__, "faults")
    parser.add_argument("--only", nargs="+", choices=list(CAMPAIGNS), default=list(CAMPAIGNS))
    return parser.parse_args(words)


def runs_of(args: argparse.Namespace) -> list[Run]:
    digest = common.digest(*(ROOT / part for part in SOURCES), str(args.quick))
    return [Run(name, "simulated", 0, 0, digest) for name in CAMPAIGNS if name in args.only]


def do(run: Run, folder: Path, args: argparse.Namespace) -> Result:
    size = QUICK if args.quick else FULL
    return CAMPAIGNS[run.method](folder, size, args.work / f"whole-{run.digest[:12]}")


def told(record: Result) -> str:
    return ", ".join(f"{name} {value:.4g}" for name, value in record["numbers"].items())


def table(records: Sequence[Result]) -> str:
    rows = [["campaign", "what", "value"]]
    rows += [
        [r["method"], name, f"{value:.4g}"] for r in records for name, value in r["numbers"].items()
    ]
    return common.aligned(rows)


def bars_of(records: Sequence[Result], args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Never judged on a quick look."""
    values = {r["method"]: r["bars"] for r in records}
    for name, bars in BARS.items():
        given = values.get(name) if not args.quick else None
        for bar, value in zip(bars, given or [None] * len(bars), strict=True):
            yield bar.judged(value)


def main() -> None:
    args = arguments()
    steps = common.Steps(lambda run, folder: do(run, folder, args))
    common.carry_out(
        args,
        runs_of(args),
        steps,
        told,
        table,
        FOOTNOTES,
        lambda r: bars_of(r, args),
        ["deepspeed", "safetensors"],
    )


if __name__ == "__main__":
    run_main(main)
