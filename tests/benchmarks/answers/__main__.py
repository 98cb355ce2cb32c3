"""How right are a trained model's answers about unseen cells? Values imputed, labels carried over.

.venv/bin/python -m tests.benchmarks.answers --json OUT.json [--quick] [--sets ...] [--folds ...]

Ours asks the models that `matching` trains.
"""

from collections.abc import Iterable, Iterator, Sequence
from functools import partial
from itertools import product
from pathlib import Path
from typing import ClassVar

import mudata as md

from clue_dist.trained_run import load
from tests.benchmarks.answers import imputation, markers, transfer
from tests.benchmarks.commands import install_python
from tests.benchmarks.factors import views
from tests.benchmarks.matching import Matching, judge_lead
from tests.benchmarks.mosaic import PAIRED, ignore_warnings
from tests.benchmarks.report import Result
from tests.benchmarks.runner import Case, Option, Run

OURS = "imputed"  # by the model that `matching` calls ours
TRANSFER = "transfer"  # of labels, by the same model
MARKERS = "markers"  # of cell types, by the same model
MODELLED = (OURS, TRANSFER, MARKERS)
METHODS = (*MODELLED, *imputation.RIVALS)
LARGE, SMALL = ("cbmc_cite", "snare_adbrain_8lib", "hao_mosaic"), "hao_mosaic"


class Answers(Matching):
    """Modalities imputed and labels carried over, scored against what was measured."""

    name = "answers"
    options: ClassVar = {
        **Matching.cells,
        "sets": Option(list(LARGE), [SMALL], choices=PAIRED),
        "seeds": Option([0], [0]),
        "methods": Option(
            [*METHODS],
            [method for method in METHODS if method != MARKERS],  # whose installation takes minutes
            "imputed, transfer, markers: ours",
            METHODS,
        ),
    }
    columns = ("feature", "cell", "rmse", "coverage", "accuracy", "calibration_error")
    columns += ("auroc", "unknown", "kept", "at_kept", "overlap")

    def list_cases(self) -> Iterator[Case]:
        args = self.args
        for method, seed, fold, name in product(args.methods, args.seeds, args.folds, args.sets):
            if method in MODELLED or seed == 0:
                yield method, name, fold, seed

    def list_inputs(self, method: str, data_set: str) -> tuple[Path | str, ...]:
        if method not in METHODS:
            return tuple(super().list_inputs(method, data_set))
        code = (Path(__file__).parent, Path(views.__file__))
        code += (markers.SCRIPT, markers.PINS) if method == MARKERS else ()
        trained = super().list_inputs("ours", data_set) if method in MODELLED else ()
        return self.digest_data(data_set), *code, *trained

    def measure(self, run: Run, folder: Path) -> Result:
        if run.method not in METHODS:
            return super().measure(run, folder)
        if run.method == TRANSFER:
            return {TRANSFER: self.carry_labels(run), "threads": self.args.threads}
        if run.method == MARKERS:
            return {MARKERS: self.compare_markers(run, folder), "threads": self.args.threads}
        split, found = self.cut_split(run), {}
        with ignore_warnings():
            train, test = md.read(split.train), md.read(split.test)
            trained = load(self.find_model(run)) if run.method == OURS else None
            for source, target in imputation.list_directions(split.mods):
                truth = imputation.log_normalise(test[target].X)
                if trained is None:
                    predicted = imputation.predict_simply(run.method, train, test, source, target)
                else:
                    predicted = imputation.predict_by_run(trained, test, source, target)
                scores = imputation.score_prediction(predicted, truth)
                if trained is not None:
                    scores["coverage"] = imputation.measure_coverage(trained, test, source, target)
                found[f"{source}-{target}"] = scores
        return {"imputation": found, "threads": self.args.threads}

    def compare_markers(self, run: Run, folder: Path) -> Result:
        """How many of the first features of types scanpy names, too."""
        rank_features = partial(
            markers.rank_by_scanpy,
            python=install_python(markers.PINS, self.args.work),
            folder=folder,
            threads=self.args.threads,
        )
        with ignore_warnings():
            cells, model = md.read(self.cut_split(run).test), load(self.find_model(run))
            return dict(markers.score_markers(model, cells, rank_features))

    def carry_labels(self, run: Run) -> Result:
        """Scores of labels, by what queries are seen through."""
        split, model = self.cut_split(run), load(self.find_model(run))
        with ignore_warnings():
            reference, queries = (
                transfer.LabelledCells.embed_with(model, md.read(part))
                for part in (split.train, split.test)
            )
        return dict(transfer.score_transfer(reference, queries))

    def find_model(self, run: Run) -> Path:
        """The model of `matching`, trained unless it is kept."""
        args = self.args
        digest = self.digest("ours", run.data_set)
        training = Run("ours", run.data_set, run.fold, run.seed, digest)
        self.obtain(training)
        return training.folder(args.work) / "run"

    def score(self, run: Run, folder: Path) -> Result:
        return {} if run.method in METHODS else super().score(run, folder)

    def describe(self, record: Result) -> str:
        titles = {"feature": "by feature", "cell": "by cell"}
        titles |= {"calibration_error": "calibration error", "unknown": "unknown", "kept": "kept"}
        titles |= {"overlap": "of the first features shared"}
        return ", ".join(
            " ".join(
                [part, *(f"{scores[s]:.3f} {name}" for s, name in titles.items() if s in scores)]
            )
            for part, scores in list_parts(record)
        )

    def tabulate(self, records: Sequence[Result]) -> str:
        rows = [
            record
            | {"method": f"{record['method']}, {part}"}
            | {column: scores.get(column) for column in self.columns}
            for record in records
            for part, scores in list_parts(record)
        ]
        return super().tabulate(rows)

    def judge(self, records: Sequence[Result]) -> Iterator[Result]:
        """Leads of ours over kNN regression, coverage of intervals, and what labels are worth."""
        for key, bar in self.bars.items():
            name, part, score = key.split()[:3]
            method, kind = (OURS, "imputation") if "-" in part else (TRANSFER, TRANSFER)
            path = f"{kind}.{part}.{score}"
            ours = self.average_seeds(records, method, name, path)
            if score not in ("feature", "cell"):
                yield bar.judge_mean(list(ours.values()))
            else:
                rivals = {"knn": self.average_seeds(records, "knn", name, path)}
                yield judge_lead(bar, ours, rivals)

    def list_extras(self) -> Result:
        return {}


def list_parts(record: Result) -> Iterable[tuple[str, Result]]:
    """The scores of a record by direction, or by what queries are seen through."""
    found = next(record[kind] for kind in ("imputation", TRANSFER, MARKERS) if kind in record)
    return found.items()


if __name__ == "__main__":
    Answers.main()
