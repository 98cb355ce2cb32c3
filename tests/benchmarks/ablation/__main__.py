"""What each part of the recipe is worth: the paper's Table 5 on real cells, and the choices beyond it.

.venv/bin/python -m tests.benchmarks.ablation --json OUT.json [--quick] [--sets ...] [--folds ...] [--rows ...]

Every row trains a recipe with a few settings or cells changed on the mosaics of tests.benchmarks.matching and is scored
like there. Runs that have been done are kept: typed again, it goes on.
"""

from __future__ import annotations

import argparse
import math
import statistics
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

import mudata as md

from clue_dist.matching import METRICS
from clue_dist.process import run_main
from tests.benchmarks import common, matching, mosaic, scores
from tests.benchmarks.ablation import cells, estimates
from tests.benchmarks.ablation.cells import DOUBLINGS, OTHER_CELLS, TRANSDUCTIVE
from tests.benchmarks.ablation.rows import (
    ATLAS,
    COUNTED_ANEW,
    ROWS,
    applies,
    method_of,
    recipe_of,
    row_of,
)
from tests.benchmarks.common import Result, Run, Steps
from tests.benchmarks.split import FOLDS
from tests.distributed.command import ROOT

ACCURACIES = ("joint", "alone")  # of cell types
EXTRAPOLATED = "ever more pairs, extrapolated"

FOOTNOTES = """\
mean ± standard deviation over folds; one seed; scores over all test cells of a fold
joint, alone: accuracy of cell types by the joint z, and by the better of both modalities' own, 15 nearest neighbours,
as in tests.benchmarks.labels; the posterior decides the joint z, and no other score is about that
paper: our transcription of the authors' recipe, neurips2021_cite.json for RNA and proteins, neurips2021_multiome.json
for RNA and ATAC, the named terms of eq. 15 at weight 0; their mse is between z's of length 1 (cosine), but in the row
that says eq. 9
all other rows: atlas.json
every row is trained for as long as our "auto" says, which on thousands of cells is 1,500 steps of 128 for the paper's
recipe and 60 epochs of 512 for atlas.json, about twice as many cells; one row gives the paper's as many
transductive: each modality of the test cells joins the training set, from the start, as if no partner were known
transductive, and rows with fewer or more pairs: as many steps, cells in a batch and, where there are unpaired cells,
pairs among them as with the full set. no unpaired cells: half of the training cells are left; every partner known: all
of them are pairs
ever more pairs, told of five folds: the limit of 20, 40 and 80% of the cells as pairs, if every doubling gains as the
last two did; no limit: the last gained as much as the one before, or more
proteins, counted anew: no training; each test cell's protein counts against a Poisson draw around them, as from a
matcher that knows every true level: an estimate of what counting noise alone allows, not a bound"""


def arguments(words: Sequence[str] | None = None) -> argparse.Namespace:
    parser = mosaic.parser("ablation", __doc__)
    parser.add_argument(
        "--sets", nargs="+", choices=mosaic.SETS, help="default: cbmc_cite snare_adbrain_8lib"
    )
    parser.add_argument("--folds", nargs="+", type=int, choices=FOLDS, default=[0])
    parser.add_argument(
        "--rows", nargs="+", choices=ROWS, metavar="ROW", help=f"default: all; {'; '.join(ROWS)}"
    )
    args = parser.parse_args(words)
    args.sets = args.sets or (
        ["bmmc_cite_starter"] if args.quick else ["cbmc_cite", "snare_adbrain_8lib"]
    )
    args.rows = args.rows or (["paper: all", ATLAS, TRANSDUCTIVE] if args.quick else list(ROWS))
    return args


def runs_of(args: argparse.Namespace) -> list[Run]:
    return [
        Run(method_of(row), name, fold, 0, digest_of(row, name, args))
        for row in args.rows
        for fold in args.folds
        for name in args.sets
        if applies(row, name)
    ]


