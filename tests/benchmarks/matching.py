"""Who matches the modalities of unseen cells best: clue_dist, the authors' CLUE, MultiVI, or a contrastive baseline?

.venv/bin/python -m tests.benchmarks.matching --json OUT.json [--quick]

Every method trains on the same mosaics and embeds the same unseen paired cells from one modality at a time; all are
scored by `clue_dist.matching`. Runs that have been done are kept: typed again, it goes on.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from clue_dist.matching import METRICS
from clue_dist.process import run_main
from tests.benchmarks import common, mosaic, scores
from tests.benchmarks.common import Bar, Result, Run, Steps
from tests.benchmarks.split import FOLDS

PEERS = Path(__file__).with_name("peers")
METHODS = ("ours", "contrastive", "reference", "multivi")
DIGITS = {"foscttm": 4, "match": 4, "recall10": 3}
LIMIT_S = 300  # of training, a fold

BARS: dict[tuple[str, str], Bar] = {
    (name, metric): Bar(f"{name}: {metric}, mean of five folds", op, bar)
    for name, metric, op, bar in (
        ("cbmc_cite", "foscttm", "<=", 0.0835),
        ("cbmc_cite", "match", ">=", 0.0175),
        ("cbmc_cite", "recall10", ">=", 0.128),
        ("snare_adbrain_8lib", "foscttm", "<=", 0.105),
        ("snare_adbrain_8lib", "match", ">=", 0.0150),
        ("snare_adbrain_8lib", "recall10", ">=", 0.118),
    )
} | {
    (name, "fit_s"): Bar(f"{name}: seconds of the slowest training", "<", LIMIT_S)
    for name in ("cbmc_cite", "snare_adbrain_8lib")
}

FOOTNOTES = """\
mean ± standard deviation over folds (and seeds); scores over all test cells of a fold, none seen in training
fit s: of ours the whole training command, launcher and imports included; of the others reduction and fit alone
contrastive: of four looks at the test cells (25, 50, 75, 100 epochs) the best by FOSCTTM, an advantage no other has"""

QUICK_SETTINGS = ("train.epochs=10", "log.tensorboard=false", "log.wandb=disabled")
QUICK_EPOCHS = {"contrastive": 8, "reference": 2, "multivi": 2}


def arguments(words: Sequence[str] | None = None) -> argparse.Namespace:
    parser = mosaic.parser("matching", __doc__)
    parser.add_argument(
        "--sets", nargs="+", choices=mosaic.SETS, help="default: cbmc_cite snare_adbrain_8lib"
    )
    parser.add_argument("--folds", nargs="+", type=int, choices=FOLDS, help="default: all five")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument(
        "--methods", nargs="+", choices=METHODS, help="default: all; multivi is for RNA+ATAC alone"
    )
    args = parser.parse_args(words)
    args.sets = args.sets or (
        ["bmmc_cite_starter"] if args.quick else ["cbmc_cite", "snare_adbrain_8lib"]
    )
    args.folds = args.folds or ([0] if args.quick else list(FOLDS))
    args.methods = args.methods or (["ours", "contrastive"] if args.quick else list(METHODS))
    return args


def runs_of(args: argparse.Namespace) -> list[Run]:
    """Method by method, each first on one fold of all data sets."""
    digests = {(m, name): digest_of(m, name, args) for m in args.methods for name in args.sets}
    return [
        Run(method, name, fold, seed, digests[method, name])
        for method in args.methods
        for seed in args.seeds
        for fold in args.folds
        for name in args.sets
        if method != "multivi" or mosaic.SETS[name] == ("rna", "atac")
    ]


def digest_of(method: str, name: str, args: argparse.Namespace) -> str:
    """Of the cells, sources and settings that a method's embeddings of a data set follow from."""
    return common.digest(mosaic.data_digest(name, args.data), code_of(method, args.quick))


def code_of(method: str, quick: bool) -> str:
    """Digest of the sources and settings that a method's embeddings follow from."""
    if method == "ours":
        return common.digest(mosaic.sources(), *overrides_of(quick))
    files = [PEERS / name for name in ("peer.py", f"{method}.py", f"{method}.txt")]
    return common.digest(*files, *epochs_of(method, quick))


def overrides_of(quick: bool) -> tuple[str, ...]:
    return QUICK_SETTINGS if quick else ()


