"""Does broken or hostile input ever crash, hang, fill the memory, run code, or get served wrong?

.venv/bin/python -m tests.benchmarks.hostile --json OUT.json [--quick] [--groups manifest h5ad ...]

Inputs of each group are made one by one from a seed, and tried through the commands and classes
that people use.
"""

import contextlib
import io
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import ClassVar

from tests.benchmarks.hostile.probe import GROUPS, Prober
from tests.benchmarks.report import Result
from tests.benchmarks.runner import Benchmark, Case, Option, Run
from tests.distributed.command import ROOT

INPUTS, QUICK = 200, 12  # of each group
SOURCES = ("clue_dist", "data_prep", "configs", "tests/unit/prep_helpers.py")
SOURCES += ("tests/served_values.py",)
COUNTS = ("inputs", "refused", "right", "crashed", "ran")


class Hostile(Benchmark):
    """Groups of hostile inputs."""

    name = work = "hostile"
    options: ClassVar = {"groups": Option(list(GROUPS), list(GROUPS), choices=GROUPS)}

    def list_cases(self) -> list[Case]:
        return [(group, "inputs", 0, 0) for group in self.args.groups]

    def list_inputs(self, method: str, data_set: str) -> list[Path | str]:
        return [*(ROOT / part for part in SOURCES), Path(__file__).parent, str(self.args.quick)]

    def measure(self, run: Run, folder: Path) -> Result:
        return try_inputs(run.method, folder, range(QUICK if self.args.quick else INPUTS), run.seed)

    def tabulate(self, records: Sequence[Result]) -> str:
        totals = {path: sum(r[path] for r in records) for path in COUNTS}
        table = super().tabulate([*records, {"method": "all", "data_set": "inputs"} | totals])
        form = "{} {number}: {what}: {told} {ran}".format
        crashes = [form(r["method"], **crash) for r in records for crash in r["crashes"]]
        return "\n".join([table, *(["", "crashed:", *crashes] if crashes else [])])

    def judge(self, records: Sequence[Result]) -> Iterator[Result]:
        whole = len(records) == len(GROUPS)
        for path, bar in self.bars.items():
            yield bar.judge(sum(r[path] for r in records) if whole else None)


def try_inputs(group: str, folder: Path, numbers: Sequence[int], seed: int) -> Result:
    """How the inputs of these numbers ended; what they are made of is made in `folder`, once."""
    base = folder / "base"
    if not base.exists():
        base.mkdir(parents=True)
        with contextlib.redirect_stderr(io.StringIO()):
            GROUPS[group][0](base)
    with contextlib.closing(Prober(group, folder, seed)) as prober:
        found = [prober.try_input(number) for number in numbers]
    ends = [trial["end"] for trial in found]
    return {
        "inputs": len(found),
        **{end: ends.count(end) for end in ("refused", "right", "crashed")},
        "ran": sum(bool(trial["ran"]) for trial in found),
        "seconds": max((trial.get("seconds", 0.0) for trial in found), default=0.0),
        "grown_mb": max((trial.get("grown_mb", 0) for trial in found), default=0),
        "crashes": [trial for trial in found if trial["end"] == "crashed"],
    }


if __name__ == "__main__":
    Hostile.main()
