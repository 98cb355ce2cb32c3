"""How right are a trained model's answers about unseen cells? One modality imputed from another.

.venv/bin/python -m tests.benchmarks.answers --json OUT.json [--quick] [--sets ...] [--folds ...]

Ours asks the models that `matching` trains.
"""

from collections.abc import Iterator, Sequence
from itertools import product
from pathlib import Path
from typing import ClassVar

import mudata as md

from clue_dist.trained_run import load
from tests.benchmarks.answers import imputation
from tests.benchmarks.factors import views
from tests.benchmarks.matching import Matching, judge_lead
from tests.benchmarks.mosaic import PAIRED, ignore_warnings
from tests.benchmarks.report import Result
from tests.benchmarks.runner import Case, Option, Run

OURS = "imputed"  # by the model that `matching` calls ours
METHODS = (OURS, *imputation.RIVALS)
LARGE, SMALL = ("cbmc_cite", "snare_adbrain_8lib", "hao_mosaic"), "hao_mosaic"


class Answers(Matching):
    """Modalities imputed, scored against what was measured."""

    name = "answers"
    options: ClassVar = {
        **Matching.cells,
        "sets": Option(list(LARGE), [SMALL], choices=PAIRED),
        "seeds": Option([0], [0]),
    }
    columns = ("feature", "cell", "rmse", "coverage")

    def list_cases(self) -> Iterator[Case]:
        args = self.args
        for method, seed, fold, name in product(METHODS, args.seeds, args.folds, args.sets):
            if method == OURS or seed == 0:
                yield method, name, fold, seed

    def list_inputs(self, method: str, data_set: str) -> tuple[Path | str, ...]:
        if method not in METHODS:
            return tuple(super().list_inputs(method, data_set))
        code = (Path(__file__).parent, Path(views.__file__))
        trained = super().list_inputs("ours", data_set) if method == OURS else ()
        return self.digest_data(data_set), *code, *trained

    def measure(self, run: Run, folder: Path) -> Result:
        if run.method not in METHODS:
            return super().measure(run, folder)
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
        return ", ".join(
            f"{direction} {scores['feature']:.3f} by feature, {scores['cell']:.3f} by cell"
            for direction, scores in record["imputation"].items()
        )

    def tabulate(self, records: Sequence[Result]) -> str:
        rows = [
            record
            | {"method": f"{record['method']}, {direction}"}
            | {column: scores.get(column) for column in self.columns}
            for record in records
            for direction, scores in record["imputation"].items()
        ]
        return super().tabulate(rows)

    def judge(self, records: Sequence[Result]) -> Iterator[Result]:
        """Leads of ours over kNN regression, and how much of what is measured intervals hold."""
        for key, bar in self.bars.items():
            name, direction, score = key.split()[:3]
            path = f"imputation.{direction}.{score}"
            ours = self.average_seeds(records, OURS, name, path)
            if score == "coverage":
                yield bar.judge_mean(list(ours.values()))
            else:
                rivals = {"knn": self.average_seeds(records, "knn", name, path)}
                yield judge_lead(bar, ours, rivals)

    def list_extras(self) -> Result:
        return {}


if __name__ == "__main__":
    Answers.main()
