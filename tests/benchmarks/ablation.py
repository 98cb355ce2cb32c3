"""What each part of the recipe is worth: the paper's Table 5 on real cells, and the choices beyond it.

.venv/bin/python -m tests.benchmarks.ablation --json OUT.json [--quick] [--sets ...] [--folds ...] [--rows ...]

Every row trains configs/atlas.json with a few settings changed on the mosaics of tests.benchmarks.matching and is
scored like there. Runs that have been done are kept: typed again, it goes on.
"""

from __future__ import annotations

import argparse
import math
import re
import statistics
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import mudata as md
import numpy as np
import scipy.sparse as sp

from clue_dist import matching as matching_scores
from clue_dist.config import ModelConfig, load
from clue_dist.errors import run_main
from clue_dist.matching import METRICS
from clue_dist.model.clue import CLUE, ModalitySpec
from tests.benchmarks import common, matching, mosaic
from tests.benchmarks.common import BenchmarkError, Result, Run
from tests.benchmarks.split import FOLDS, paired
from tests.distributed.command import ROOT


@dataclass(frozen=True)
class Cells:
    """A split, and the data set it was cut from."""

    mods: tuple[str, str]
    train: md.MuData
    test: md.MuData
    whole: md.MuData


# The paper's losses and posterior alone, each ELBO a mean per feature as in the reference, where weights of one are of
# its order.
PAPER = (
    "objective.lambda_contrastive=0",
    "objective.per_feature=true",
    "objective.lambda_self=1",
    "model.posterior=poe",
)
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
    "posterior poe (eq. 6)": ("model.posterior=poe",),
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
OTHER_CELLS: dict[str, Callable[[Cells], md.MuData]] = {
    TRANSDUCTIVE: lambda cells: with_test_cells(cells),
    "no unpaired cells": lambda cells: of_pairs(cells, halved=False, unpaired=False),
    "half the pairs": lambda cells: of_pairs(cells, halved=True, unpaired=True),
    "half the pairs, no unpaired cells": lambda cells: of_pairs(cells, halved=True, unpaired=False),
    "every partner known": lambda cells: all_paired(cells),
}
COUNTED_ANEW = "proteins, counted anew"
ROWS: dict[str, tuple[str, ...]] = TABLE_5 | BEYOND | dict.fromkeys([*OTHER_CELLS, COUNTED_ANEW], ())

# Rows with ever twice as many pairs, and what they lead to.
DOUBLINGS = ("half the pairs, no unpaired cells", "no unpaired cells", "every partner known")
EXTRAPOLATED = "ever more pairs, extrapolated"
COUNTS_OF_MODALITIES = (2, 3, 4, 8)

FOOTNOTES = """\
mean ± standard deviation over folds; one seed; scores over all test cells of a fold
paper: the named terms of eq. 15 at weight 1, ELBOs per feature, no contrastive term; the trunks are those of atlas.json
test cells too, unpaired: each modality of the test cells joins the training set as if no partner were known
no unpaired cells: half of the training cells are left; every partner known: all of them are pairs
ever more pairs: the limit of 20, 40 and 80% of the cells as pairs, if every doubling gains as the last two did
proteins, counted anew: no training; each test cell's protein counts against a Poisson draw around them, as from a
matcher that knows every true level: counting noise alone allows no more"""


def arguments(words: Sequence[str] | None = None) -> argparse.Namespace:
    parser = mosaic.parser("ablation", __doc__)
    parser.add_argument("--sets", nargs="+", choices=mosaic.SETS, help="default: cbmc_cite snare_adbrain_8lib")
    parser.add_argument("--folds", nargs="+", type=int, choices=FOLDS, default=[0])
    parser.add_argument("--rows", nargs="+", choices=ROWS, metavar="ROW", help=f"default: all; {', '.join(ROWS)}")
    args = parser.parse_args(words)
    args.sets = args.sets or (["bmmc_cite_starter"] if args.quick else ["cbmc_cite", "snare_adbrain_8lib"])
    args.rows = args.rows or (["atlas.json", TRANSDUCTIVE] if args.quick else list(ROWS))
    return args