def digest_of(row: str, name: str, args: argparse.Namespace) -> str:
    """Of the sources, settings and cells that a row's embeddings of a data set follow from."""
    data = mosaic.data_digest(name, args.data)
    if row == ATLAS:  # the run of the matching benchmark
        return matching.digest_of("ours", name, args)
    if row == COUNTED_ANEW:
        return common.digest(data, Path(estimates.__file__), ROOT / "clue_dist/matching.py")
    changed = (row, Path(cells.__file__)) if row in OTHER_CELLS else ()
    settings = (*ROWS[row].settings, *matching.overrides_of(args.quick))
    return common.digest(data, mosaic.sources(), recipe_of(row, name), *settings, *changed)


def steps_of(args: argparse.Namespace) -> Steps:
    return Steps(
        lambda run, folder: do(run, folder, args),
        lambda run, folder: score(run, folder, args),
        scores.code(),
    )


def do(run: Run, folder: Path, args: argparse.Namespace) -> Result:
    """One row on one split: its embedding, and the seconds of its training."""
    row = row_of(run.method)
    if row == ATLAS:
        return matching.do(run, folder, args)
    split = mosaic.split_of(run.data_set, run.fold, args.data, args.work)
    if row == COUNTED_ANEW:
        with mosaic.quiet():
            proteins = md.read(split.test)[split.mods[1]].X
        return {
            "fit_s": 0.0,
            "threads": args.threads,
            "scores": estimates.counted_anew(proteins, run.fold),
        }
    settings = (*ROWS[row].settings, *matching.overrides_of(args.quick))
    if row in OTHER_CELLS:
        full, split = split, cells.changed(split, row, run.method, args.data)
        stores = [
            mosaic.stores_of(s, mosaic.sources(), args.threads, args.work) / "train.zarr"
            for s in (full, split)
        ]
        settings += cells.schedule(*stores, settings)
    recipe = recipe_of(row, run.data_set)
    fit_s = mosaic.ours(split, folder, run.seed, settings, args.threads, args.work, recipe)
    common.unchanged(run, digest_of(row, run.data_set, args))
    return {"fit_s": fit_s, "threads": args.threads}


def score(run: Run, folder: Path, args: argparse.Namespace) -> Result:
    return {} if row_of(run.method) == COUNTED_ANEW else matching.score(run, folder, args)


def table(records: Sequence[Result]) -> str:
    """One row of scores for each row of the ablation on each data set."""
    groups: dict[tuple[str, str], list[Result]] = defaultdict(list)
    for record in sorted(records, key=lambda r: list(mosaic.SETS).index(r["data_set"])):
        groups[record["data_set"], row_of(record["method"])].append(record)
    rows = [["set", "row", "folds", "FOSCTTM", "match", "recall10", *ACCURACIES, "fit s"]]
    for (name, row), group in groups.items():
        found = [common.spread([value(r, m) for r in group], matching.DIGITS[m]) for m in METRICS]
        for key in ACCURACIES:
            told = [r[key] for r in group if key in r]
            found.append(common.spread(told, 3) if told else "")
        rows.append(
            [name, row, str(len(group)), *found, common.spread([r["fit_s"] for r in group], 0)]
        )
    for name in dict.fromkeys(name for name, _ in groups):
        if all({r["fold"] for r in groups.get((name, row), [])} == set(FOLDS) for row in DOUBLINGS):
            means = [
                [statistics.fmean(value(r, m) for r in groups[name, row]) for row in DOUBLINGS]
                for m in METRICS
            ]
            limits = [limit_of(v, matching.DIGITS[m]) for m, v in zip(METRICS, means, strict=True)]
            rows.append([name, EXTRAPOLATED, "", *limits, *([""] * (len(ACCURACIES) + 1))])
    return f"{common.aligned(rows)}\n\n{estimates.parameters()}"


def limit_of(values: Sequence[float], digits: int) -> str:
    limit = estimates.limit(values)
    return "no limit" if math.isnan(limit) else f"{limit:.{digits}f}"


def value(record: Result, metric: str) -> float:
    return record["scores"]["global"][metric]


def main() -> None:
    args = arguments()
    common.carry_out(
        args, runs_of(args), steps_of(args), matching.told, table, FOOTNOTES, lambda records: ()
    )


if __name__ == "__main__":
    run_main(main)
