"""Does the joint z of unseen cells tell cell types better than the better modality alone, and do batches mix in it?

.venv/bin/python -m tests.benchmarks.labels --json OUT.json [--quick] [--sets ...] [--folds ...]

The mosaics are those of tests.benchmarks.matching; everything is fitted on their training cells and scored on their
test cells. Embeddings are those that benchmark keeps. Ours are made if they have not been; the reference, which takes
long, has to be run there first, or its rows are missing. Runs that have been done are kept: typed again, it goes on.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import mudata as md
import numpy as np
import pandas as pd
from sklearn.preprocessing import normalize

from clue_dist.process import run_main
from tests.benchmarks import common, matching, mosaic
from tests.benchmarks.common import Bar, Result, Run, Steps
from tests.benchmarks.factors import views
from tests.benchmarks.labels import score
from tests.benchmarks.mosaic import JOINT, Embedded
from tests.benchmarks.split import FOLDS

SETS = ("cbmc_cite", "snare_adbrain_8lib", "bmmc_cite_starter")
MIXED = tuple(name for name in SETS if name in mosaic.BATCHED)
METHODS = ("ours", "counts", "reference")
SCORES = {"accuracy": "accuracy", "transferred": "from training", "ilisi": "iLISI"}
COMPONENTS = 50

FOOTNOTES = """\
test cells of a fold, mean ± standard deviation over folds; 15 nearest neighbours, the majority's label; labels that
name no type (mouse cells, multiplets, unassigned) are left out
joint z is judged against both the better modality's counts and our own z from the better modality; ±: of the lead
accuracy: by 5-fold cross-validation among the test cells; from training: neighbours are the paired training cells
iLISI: how batches mix, 0 to 1, where there are batches
counts: PCA of log CP10k (rna), of CLR (adt), LSI of TF-IDF (atac), 50 components, side by side for joint
reference: the authors' CLUE as tests.benchmarks.matching has run it; its joint z is the mean of its two, scaled to
length 1; iLISI is compared on the folds that both have run"""


def arguments(words: Sequence[str] | None = None) -> argparse.Namespace:
    parser = mosaic.parser("labels", __doc__)
    parser.add_argument("--sets", nargs="+", choices=SETS, help="default: all")
    parser.add_argument("--folds", nargs="+", type=int, choices=FOLDS, help="default: all five")
    args = parser.parse_args(words)
    args.sets = args.sets or (["bmmc_cite_starter"] if args.quick else list(SETS))
    args.folds = args.folds or ([0] if args.quick else list(FOLDS))
    return args


def runs_of(args: argparse.Namespace) -> list[Run]:
    """The reference's where it has been run, and quick looks aside."""
    return [
        Run(f"labels-{method}", name, fold, 0, digest_of(method, name, fold, args))
        for method in METHODS
        for fold in args.folds
        for name in args.sets
        if method != "reference"
        or (not args.quick and matched("reference", name, fold, args).record(args.work))
    ]


def digest_of(method: str, name: str, fold: int, args: argparse.Namespace) -> str:
    """Of the cells, the code that scores them, and what their embedding follows from."""
    here = (Path(__file__).parent, Path(views.__file__), Path(mosaic.__file__))
    embedding = "" if method == "counts" else matched(method, name, fold, args).digest
    return common.digest(*here, mosaic.data_digest(name, args.data), embedding)


def matched(method: str, name: str, fold: int, args: argparse.Namespace) -> Run:
    """The run of the matching benchmark that embeds a fold with a method."""
    return Run(method, name, fold, 0, matching.digest_of(method, name, args))


def do(run: Run, folder: Path, args: argparse.Namespace) -> Result:
    """One method on one fold: its scores by source of z."""
    split = mosaic.split_of(run.data_set, run.fold, args.data, args.work)
    with mosaic.quiet():
        train, test = md.read(split.train), md.read(split.test)
    first, method = split.mods[0], run.method.removeprefix("labels-")
    pairs = mosaic.pairs_of(split, "train")
    known: Embedded = {}
    if method == "counts":
        known, z = counts(train, test, pairs)
    else:
        embedding = matched(method, run.data_set, run.fold, args)
        common.done(embedding, args.work, matching.steps_of(args))
        npz = embedding.folder(args.work) / "z.npz"
        if method == "ours":
            known, z = (mosaic.kept(npz, part, (JOINT, *split.mods)) for part in ("train", "test"))
        else:
            z = reference(npz, split.mods)
    common.unchanged(run, digest_of(method, run.data_set, run.fold, args))
    return scored(z, known, test[first].obs, train[first].obs.loc[pairs])


