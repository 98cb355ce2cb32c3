"""How right are a trained model's answers about unseen cells? Values imputed, labels carried over.

.venv/bin/python -m tests.benchmarks.answers --json OUT.json [--quick] [--sets ...] [--folds ...]

Ours, totalVI and MultiVI are asked as `matching` trains them.
"""

from collections.abc import Iterable, Iterator, Sequence
from functools import partial
from itertools import product
from pathlib import Path
from typing import ClassVar

import mudata as md

from clue_dist.api.trained_run import load
from tests.benchmarks.answers import imputation, markers, transfer
from tests.benchmarks.commands import install_python
from tests.benchmarks.factors import views
from tests.benchmarks.matching import KNOWN, SEEDLESS, Matching, applies_to, judge_lead
from tests.benchmarks.mosaic import PAIRED, ignore_warnings
from tests.benchmarks.report import Result
from tests.benchmarks.runner import Case, Option, Run

OURS = "imputed"  # by the model that `matching` calls ours
TRANSFER = "transfer"  # of labels, by the same model
MARKERS = "markers"  # of cell types, by the same model
IMPUTATION = "imputation"  # what a record calls scores of imputed values, by whom ever
QUICK = (OURS, TRANSFER, *imputation.RIVALS)  # the others take minutes to install
METHODS = (*QUICK, MARKERS, *KNOWN)
# The method of `matching` whose model is asked.
TRAINED = dict.fromkeys((OURS, TRANSFER, MARKERS), "ours") | {name: name for name in KNOWN}
LARGE, SMALL = ("cbmc_cite", "snare_adbrain_8lib", "hao_mosaic"), "hao_mosaic"


class Answers(Matching):
    """Modalities imputed and labels carried over, scored against what was measured."""

    name = "answers"
    options: ClassVar = {
        **Matching.cells,
        "sets": Option(list(LARGE), [SMALL], choices=PAIRED),
        "seeds": Option([0], [0]),
        "methods": Option([*METHODS], [*QUICK], "imputed, transfer, markers: ours", METHODS),
    }
    score_sources = ()  # `measure` scores
    columns = ("feature", "cell", "rmse", "coverage", "accuracy", "calibration_error")
    columns += ("auroc", "unknown", "kept", "at_kept", "overlap")

    def list_cases(self) -> Iterator[Case]:
        args = self.args
        for method, seed, fold, name in product(args.methods, args.seeds, args.folds, args.sets):
            if applies_to(method, name) and (method not in SEEDLESS or seed == 0):
                yield method, name, fold, seed

    @property
    def matching(self) -> Matching:
        """The benchmark that trains the models."""
        return Matching(args=self.args)

    def list_inputs(self, method: str, data_set: str) -> tuple[Path | str, ...]:
        code = (Path(__file__).parent, Path(views.__file__))
        code += (markers.SCRIPT, markers.PINS) if method == MARKERS else ()
        is_trained = method in TRAINED
        trained = self.matching.list_inputs(TRAINED[method], data_set) if is_trained else ()
        return self.digest_data(data_set), *code, *trained

    def measure(self, run: Run, folder: Path) -> Result:
        split = self.cut_split(run)
        with ignore_warnings():
            train, test = md.read(split.train), md.read(split.test)
            if run.method in imputation.RIVALS:
                found = {IMPUTATION: imputation.score_rival(run.method, train, test)}
            elif run.method in KNOWN:
                found = {IMPUTATION: imputation.score_peer(self.find_training(run), test)}
            else:
                found = self.ask_model(run, folder, train, test)
        return found | {"threads": self.args.threads}

    def ask_model(self, run: Run, folder: Path, train: md.MuData, test: md.MuData) -> Result:
        """Scores of one of our answers."""
        model = load(self.find_training(run) / "run")
        if run.method == TRANSFER:
            cells = (transfer.LabelledCells.embed_with(model, part) for part in (train, test))
            return {TRANSFER: dict(transfer.score_transfer(*cells))}
        if run.method == MARKERS:
            rank_features = partial(
                markers.rank_by_scanpy,
                python=install_python(markers.PINS, self.args.work),
                folder=folder,
                threads=self.args.threads,
            )
            return {MARKERS: dict(markers.score_markers(model, test, rank_features))}
        return {IMPUTATION: imputation.score_run(model, test)}

    def find_training(self, run: Run) -> Path:
        """The folder of the run of `matching` whose model is asked, done unless it is kept."""
        name = TRAINED[run.method]
        digest = self.matching.digest(name, run.data_set)
        training = Run(name, run.data_set, run.fold, run.seed, digest)
        self.matching.obtain(training)
        return training.folder(self.args.work)

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
        """Leads over kNN regression and totalVI, coverage of intervals, what labels are worth."""
        for key, bar in self.bars.items():
            name, part, score = key.split()[:3]
            method, kind = (OURS, IMPUTATION) if "-" in part else (TRANSFER, TRANSFER)
            path = f"{kind}.{part}.{score}"
            ours = self.average_seeds(records, method, name, path)
            if score not in ("feature", "cell"):
                yield bar.judge_mean(list(ours.values()))
            else:
                others = ["knn", "totalvi"] if part == "rna-adt" else ["knn"]
                rivals = {m: self.average_seeds(records, m, name, path) for m in others}
                yield judge_lead(bar, ours, rivals)

    def list_extras(self) -> Result:
        return {}


def list_parts(record: Result) -> Iterable[tuple[str, Result]]:
    """The scores of a record by direction, or by what queries are seen through."""
    found = next(record[kind] for kind in (IMPUTATION, TRANSFER, MARKERS) if kind in record)
    return found.items()


if __name__ == "__main__":
    Answers.main()
