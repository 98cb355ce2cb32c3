"""Does the joint z of unseen cells tell cell types better than one modality, and do batches mix?

.venv/bin/python -m tests.benchmarks.labels --json OUT.json [--quick] [--sets ...] [--folds ...]

Ours and the reference are the runs of `matching`; the reference, which takes long, has to be run
there first, or its rows are missing.
"""

from collections.abc import Iterator, Sequence
from itertools import product
from pathlib import Path
from typing import ClassVar

import mudata as md
import numpy as np

from tests.benchmarks import mosaic
from tests.benchmarks.factors import views
from tests.benchmarks.matching import Matching
from tests.benchmarks.mosaic import BATCHED, JOINT, LARGE, SMALL, Embedded
from tests.benchmarks.report import Result
from tests.benchmarks.runner import Benchmark, Case, Option, Run
from tests.benchmarks.split import FOLDS

SETS = [*LARGE, SMALL]
METHODS = ("ours", "counts", "reference")
COMPONENTS = 50


class Labels(Matching):
    """Cell types and batches in the embeddings of the matching benchmark, and in counts."""

    name = "labels"
    options: ClassVar = {**Matching.cells, "sets": Option(SETS, [SMALL], choices=SETS)}
    columns = ("accuracy", "transferred", "ilisi")
    list_extras = Benchmark.list_extras

    def list_cases(self) -> Iterator[Case]:
        """Every method; the reference where it has been run, and never on a quick look."""
        args = self.args
        for method, fold, name in product(METHODS, args.folds, args.sets):
            run = Run(method, name, fold, 0, self.digest(method, name))
            if method != "reference" or (not args.quick and run.read_record(args.work)):
                yield method, name, fold, 0

    def list_inputs(self, method: str, data_set: str) -> tuple[Path | str, ...]:
        if method != "counts":
            return super().list_inputs(method, data_set)
        return self.digest_data(data_set), Path(__file__), Path(views.__file__)

    def measure(self, run: Run, folder: Path) -> Result:
        if run.method != "counts":
            return super().measure(run, folder)
        split = self.cut_split(run)
        with mosaic.ignore_warnings():
            train, test = md.read(split.train), md.read(split.test)
        parts = reduce_counts(train, test, mosaic.list_pairs(split, "train"))
        named = zip(("train", "test"), parts, strict=True)
        arrays = {f"{part}_{source}": x for part, z in named for source, x in z.items()}
        np.savez(folder / "z.npz", **arrays)
        return {"fit_s": 0.0, "threads": self.args.threads}

    def describe(self, record: Result) -> str:
        return ", ".join(f"{source} {value:.3f}" for source, value in record["accuracy"].items())

    def tabulate(self, records: Sequence[Result]) -> str:
        rows = [
            r
            | {"method": f"{r['method']}, {z}"}
            | {score: r[score].get(z) for score in self.columns}
            for r in records
            for z in r["accuracy"]
        ]
        return super().tabulate(rows)

    def judge(self, records: Sequence[Result]) -> Iterator[Result]:
        """Leads over what else tells types on all folds, over the reference on common ones."""
        for name in self.args.sets:
            ours, counts = (list_folds(records, m, name, "accuracy") for m in ("ours", "counts"))
            joint, both_counts = (z.get(JOINT, {}) for z in (ours, counts))
            ours, counts = ([z.get(m, {}) for m in mosaic.SETS[name]] for z in (ours, counts))
            rivals = {
                "the better modality's counts": counts,
                "our z from the better modality": ours,
                "the best of these and both counts": [*counts, *ours, both_counts],
            }
            for what, others in rivals.items():
                whole = all(folds.keys() == set(FOLDS) for folds in (joint, *others))
                better = max(others, key=lambda folds: sum(folds.values())) if whole else {}
                leads = [joint[fold] - better[fold] for fold in better]
                yield self.bars["accuracy"].fill_name(name, what).judge_mean(leads)
        for name in filter(BATCHED.__contains__, self.args.sets):
            methods = ("ours", "reference")
            ours, theirs = (list_folds(records, m, name, "ilisi").get(JOINT, {}) for m in methods)
            leads = [ours[fold] - theirs[fold] for fold in ours.keys() & theirs.keys()]
            yield self.bars["ilisi"].fill_name(name, len(leads), len(FOLDS)).judge_mean(leads)


def reduce_counts(
    train: md.MuData, test: md.MuData, pairs: Sequence[str]
) -> tuple[Embedded, Embedded]:
    """Components of counts of paired training cells and of test cells; joint: side by side."""
    known, z = {}, {}
    for name in train.mod:
        fitted, z[name] = views.reduce_view(name, train[name].X, test[name].X, COMPONENTS)
        known[name] = fitted[train[name].obs_names.get_indexer(pairs)]
    return tuple({JOINT: np.hstack(list(alone.values()))} | alone for alone in (known, z))


def list_folds(
    records: Sequence[Result], method: str, name: str, what: str
) -> dict[str, dict[int, float]]:
    """A score by source of z, then by fold."""
    found: dict[str, dict[int, float]] = {}
    for r in records:
        if (r["method"], r["data_set"]) == (method, name):
            for source, value in r[what].items():
                found.setdefault(source, {})[r["fold"]] = value
    return found


if __name__ == "__main__":
    Labels.main()