def counts(train: md.MuData, test: md.MuData, pairs: Sequence[str]) -> tuple[Embedded, Embedded]:
    """Components of each modality's normalised counts, and all side by side: of paired training and of test cells."""
    known, z = {}, {}
    for name in train.mod:
        fitted, z[name] = views.components(name, train[name].X, test[name].X, COMPONENTS)
        known[name] = fitted[train[name].obs_names.get_indexer(pairs)]
    return tuple({JOINT: np.hstack(list(alone.values()))} | alone for alone in (known, z))


def reference(npz: Path, mods: tuple[str, str]) -> Embedded:
    arrays = np.load(npz)
    u = [normalize(arrays[name]) for name in ("u1", "u2")]
    return {JOINT: normalize(u[0] + u[1])} | dict(zip(mods, u, strict=True))


def scored(z: Embedded, known: Embedded, obs: pd.DataFrame, known_obs: pd.DataFrame) -> Result:
    """Each score by source of z. obs, known_obs: tables of the test and of the paired training cells."""
    (keep, label), (known_keep, known_label) = score.typed(obs), score.typed(known_obs)
    batch = obs["batch"].astype(str).to_numpy()[keep] if "batch" in obs else None
    out: Result = {name: {} for name in SCORES}
    for source, x in z.items():
        out["accuracy"][source] = score.accuracy(x[keep], label[keep])
        if source in known:
            cells = known[source][known_keep], known_label[known_keep]
            out["transferred"][source] = score.transferred(*cells, x[keep], label[keep])
        if batch is not None:
            out["ilisi"][source] = score.ilisi(x[keep], batch)
    return out


def told(record: Result) -> str:
    return ", ".join(f"{source} {value:.3f}" for source, value in record["accuracy"].items())


def values(
    records: Sequence[Result], method: str, name: str, what: str
) -> dict[str, dict[int, float]]:
    """A score of each fold, by source of z."""
    mine = {
        r["fold"]: r[what]
        for r in records
        if (r["method"], r["data_set"]) == (f"labels-{method}", name)
    }
    sources = dict.fromkeys(source for by_source in mine.values() for source in by_source)
    return {
        source: {fold: by_source[source] for fold, by_source in mine.items()} for source in sources
    }


def table(records: Sequence[Result]) -> str:
    rows = [["set", "method", "z from", "folds", *SCORES.values()]]
    for name in dict.fromkeys(r["data_set"] for r in records):
        for method in METHODS:
            by_score = {what: values(records, method, name, what) for what in SCORES}
            for source, folds in by_score["accuracy"].items():
                cells = [
                    common.spread(list(v[source].values()), 3) if source in v else ""
                    for v in by_score.values()
                ]
                rows.append([name, method, source, str(len(folds)), *cells])
    return common.aligned(rows)


def bars_of(records: Sequence[Result], args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Open where not all was run that a bar is about, and on a quick look."""
    records = [] if args.quick else records
    for name in args.sets:
        joint = values(records, "ours", name, "accuracy").get(JOINT, {})
        for method, what in (
            ("counts", "the better modality's counts"),
            ("ours", "our z from the better modality"),
        ):
            alone = values(records, method, name, "accuracy")
            of = [alone.get(m, {}) for m in mosaic.SETS[name]]
            complete = all(folds.keys() == set(FOLDS) for folds in (joint, *of))
            better = max(of, key=lambda folds: statistics.fmean(folds.values())) if complete else {}
            bar = Bar(f"{name}: accuracy of our joint z minus that of {what}", ">", 0.0)
            yield bar.over([joint[fold] - better[fold] for fold in better])
    for name in (n for n in args.sets if n in MIXED):
        ours, reference = (
            values(records, m, name, "ilisi").get(JOINT, {}) for m in ("ours", "reference")
        )
        leads = [ours[fold] - reference[fold] for fold in ours.keys() & reference.keys()]
        title = f"{name}: iLISI of our joint z minus the reference's, {len(leads)} of {len(FOLDS)} folds"
        yield Bar(title, ">=", 0.0).over(leads)


def main() -> None:
    args = arguments()
    common.carry_out(
        args,
        runs_of(args),
        Steps(lambda run, folder: do(run, folder, args)),
        told,
        table,
        FOOTNOTES,
        lambda records: bars_of(records, args),
    )


if __name__ == "__main__":
    run_main(main)
