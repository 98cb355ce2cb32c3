"""Does the joint z of unseen cells tell cell types as well as anything else, and do batches mix?

.venv/bin/python -m tests.benchmarks.labels --json OUT.json [--quick] [--sets ...] [--folds ...]

Ours and the other models are the runs of `matching`; these, which take long, have to be run there
first, or their rows are missing.
"""

from collections.abc import Iterator, Sequence
from itertools import product
from pathlib import Path
from typing import ClassVar

import mudata as md
import numpy as np

from tests.benchmarks import mosaic, scores
from tests.benchmarks.commands import install_python, read_pins, run_command
from tests.benchmarks.factors import views
from tests.benchmarks.matching import PEERS, SEEDLESS, Matching, applies_to, judge_lead
from tests.benchmarks.mosaic import JOINT, PAIRED, Embedded
from tests.benchmarks.report import Result
from tests.benchmarks.runner import Case, Option, Run

MODELS = ("reference", "multivi", "totalvi", "multigrate", "midas")
METHODS = ("ours", "counts", "wnn", *MODELS)
WNN = PEERS / "wnn.py"
COMPONENTS = 50


class Labels(Matching):
    """Cell types and batches in the embeddings of the matching benchmark, and in counts."""

    name = "labels"
    options: ClassVar = {
        **Matching.cells,
        "seeds": Option([0], [0]),
        "methods": Option(
            [*METHODS], [*METHODS[:2]], "other models where matching has run them", METHODS
        ),
    }
    columns = ("accuracy", "ilisi", "ilisi_random")

    def list_cases(self) -> Iterator[Case]:
        """Every method, but once where it takes no seed; other models where they have been run."""
        args = self.args
        for method, seed, fold, name in product(args.methods, args.seeds, args.folds, args.sets):
            if not applies_to(method, name) or (method in SEEDLESS and seed != 0):
                continue
            run = Run(method, name, fold, seed, self.digest(method, name))
            if method not in MODELS or run.read_record(args.work):
                yield method, name, fold, seed

    def list_inputs(self, method: str, data_set: str) -> tuple[Path | str, ...]:
        if method not in METHODS[1:3]:
            return super().list_inputs(method, data_set)
        code = (WNN, WNN.with_suffix(".txt")) if method == "wnn" else ()
        return self.digest_data(data_set), Path(__file__), Path(views.__file__), *code

    def measure(self, run: Run, folder: Path) -> Result:
        if run.method not in METHODS[1:3]:
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
            | {score: r.get(score, {}).get(z) for score in self.columns}
            for r in records
            for z in r["accuracy"]
        ]
        return super().tabulate(rows)

    def judge(self, records: Sequence[Result]) -> Iterator[Result]:
        """Leads of our joint z over all else that tells types, over WNN, and mixing of batches."""
        for name in self.args.sets:
            ours, both, wnn = (
                self.average_seeds(records, m, name, f"accuracy.{JOINT}") for m in METHODS[:3]
            )
            rivals = {
                f"{'our z' if m == 'ours' else m} of {source}": self.average_seeds(
                    records, m, name, f"accuracy.{source}"
                )
                for m, source in product(METHODS[:2], PAIRED[name])
            }
            if bar := self.bars.get(f"{name} accuracy"):
                yield judge_lead(bar, ours, {**rivals, "both counts": both})
            yield judge_lead(self.bars["wnn"].fill_name(name), ours, {"WNN": wnn})
            if bar := self.bars.get(f"{name} ilisi"):
                ilisi = self.average_seeds(records, "ours", name, f"ilisi.{JOINT}")
                yield bar.judge_mean(list(ilisi.values()))

    def list_extras(self) -> Result:
        return {"peers": {"wnn": read_pins(WNN.with_suffix(".txt"))}}


def reduce_counts(train: md.MuData, test: md.MuData) -> Embedded:
    """Components of the counts of test cells, fitted on training cells; joint: side by side."""
    tables = {m: (train[m].X, test[m].X) for m in train.mod}
    z = {m: views.reduce_view(m, *pair, COMPONENTS)[1] for m, pair in tables.items()}
    return {JOINT: np.hstack(list(z.values()))} | z


if __name__ == "__main__":
    Labels.main()
