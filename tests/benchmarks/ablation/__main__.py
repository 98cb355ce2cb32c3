"""What each part of the recipe is worth: the paper's Table 5 on real cells, and choices beyond it.

.venv/bin/python -m tests.benchmarks.ablation --json OUT.json [--quick] [--sets ...] [--rows ...]

Every row trains a recipe with a few settings or cells changed on the mosaics of `matching`.
"""

import statistics
from collections.abc import Iterable, Sequence
from itertools import product
from pathlib import Path
from typing import ClassVar

import mudata as md

from clue_dist.metrics.matching import METRICS
from tests.benchmarks import mosaic
from tests.benchmarks.ablation import cells, estimates, rows
from tests.benchmarks.ablation.cells import DOUBLINGS, FINE_TUNED, OTHER_CELLS, TRANSDUCTIVE
from tests.benchmarks.ablation.rows import ATLAS, COUNTED_ANEW, ROWS, find_row, name_method
from tests.benchmarks.matching import Matching
from tests.benchmarks.mosaic import Training
from tests.benchmarks.report import Result, select_values
from tests.benchmarks.runner import Benchmark, Case, Option, Run
from tests.benchmarks.split import FOLDS
from tests.distributed.command import ROOT


class Ablation(Matching):
    """Rows of recipes; the row of atlas.json is the run of the matching benchmark."""

    name = "ablation"
    options: ClassVar = {
        **Matching.cells,
        "folds": Option([0], [0], choices=FOLDS),
        "seeds": Option([0], [0]),
        "rows": Option(list(ROWS), ["paper: all", ATLAS, TRANSDUCTIVE], choices=ROWS),
    }
    columns: ClassVar = [*Matching.columns, "joint", "alone"]

    def list_cases(self) -> list[Case]:
        args = self.args
        cases = product(args.seeds, args.rows, args.folds, args.sets)
        return [
            (name_method(row), name, fold, seed)
            for seed, row, fold, name in cases
            if rows.applies_to(row, name) and (row != COUNTED_ANEW or seed == 0)
        ]

    def list_inputs(self, method: str, data_set: str) -> Iterable[Path | str]:
        row, data = find_row(method), self.digest_data(data_set)
        if row == ATLAS:
            return super().list_inputs(method, data_set)
        if row == COUNTED_ANEW:
            return data, Path(estimates.__file__), ROOT / "clue_dist/metrics/matching.py"
        changed = (row, Path(cells.__file__)) if row in OTHER_CELLS else ()
        recipe = rows.choose_recipe(row, data_set)
        return data, mosaic.digest_sources(), recipe, *self.list_settings(row), *changed

    def list_settings(self, row: str) -> tuple[str, ...]:
        return (*ROWS[row].split(), *self.settings)

    def measure(self, run: Run, folder: Path) -> Result:
        row, args, split = find_row(run.method), self.args, self.cut_split(run)
        if row == ATLAS:
            return super().measure(run, folder)
        if row == COUNTED_ANEW:
            with mosaic.ignore_warnings():
                proteins = md.read(split.test)[split.mods[1]].X
            scores = estimates.match_recounts(proteins, run.fold)
            return {"fit_s": 0.0, "threads": args.threads, "scores": scores}
        settings, earlier = self.list_settings(row), None
        if row in OTHER_CELLS:
            full, split = split, cells.change_training(split, row, run.method, args.data)
            earlier = full if row == FINE_TUNED else None
        if row in OTHER_CELLS and earlier is None:
            stores = [mosaic.convert_split(s, args) / "train.zarr" for s in (full, split)]
            settings += cells.match_schedule(*stores, settings)
        recipe = rows.choose_recipe(row, run.data_set)
        fit_s = Training(split, folder, run.seed, settings, args, recipe, earlier).save_z()
        return {"fit_s": fit_s, "threads": args.threads}

    def score(self, run: Run, folder: Path) -> Result:
        return {} if find_row(run.method) == COUNTED_ANEW else super().score(run, folder)

    def tabulate(self, records: Sequence[Result]) -> str:
        tables = [super().tabulate([r | {"method": find_row(r["method"])} for r in records])]
        for name, metric in product(self.args.sets, METRICS):
            if (limit := extrapolate_pairs(records, name, metric)) is not None:
                tables.append(f"{name}: ever more pairs, {metric}: {limit:.4f}")
        return "\n\n".join([*tables, estimates.tabulate_parameters()])

    judge, list_extras = Benchmark.judge, Benchmark.list_extras  # no bars, no peers


def extrapolate_pairs(records: Sequence[Result], name: str, metric: str) -> float | None:
    """Where the means of ever more pairs lead, NaN if nowhere; None if not all folds were run."""
    means = []
    for row in DOUBLINGS:
        where = {"data_set": name, "method": name_method(row)}
        if set(select_values(records, "fold", **where)) != set(FOLDS):
            return None
        means.append(statistics.fmean(select_values(records, f"scores.global.{metric}", **where)))
    return estimates.extrapolate_limit(means)


if __name__ == "__main__":
    Ablation.main()
