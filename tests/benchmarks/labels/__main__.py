"""Does the joint z of unseen cells tell cell types better than the better modality alone, and do batches mix in it?

.venv/bin/python -m tests.benchmarks.labels --json OUT.json [--quick] [--sets ...] [--folds ...]

The mosaics are those of tests.benchmarks.matching; everything is fitted on their training cells and scored on their
test cells. Embeddings are those that benchmark keeps. Ours are made if they have not been; the reference, which takes
long, has to be run there first, or its rows are missing. Runs that have been done are kept: typed again, it goes on.
"""

from __future__ import annotations

import argparse
import statistics
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import mudata as md
import numpy as np

from clue_dist.errors import run_main
from tests.benchmarks import common, matching, mosaic
from tests.benchmarks.common import Bar, Result, Run
from tests.benchmarks.factors import views
from tests.benchmarks.labels import score
from tests.benchmarks.mosaic import JOINT, Embedded
from tests.benchmarks.split import FOLDS

SETS = ("cbmc_cite", "snare_adbrain_8lib", "bmmc_cite_starter")
NO_TYPES = ("Mouse", "Multiplets", "T/Mono doublets", "Mis")  # labels that name no cell type
METHODS = {"ours": "ours", "counts": "counts", "reference": "reference"}
SCORES = {"accuracy": "accuracy", "transferred": "from training", "ilisi": "iLISI"}
COMPONENTS = 50

FOOTNOTES = """\
test cells of a fold, mean ± standard deviation over folds; 15 nearest neighbours, the majority's label
accuracy: by 5-fold cross-validation among the test cells; from training: neighbours are the paired training cells
iLISI: how batches mix, 0 to 1, where there are batches
counts: PCA of log CP10k (rna), of CLR (adt), LSI of TF-IDF (atac), 50 components, side by side for joint
reference: the authors' CLUE as tests.benchmarks.matching has run it; its joint z is the mean of its two"""


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
    here = common.digest(Path(__file__).parent, Path(views.__file__))
    code = {"ours": (matching.code_of("ours", args.quick),), "counts": (), "reference": ()}
    return [
        Run(f"labels-{method}", name, fold, 0, common.digest(here, mosaic.data_digest(name, args.data), *code[method]))
        for method in METHODS
        for fold in args.folds
        for name in args.sets
        if method != "reference" or (not args.quick and matched("reference", name, fold, args).record(args.work))
    ]


def matched(method: str, name: str, fold: int, args: argparse.Namespace) -> Run:
    """The run of the matching benchmark that embeds a fold with a method."""
    return Run(method, name, fold, 0, matching.digest_of(method, name, args))


def do(run: Run, folder: Path, args: argparse.Namespace) -> Result:
    """One method on one fold: its scores by source of z."""
    split = mosaic.split_of(run.data_set, run.fold, args.data, args.work)
    with md.set_options(pull_on_update=False), warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # genes and antibodies may share names
        train, test = md.read(split.train), md.read(split.test)
    first = split.mods[0]
    pairs = mosaic.pairs_of(split, "train")
    known: Embedded = {}
    if run.method == "labels-counts":
        known, z = counts(train, test, pairs)
    else:
        method = run.method.removeprefix("labels-")
        embedding = matched(method, run.data_set, run.fold, args)
        common.done(embedding, args.work, lambda run, folder: matching.do(run, folder, args))
        npz = embedding.folder(args.work) / "z.npz"
        if method == "ours":
            known, z = (mosaic.kept(npz, part, (JOINT, *split.mods)) for part in ("train", "test"))
        else:
            z = reference(npz, split.mods)
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
    u = [x / np.linalg.norm(x, axis=1, keepdims=True) for x in (arrays["u1"], arrays["u2"])]
    return {JOINT: (u[0] + u[1]) / 2} | dict(zip(mods, u, strict=True))


def scored(z: Embedded, known: Embedded, obs: Any, known_obs: Any) -> Result:
    """Each score by source of z. obs, known_obs: tables of the test and of the paired training cells."""
    keep, known_keep = (~o["cell_type"].isin(NO_TYPES).to_numpy() for o in (obs, known_obs))
    label, known_label = (o["cell_type"].astype(str).to_numpy() for o in (obs, known_obs))
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


def values(records: Sequence[Result], method: str, name: str, what: str) -> dict[str, list[float]]:
    """A score of each fold, by source of z."""
    mine = [r[what] for r in records if (r["method"], r["data_set"]) == (f"labels-{method}", name)]
    return {source: [r[source] for r in mine] for source in mine[0]} if mine else {}


def table(records: Sequence[Result]) -> str:
    rows = [["set", "method", "z from", "folds", *SCORES.values()]]
    for name in dict.fromkeys(r["data_set"] for r in records):
        for method in METHODS:
            by_score = {what: values(records, method, name, what) for what in SCORES}
            for source, folds in by_score["accuracy"].items():
                cells = [common.spread(v[source], 3) if source in v else "" for v in by_score.values()]
                rows.append([name, METHODS[method], source, str(len(folds)), *cells])
    return common.aligned(rows)


def bars_of(records: Sequence[Result], args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Over all five folds; bars stay open where not all were run, and on a quick look."""

    def mean(method: str, name: str, what: str, source: str) -> float | None:
        got = values(records, method, name, what).get(source, [])
        return statistics.fmean(got) if len(got) == len(FOLDS) and not args.quick else None

    for name in args.sets:
        lead = [
            _minus(mean("ours", name, "accuracy", JOINT), mean("counts", name, "accuracy", m))
            for m in mosaic.SETS[name]
        ]
        worst = None if None in lead else min(lead)
        yield Bar(f"{name}: accuracy of our joint z minus the better modality's", ">", 0.0).judged(worst)
    for name in (n for n in args.sets if n == "snare_adbrain_8lib"):
        lead = _minus(mean("ours", name, "ilisi", JOINT), mean("reference", name, "ilisi", JOINT))
        yield Bar(f"{name}: iLISI of our joint z minus the reference's", ">=", 0.0).judged(lead)


def _minus(a: float | None, b: float | None) -> float | None:
    return None if a is None or b is None else a - b


def main() -> None:
    args = arguments()
    common.carry_out(
        args,
        runs_of(args),
        do,
        told,
        table,
        FOOTNOTES,
        lambda records: bars_of(records, args),
    )


if __name__ == "__main__":
    run_main(main)
