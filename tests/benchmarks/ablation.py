"""What each part of the recipe is worth: the paper's Table 5 on real cells, and the choices beyond it.

.venv/bin/python -m tests.benchmarks.ablation --json OUT.json [--quick] [--sets ...] [--folds ...] [--rows ...]

Every row trains configs/atlas.json with a few settings changed on the mosaics of tests.benchmarks.matching and is
scored like there. Runs that have been done are kept: typed again, it goes on.
"""

from __future__ import annotations

import argparse
import re
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

import mudata as md

from clue_dist.errors import run_main
from clue_dist.matching import METRICS
from tests.benchmarks import common, matching, mosaic
from tests.benchmarks.common import BenchmarkError, Result, Run
from tests.benchmarks.split import FOLDS
from tests.distributed.command import ROOT

# The paper's losses alone, each ELBO a mean per feature as in the reference, where weights of one are of its order.
PAPER = ("objective.lambda_contrastive=0", "objective.per_feature=true", "objective.lambda_self=1")
TERMS = ("cross", "mse", "d")


def _paper(*used: str) -> tuple[str, ...]:
    return PAPER + tuple(f"objective.lambda_{term}={int(term in used)}" for term in TERMS)


TABLE_5 = {
    f"paper: self {' '.join(used)}".strip(): _paper(*used)
    for used in (
        ("cross", "mse", "d"),
        ("cross", "d"),
        ("mse", "d"),
        ("cross", "mse"),
        ("mse",),
        ("cross",),
        ("d",),
        (),
    )
}
BEYOND = {
    "atlas.json": (),
    "posterior mean": ("model.posterior=mean",),
    "alignment cosine": ("objective.alignment=cosine",),
    "paper: all, cosine": (*_paper(*TERMS), "objective.alignment=cosine"),
    "no contrast": ("objective.lambda_contrastive=0",),
    "contrast alone": tuple(f"objective.lambda_{term}=0" for term in ("self", *TERMS)),
    "no mse, no d": ("objective.lambda_mse=0", "objective.lambda_d=0"),
    "contrast within batch": ("objective.contrastive_within_batch=true",),
    "no mixup": ("objective.contrastive_mixup=false",),
    "no size input": ("model.trunk.size_input=false",),
    "one member": ("model.trunk.members=1",),
    "separate encoders": ("model.trunk.shared=false",),
    "KL warm-up": ("train.kl_warmup=0.3",),
    "trained projection": ("model.trunk.projection_lr=0.1",),
    "random projection, trained": ("model.trunk.projection_init=random", "model.trunk.projection_lr=1"),
}
TRANSDUCTIVE = "test cells too, unpaired"
ROWS: dict[str, tuple[str, ...]] = TABLE_5 | BEYOND | {TRANSDUCTIVE: ()}

FOOTNOTES = """\
mean ± standard deviation over folds; one seed; scores over all test cells of a fold
paper: the named terms of eq. 15 at weight 1, ELBOs per feature, no contrastive term; the trunks are those of atlas.json
test cells too, unpaired: each modality of the test cells joins the training set as if no partner were known"""


def arguments(words: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks.ablation", description=__doc__.split("\n")[0])
    parser.add_argument("--json", type=Path, required=True, help="where to write results, machine and versions")
    parser.add_argument("--quick", action="store_true", help="a look of a minute: few cells, few steps, two rows")
    parser.add_argument("--sets", nargs="+", choices=mosaic.SETS, help="default: cbmc_cite snare_adbrain_8lib")
    parser.add_argument("--folds", nargs="+", type=int, choices=FOLDS, default=[0])
    parser.add_argument("--rows", nargs="+", choices=ROWS, metavar="ROW", help=f"default: all; {', '.join(ROWS)}")
    parser.add_argument("--data", type=Path, default=ROOT.parent / "shared" / "data", help="folder of the .h5mu files")
    parser.add_argument("--work", type=Path, default=ROOT / ".benchmarks" / "matching", help="where runs are kept")
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args(words)
    args.sets = args.sets or (["bmmc_cite_starter"] if args.quick else ["cbmc_cite", "snare_adbrain_8lib"])
    args.rows = args.rows or (["atlas.json", TRANSDUCTIVE] if args.quick else list(ROWS))
    args.data, args.work = args.data.resolve(), args.work.resolve()
    return args


def runs_of(args: argparse.Namespace) -> list[Run]:
    return [
        Run(method_of(row), name, fold, 0, digest_of(row, name, args))
        for row in args.rows
        for fold in args.folds
        for name in args.sets
    ]


def method_of(row: str) -> str:
    """The row's name as runs and their folders are called."""
    return "ablation-" + "-".join(re.findall(r"\w+", row))


def digest_of(row: str, name: str, args: argparse.Namespace) -> str:
    settings = (*ROWS[row], *matching.overrides_of(args.quick))
    return common.digest(mosaic.data_digest(name, args.data), mosaic.sources(), row, *settings)


def do(run: Run, folder: Path, args: argparse.Namespace) -> Result:
    """One row on one split: its scores and the seconds of its training."""
    row = next(row for row in ROWS if method_of(row) == run.method)
    split = mosaic.split_of(run.data_set, run.fold, args.data, args.work)
    if row == TRANSDUCTIVE:
        split = with_test_cells(split)
    settings = (*ROWS[row], *matching.overrides_of(args.quick))
    fit_s = mosaic.ours(split, folder, run.seed, settings, args.threads, args.work)
    if digest_of(row, run.data_set, args) != run.digest:
        raise BenchmarkError("sources or cells changed while the benchmark ran", where=run.name, fix="start it again")
    return {"row": row, "fit_s": fit_s, "threads": args.threads, "scores": mosaic.scored(folder / "z.npz", split)[0]}


def with_test_cells(split: mosaic.Split) -> mosaic.Split:
    """The same split with each modality of its test cells among the training cells, under barcodes of their own."""

    def make(folder: Path) -> None:
        with mosaic.quiet():
            train, test = md.read(split.train), md.read(split.test)
            parts = {}
            for m in split.mods:
                unpaired = test[m].copy()
                unpaired.obs_names = [f"{barcode}_{m}" for barcode in unpaired.obs_names]
                parts[m] = mosaic.joined(train[m], unpaired)
            md.MuData(parts).write(folder / "train.h5mu")
            test.write(folder / "test.h5mu")

    folder = split.folder.parent / f"{split.folder.name}-transductive"
    return mosaic.Split(common.once(folder, make), split.mods)


def table(records: Sequence[Result]) -> str:
    """One row of scores for each row of the ablation on each data set."""
    groups: dict[tuple[str, str], list[Result]] = defaultdict(list)
    for record in sorted(records, key=lambda r: list(mosaic.SETS).index(r["data_set"])):
        groups[record["data_set"], record["row"]].append(record)
    rows = [["set", "row", "folds", "FOSCTTM", "match", "recall10", "fit s"]]
    for (name, row), group in groups.items():
        scores = [common.spread([r["scores"]["global"][m] for r in group], matching.DIGITS[m]) for m in METRICS]
        rows.append([name, row, str(len(group)), *scores, common.spread([r["fit_s"] for r in group], 0)])
    return common.aligned(rows)


def main() -> None:
    args = arguments()
    common.carry_out(
        args,
        runs_of(args),
        lambda run, folder: do(run, folder, args),
        matching.told,
        table,
        FOOTNOTES,
        lambda records: (),
    )


if __name__ == "__main__":
    run_main(main)