def epochs_of(method: str, quick: bool) -> tuple[str, ...]:
    return ("--epochs", str(QUICK_EPOCHS[method])) if quick else ()


def steps_of(args: argparse.Namespace) -> Steps:
    return Steps(
        lambda run, folder: do(run, folder, args),
        lambda run, folder: score(run, folder, args),
        scores.code(),
    )


def do(run: Run, folder: Path, args: argparse.Namespace) -> Result:
    """One method on one split: its embedding in `z.npz`, and the seconds of its fit."""
    common.unchanged(run, digest_of(run.method, run.data_set, args))
    split = mosaic.split_of(run.data_set, run.fold, args.data, args.work)
    if run.method == "ours":
        fit_s = mosaic.ours(
            split, folder, run.seed, overrides_of(args.quick), args.threads, args.work
        )
    else:
        fit_s = peer(run, split, folder, args)
    common.unchanged(run, digest_of(run.method, run.data_set, args))
    return {"fit_s": fit_s, "threads": args.threads}


def score(run: Run, folder: Path, args: argparse.Namespace) -> Result:
    return scores.of(
        folder / "z.npz", mosaic.split_of(run.data_set, run.fold, args.data, args.work)
    )


def peer(run: Run, split: mosaic.Split, folder: Path, args: argparse.Namespace) -> float:
    """Run another method in an environment of its own; the seconds of its fit, as it says itself."""
    # The contrastive baseline needs nothing that this environment lacks, and an installation is not quick.
    here = args.quick and run.method == "contrastive"
    python = sys.executable if here else common.python_with(PEERS / f"{run.method}.txt", args.work)
    out = ["--out", folder / "z.npz", "--seed", str(run.seed), *epochs_of(run.method, args.quick)]
    common.call(
        [python, PEERS / f"{run.method}.py", split.folder, *split.mods, *out],
        folder / "log.txt",
        args.threads,
    )
    return float(np.load(folder / "z.npz")["fit_s"])


def told(record: Result) -> str:
    found = ", ".join(f"{m} {record['scores']['global'][m]:.{DIGITS[m]}f}" for m in METRICS)
    return f"{found}, fit {common.duration(record['fit_s'])}"


def table(records: Sequence[Result]) -> str:
    """One row for each method on each data set."""
    groups: dict[tuple[str, str], list[Result]] = defaultdict(list)
    for record in sorted(records, key=lambda r: list(mosaic.SETS).index(r["data_set"])):
        groups[record["data_set"], record["method"]].append(record)
    rows = [["set", "method", "folds", "FOSCTTM", "match", "recall10", "fit s", "threads"]]
    for (name, method), group in groups.items():
        found = [
            common.spread([r["scores"]["global"][m] for r in group], DIGITS[m]) for m in METRICS
        ]
        seeds = len({r["seed"] for r in group})
        folds = f"{len({r['fold'] for r in group})}" + (f" x {seeds} seeds" if seeds > 1 else "")
        threads = "/".join(sorted({str(r["threads"]) for r in group}))
        rows.append(
            [name, method, folds, *found, common.spread([r["fit_s"] for r in group], 0), threads]
        )
    return common.aligned(rows)


def bars_of(records: Sequence[Result], seeds: Sequence[int], quick: bool) -> list[dict[str, Any]]:
    """Each bar against ours; only where every fold has been run with every seed, and never on a quick look."""
    return [
        bar.judged(_value(records, name, metric, seeds, quick))
        for (name, metric), bar in BARS.items()
    ]


def _value(
    records: Sequence[Result], name: str, metric: str, seeds: Sequence[int], quick: bool
) -> float | None:
    mine = {
        (r["fold"], r["seed"]): r for r in records if (r["method"], r["data_set"]) == ("ours", name)
    }
    if quick or any((fold, seed) not in mine for fold in FOLDS for seed in seeds):
        return None
    if metric == "fit_s":
        return max(r["fit_s"] for r in mine.values())
    return statistics.fmean(r["scores"]["global"][metric] for r in mine.values())


def main() -> None:
    args = arguments()
    common.carry_out(
        args,
        runs_of(args),
        steps_of(args),
        told,
        table,
        FOOTNOTES,
        lambda records: bars_of(records, args.seeds, args.quick),
        peers={m: common.pins(PEERS / f"{m}.txt") for m in args.methods if m != "ours"},
    )


if __name__ == "__main__":
    run_main(main)
