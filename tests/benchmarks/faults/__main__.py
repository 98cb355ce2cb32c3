"""Does a run survive what clusters do: a hundred kills, stops, damaged checkpoints, slow saving?

.venv/bin/python -m tests.benchmarks.faults --json OUT.json [--quick] [--only kills ...]
"""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import ClassVar

from tests.benchmarks import report
from tests.benchmarks.faults.campaigns import CAMPAIGNS, CampaignSize
from tests.benchmarks.report import Result
from tests.benchmarks.runner import Benchmark, Case, Option, Run
from tests.distributed.command import ROOT

FULL = CampaignSize(steps=10_000, kills=100, stops=20, damages=300, saves=12, features=20_000)
QUICK = CampaignSize(steps=60, kills=1, stops=1, damages=18, saves=4, features=200)
SOURCES = ("clue_dist", "launch/train.py", "configs/zero3.json", "tests/stores.py")
SOURCES += ("tests/distributed/command.py", "tests/faults/command.py", "tests/faults/jobs.py")


class Faults(Benchmark):
    """Campaigns against runs."""

    name = work = "faults"
    packages = ("deepspeed", "safetensors")
    options: ClassVar = {"only": Option(list(CAMPAIGNS), list(CAMPAIGNS), choices=CAMPAIGNS)}

    def list_cases(self) -> list[Case]:
        return [(name, "simulated", 0, 0) for name in CAMPAIGNS if name in self.args.only]

    def list_inputs(self, method: str, data_set: str) -> list[Path | str]:
        sources = [ROOT / part for part in SOURCES]
        return [*sources, Path(__file__).parent, str(self.args.quick)]

    def measure(self, run: Run, folder: Path) -> Result:
        size = QUICK if self.args.quick else FULL
        shared = self.args.work / f"whole-{run.digest[:12]}"
        return CAMPAIGNS[run.method](folder, size, shared)

    def tabulate(self, records: Sequence[Result]) -> str:
        """A column for each campaign."""
        table = report.select_columns(records, ()).set_index("method")
        return report.format_table(table.drop(columns=table.columns.intersection(report.RUN)).T)

    def judge(self, records: Sequence[Result]) -> Iterator[Result]:
        values = {r["method"]: r for r in records}
        for key, bar in self.bars.items():
            campaign, _, name = key.partition(": ")
            yield bar.judge(values.get(campaign, {}).get(name))


if __name__ == "__main__":
    Faults.main()
