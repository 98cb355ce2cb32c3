"""Does the joint z of unseen cells tell cell types as well as anything else, and do batches mix?

.venv/bin/python -m tests.benchmarks.labels --json OUT.json [--quick] [--sets ...] [--folds ...]

Ours and the reference are the runs of `matching`; the reference, which takes long, has to be run
there first, or its rows are missing.
"""

import statistics
from collections import defaultdict
from collections.abc import Iterator, Sequence
from itertools import product
from pathlib import Path
from typing import ClassVar

import mudata as md
import numpy as np

from tests.benchmarks import mosaic, scores
from tests.benchmarks.commands import install_python, read_pins, run_command
from tests.benchmarks.factors import views
from tests.benchmarks.matching import PEERS, Matching
from tests.benchmarks.mosaic import JOINT, PAIRED, Embedded
from tests.benchmarks.report import Bar, Result
from tests.benchmarks.runner import Case, Option, Run
from tests.benchmarks.split import FOLDS

METHODS = ("ours", "counts", "wnn", "reference")
SEEDLESS = ("counts", "wnn")  # no random numbers: one seed stands for all
WNN = PEERS / "wnn.py"
COMPONENTS = 50


class Labels(Matching):
    """Cell types and batches in the embeddings of the matching benchmark, and in counts."""

    name = "labels"
    options: ClassVar = {**Matching.cells, "seeds": Option([0], [0])}
    columns = ("accuracy", "ilisi")

    def list_cases(self) -> Iterator[Case]:
        """Every method; those that take long to install or run only where it is no quick look.

        The reference is told where it has been run.
        """
        args = self.args
        for method, seed, fold, name in product(METHODS, args.seeds, args.folds, args.sets):
            run = Run(method, name, fold, seed, self.digest(method, name))
            if method in SEEDLESS and seed != args.seeds[0]:
                continue
            if method == "reference" and not run.read_record(args.work):
                continue
            if method in ("ours", "counts") or not args.quick:
                yield method, name, fold, seed

    def list_inputs(self, method: str, data_set: str) -> tuple[Path | str, ...]:
        if method not in SEEDLESS:
            return super().list_inputs(method, data_set)
        code = (WNN, WNN.with_suffix(".txt")) if method == "wnn" else ()
        return self.digest_data(data_set), Path(__file__), Path(views.__file__), *code

    def measure(self, run: Run, folder: Path) -> Result:
        if run.method not in SEEDLESS:
            return super().measure(run, folder)
        split = self.cut_split(run)
        with mosaic.ignore_warnings():
            z = reduce_counts(md.read(split.train), md.read(split.test))
        np.savez(folder / "z.npz", **{f"test_{source}": x for source, x in z.items()})
        if run.method == "wnn":
            python = install_python(WNN.with_suffix(".txt"), self.args.work)
            command = [python, WNN, folder / "z.npz", folder / "near.npy"]
            run_command(command, folder / "log.txt", self.args.threads)
        return {"fit_s": 0.0, "threads": self.args.threads}

    def score(self, run: Run, folder: Path) -> Result:
        if run.method != "wnn":
            return super().score(run, folder)
        cells = scores.HeldOutCells.read_from(self.cut_split(run))
        return scores.score_neighbours(np.load(folder / "near.npy"), cells.obs)

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
        """Leads of our joint z over all else that tells types, over WNN, and mixing of batches."""
        for name in self.args.sets:
            ours, counts, wnn = (
                self.collect_folds(records, m, name, "accuracy") for m in METHODS[:3]
            )
            rivals = {f"our z from {m}": ours.get(m, {}) for m in PAIRED[name]}
            rivals |= {f"counts of {m}": counts.get(m, {}) for m in PAIRED[name]}
            rivals["both counts"] = counts.get(JOINT, {})
            joint = ours.get(JOINT, {})
            if bar := self.bars.get(f"{name} accuracy"):
                yield judge_lead(bar, joint, rivals)
            yield judge_lead(self.bars["wnn"].fill_name(name), joint, {"WNN": wnn.get(JOINT, {})})
            if bar := self.bars.get(f"{name} ilisi"):
                ilisi = self.collect_folds(records, "ours", name, "ilisi").get(JOINT, {})
                yield bar.judge_mean(list(ilisi.values()) if ilisi.keys() == set(FOLDS) else [])

    def collect_folds(
        self, records: Sequence[Result], method: str, name: str, what: str
    ) -> dict[str, dict[int, float]]:
        """A score by source of z, then by fold: the mean of all seeds where all were run."""
        n_seeds = 1 if method in SEEDLESS else len(self.args.seeds)
        found: dict[str, dict[int, list[float]]] = defaultdict(lambda: defaultdict(list))
        for r in records:
            if (r["method"], r["data_set"]) == (method, name):
                for source, value in r[what].items():
                    found[source][r["fold"]].append(value)
        return {
            source: {f: statistics.fmean(v) for f, v in folds.items() if len(v) == n_seeds}
            for source, folds in found.items()
        }

    def list_extras(self) -> Result:
        return {"peers": {"wnn": read_pins(WNN.with_suffix(".txt"))}}


def judge_lead(bar: Bar, joint: dict[int, float], rivals: dict[str, dict[int, float]]) -> Result:
    """Judge how far the joint z leads the best of its rivals, each by fold; open if one lacks."""
    if not all(folds.keys() == set(FOLDS) for folds in (joint, *rivals.values())):
        return bar.fill_name("the best of the others").judge(None)
    best = max(rivals, key=lambda rival: sum(rivals[rival].values()))
    return bar.fill_name(best).judge_mean([joint[f] - rivals[best][f] for f in FOLDS])


def reduce_counts(train: md.MuData, test: md.MuData) -> Embedded:
    """Components of the counts of test cells, fitted on training cells; joint: side by side."""
    tables = {m: (train[m].X, test[m].X) for m in train.mod}
    z = {m: views.reduce_view(m, *pair, COMPONENTS)[1] for m, pair in tables.items()}
    return {JOINT: np.hstack(list(z.values()))} | z


if __name__ == "__main__":
    Labels.main()
