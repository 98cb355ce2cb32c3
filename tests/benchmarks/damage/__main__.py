"""Is a damaged store ever served wrong, and does `data_prep check` find every damage and its place?

.venv/bin/python -m tests.benchmarks.damage --json OUT.json [--quick]

A small store of four strata is damaged at random, one place at a time; it is checked and all read.
"""

import contextlib
import io
from collections.abc import Iterator, Sequence
from pathlib import Path

from clue_dist.errors import StoreError
from clue_dist.store.reader import Store
from data_prep.check import check_store
from tests import served_values
from tests.benchmarks.report import Result
from tests.benchmarks.runner import Benchmark, Case, Run
from tests.damages import KINDS, PLACES, draw_damages
from tests.distributed.command import ROOT

DAMAGES, QUICK = 100, 12  # of each kind
SOURCES = ("clue_dist/store", "clue_dist/data", "data_prep", "tests/unit/prep_helpers.py")
SOURCES += ("tests/damages.py", "tests/served_values.py")
CELLS = {"rna": slice(0, 300), "adt": slice(0, 200), "other": slice(0, 100)}
CELLS["atac"] = slice(200, 420)


class DamageBenchmark(Benchmark):
    """Damages of one store, kind by kind."""

    name = work = "damage"

    def list_cases(self) -> list[Case]:
        return [(kind, "mosaic", 0, 0) for kind in KINDS]

    def list_inputs(self, method: str, data_set: str) -> list[Path | str]:
        return [*(ROOT / part for part in SOURCES), Path(__file__).parent, str(self.args.quick)]

    def measure(self, run: Run, folder: Path) -> Result:
        root = served_values.make_small_store(folder, CELLS, 30)
        sound, count = (
            served_values.read_everything(Store(root)),
            QUICK if self.args.quick else DAMAGES,
        )
        return try_damages(root, sound, run.method, count, run.seed)

    def tabulate(self, records: Sequence[Result]) -> str:
        missed = [line for r in records for line in r["missed"]]
        lines = [super().tabulate(records), *(["", "not found:", *missed] if missed else [])]
        return "\n".join(lines)

    def judge(self, records: Sequence[Result]) -> Iterator[Result]:
        whole = len(records) == len(KINDS)
        for path, bar in self.bars.items():
            yield bar.judge(sum(r[path] for r in records) if whole else None)


def try_damages(
    root: Path, sound: served_values.Values, kind: str, count: int, seed: int
) -> Result:
    """Do random damages to the sound store at `root`, of which all values are `sound`."""
    missed, wrong, refused, places = [], 0, 0, dict.fromkeys(PLACES, 0)
    for damage in draw_damages(root, kind, count, seed):
        places[damage.place] += 1
        with damage.apply_to(root):
            problems = list_problems(root)
            if not any(damage.file in problem for problem in problems):
                missed.append(f"{damage}; told: {problems}")
            values, any_refused = served_values.count_wrong_values(root, sound)
        wrong, refused = wrong + values, refused + any_refused
    totals = {"damages": count, "found": count - len(missed), "refused": refused, "wrong": wrong}
    return totals | {"places": places, "missed": missed}


def list_problems(root: Path) -> list[str]:
    with contextlib.redirect_stderr(io.StringIO()):
        try:
            return check_store(root)
        except StoreError as error:
            return [str(error)]


if __name__ == "__main__":
    DamageBenchmark.main()