def runs_of(args: argparse.Namespace) -> list[Run]:
    return [
        Run(method_of(row), name, fold, 0, digest_of(row, name, args))
        for row in args.rows
        for fold in args.folds
        for name in args.sets
        if row != COUNTED_ANEW or mosaic.SETS[name][1] == "adt"
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
    if row == COUNTED_ANEW:
        with mosaic.quiet():
            proteins = md.read(split.test)[split.mods[1]].X
        return {"row": row, "fit_s": 0.0, "threads": args.threads, "scores": counted_anew(proteins, run.fold)}
    if row in OTHER_CELLS:
        split = changed(split, row, args.data)
    settings = (*ROWS[row], *matching.overrides_of(args.quick))
    fit_s = mosaic.ours(split, folder, run.seed, settings, args.threads, args.work)
    if digest_of(row, run.data_set, args) != run.digest:
        raise BenchmarkError("sources or cells changed while the benchmark ran", where=run.name, fix="start it again")
    return {"row": row, "fit_s": fit_s, "threads": args.threads, "scores": mosaic.scored(folder / "z.npz", split)[0]}


def changed(split: mosaic.Split, row: str, data: Path) -> mosaic.Split:
    """The same test cells, with the training cells of a row of OTHER_CELLS."""

    def make(folder: Path) -> None:
        with mosaic.quiet():
            cells = Cells(split.mods, *(md.read(p) for p in (split.train, split.test, mosaic.source_of(name, data))))
            OTHER_CELLS[row](cells).write(folder / "train.h5mu")
            cells.test.write(folder / "test.h5mu")

    name = split.folder.parent.name.rpartition("-")[0]
    folder = split.folder.parent / f"{split.folder.name}-{method_of(row)}"
    return mosaic.Split(common.once(folder, make), split.mods)


def with_test_cells(cells: Cells) -> md.MuData:
    """Each modality of the test cells among the training cells, under barcodes of their own."""
    parts = {}
    for m in cells.mods:
        unpaired = cells.test[m].copy()
        unpaired.obs_names = [f"{barcode}_{m}" for barcode in unpaired.obs_names]
        parts[m] = mosaic.joined(cells.train[m], unpaired)
    return md.MuData(parts)


def of_pairs(cells: Cells, halved: bool, unpaired: bool) -> md.MuData:
    """All of the pairs or every other one, with the unpaired cells or without."""
    first, second = (cells.train[m].obs_names for m in cells.mods)
    pairs = first.intersection(second).sort_values()
    dropped = pairs[1::2] if halved else pairs[:0]
    tables = {m: cells.train[m] for m in cells.mods}
    keep = {m: ~t.obs_names.isin(dropped) & (unpaired | t.obs_names.isin(pairs)) for m, t in tables.items()}
    return md.MuData({m: t[keep[m]].copy() for m, t in tables.items()})


def all_paired(cells: Cells) -> md.MuData:
    """Every training cell with both of its modalities."""
    tables = dict(zip(cells.mods, paired(cells.whole, cells.mods), strict=True))
    keep = ~tables[cells.mods[0]].obs_names.isin(cells.test[cells.mods[0]].obs_names)
    return md.MuData({m: t[keep].copy() for m, t in tables.items()})


def counted_anew(counts: sp.csr_matrix, seed: int) -> matching_scores.Scores:
    """How well counts (cells, features) find a Poisson draw with themselves as rates, by Euclidean distance of square
    roots, on which scale every count has the same noise."""
    rates = counts.toarray().astype(float)
    roots = [np.sqrt(x + 3 / 8) for x in (rates, np.random.default_rng(seed).poisson(rates))]
    far = np.full((len(rates), 1), 1e3 * np.abs(roots[0]).max())  # seen from there, cosines are distances
    return matching_scores.scores(*(np.hstack([x, far]) for x in roots), np.zeros(len(rates)))


def limit(values: Sequence[float]) -> float:
    """Where three values lead whose differences shrink by the same factor each time; NaN if they do not shrink."""
    first, second, third = values
    ratio = (third - second) / (second - first)
    return third + (third - second) * ratio / (1 - ratio) if 0 <= ratio < 1 else math.nan


def table(records: Sequence[Result]) -> str:
    """One row of scores for each row of the ablation on each data set."""
    groups: dict[tuple[str, str], list[Result]] = defaultdict(list)
    for record in sorted(records, key=lambda r: list(mosaic.SETS).index(r["data_set"])):
        groups[record["data_set"], record["row"]].append(record)
    rows = [["set", "row", "folds", "FOSCTTM", "match", "recall10", "fit s"]]
    for (name, row), group in groups.items():
        scores = [common.spread([score(r, m) for r in group], matching.DIGITS[m]) for m in METRICS]
        rows.append([name, row, str(len(group)), *scores, common.spread([r["fit_s"] for r in group], 0)])
    for name in dict.fromkeys(name for name, _ in groups):
        if all((name, row) in groups for row in DOUBLINGS):
            steps = [[statistics.fmean(score(r, m) for r in groups[name, row]) for row in DOUBLINGS] for m in METRICS]
            limits = [f"{limit(step):.{matching.DIGITS[m]}f}" for m, step in zip(METRICS, steps, strict=True)]
            rows.append([name, EXTRAPOLATED, "", *limits, ""])
    return f"{common.aligned(rows)}\n\n{parameters()}"


def parameters() -> str:
    """Millions of parameters of the encoders of atlas.json, projections aside, as modalities become more."""
    rows = [["million parameters of the encoders", *(f"K = {k}" for k in COUNTS_OF_MODALITIES)]]
    for name, shared in (("one trunk a modality", True), ("separate encoders", False)):
        model = load(ROOT / "configs/atlas.json", [f"model.trunk.shared={str(shared).lower()}"]).model
        counts = [encoder_parameters(k, model) for k in COUNTS_OF_MODALITIES]
        rows.append([name, *(f"{n / 1e6:.2f}" for n in counts)])
    return common.aligned(rows)


def encoder_parameters(k: int, model: ModelConfig) -> int:
    """Of the trunks behind their projections, and of the heads."""
    spec = ModalitySpec(n_features=model.trunk.projection, normalise="log", likelihood="nb", features_per_step=None)
    clue = CLUE({f"m{i}": spec for i in range(k)}, 1, model)
    parts = [clue.heads, *(clue.trunk(name).ensemble for name in clue.names)]
    return sum(p.numel() for part in parts for p in part.parameters())


def score(record: Result, metric: str) -> float:
    return record["scores"]["global"][metric]


def main() -> None:
    args = arguments()
    common.carry_out(
        args,
        runs_of(args),
        do,
        matching.told,
        table,
        FOOTNOTES,
        lambda records: (),
    )


if __name__ == "__main__":
    run_main(main)
