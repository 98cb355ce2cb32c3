"""The runner of every benchmark: what is run, kept, resumed, repeated, told, judged, written."""

import argparse
import functools
import json
import os
import signal
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

from clue_dist.errors import ClueError
from clue_dist.process import run_main
from tests.benchmarks import report
from tests.benchmarks.commands import BenchmarkError
from tests.benchmarks.kept import compute_digest, lock_folder, make_once, write_json
from tests.benchmarks.report import Bar, Result
from tests.distributed.command import ROOT

RESULT = "result.json"
NOTES = "what the columns say: tests/benchmarks/README.md"
QUICK = "QUICK LOOK: few cells, few steps; the numbers say that it runs, not how well\n"


@dataclass(frozen=True)
class Run:
    """One method on one data set."""

    method: str
    data_set: str
    fold: int  # or the number of a repeat
    seed: int
    digest: str  # of everything that the result follows from, seed and fold aside

    def folder(self, work: Path) -> Path:
        name = f"fold{self.fold}-seed{self.seed}-{self.digest[:12]}"
        return work / "runs" / self.method / self.data_set / name

    def read_record(self, work: Path) -> Result | None:
        """What the finished run gave, if there is one."""
        path = self.folder(work) / RESULT
        return json.loads(path.read_text()) if path.exists() else None


Case = tuple[str, str, int, int]  # method, data set, fold or repeat, seed


class Option(NamedTuple):
    """An option of the command line; where its defaults are lists, it takes several values."""

    full: Any  # the default
    quick: Any  # the default of a quick look
    help: str = ""
    choices: Iterable[Any] | None = None


class Benchmark:
    """A benchmark: a subclass says what is run, how it is measured, and how results are told.

    It overrides `list_cases`, `list_inputs` and `measure`, and where need be what follows these.
    """

    name: str  # of its module below tests.benchmarks
    work: str  # the folder below .benchmarks where its runs are kept
    counted = ""  # "fold" or "repeat", where a method runs on a data set several times
    columns: Sequence[str] = ()  # the paths of what is told of a record; every number if empty
    packages: Sequence[str] = ("deepspeed", "scikit-learn")  # whose versions go into the JSON
    options: Mapping[str, Option] = {}  # beside --json, --quick, --work and --threads
    score_sources: Sequence[Path] = ()  # the code that `score` follows from
    limits_cores = False  # whether this process and all that it starts get `--threads` cores

    def __init__(self, words: Sequence[str] | None = None, args: Any = None) -> None:
        """Take words of a command line, or the parsed arguments of another benchmark."""
        self.args: argparse.Namespace = args or self._parse(words)

    def list_cases(self) -> Iterable[Case]:
        """List what is run, in its order."""

    def list_inputs(self, method: str, data_set: str) -> Iterable[Path | str]:
        """List the code, settings and cells that a method's result on a data set follows from."""

    def measure(self, run: Run, folder: Path) -> Result:
        """Do a run, which may take long, in a folder that is kept."""

    def score(self, run: Run, folder: Path) -> Result:
        """Score what `measure` left: done anew where the code of scores has changed."""

    def describe(self, record: Result) -> str:
        told = report.select_columns([record], self.columns).iloc[0, len(report.RUN) :].dropna()
        return ", ".join(f"{name} {report.format_value(value)}" for name, value in told.items())

    def tabulate(self, records: Sequence[Result]) -> str:
        return report.tabulate_records(records, self.columns, self.counted)

    def judge(self, records: Sequence[Result]) -> Iterable[Result]:
        """Judge the bars, which stay open where a record is missing; of a quick look all are."""
        return ()

    def list_extras(self) -> Result:
        """What else goes into the JSON."""
        return {}

    @property
    def bars(self) -> dict[str, Bar]:
        return report.load_bars(self.name)

    @classmethod
    def main(cls) -> NoReturn:
        """Run the benchmark as the command line says, and exit."""
        run_main(lambda: cls().carry_out())

    def _parse(self, words: Sequence[str] | None) -> argparse.Namespace:
        text, name = sys.modules[type(self).__module__].__doc__, f"tests.benchmarks.{self.name}"
        parser = argparse.ArgumentParser(
            f"python -m {name}", description=str(text).partition("\n")[0]
        )
        look, work = "a look of a minute: few cells, no bar judged", f".benchmarks/{self.work}"
        parser.add_argument("--json", type=Path, required=True, help="where to write results, bars")
        parser.add_argument("--quick", action="store_true", help=look)
        for option, (full, quick, about, choices) in self.options.items():
            several = isinstance(full, list)
            sample = (*full, "")[0] if several else full
            parser.add_argument(
                f"--{option}",
                nargs="+" if several else None,
                action="extend" if several else "store",
                type=resolve_path if isinstance(sample, Path) else type(sample),
                choices=choices,
                metavar=option.upper(),
                help=f"{about} default: {full}; of a quick look: {quick}".strip(),
            )
        parser.add_argument("--work", type=resolve_path, default=ROOT / work, help="keeps runs")
        parser.add_argument("--threads", type=int, default=2)
        args = parser.parse_args(words)
        for option, (full, quick, *_) in self.options.items():
            if getattr(args, option) is None:
                setattr(args, option, quick if args.quick else full)
        return args

    def digest(self, method: str, data_set: str) -> str:
        return compute_digest(*self.list_inputs(method, data_set))

    def plan_runs(self) -> list[Run]:
        """Every run, each with the digest of now."""
        digest = functools.cache(self.digest)
        return [Run(*case, digest(case[0], case[1])) for case in self.list_cases()]

    def carry_out(self) -> None:
        """Do the runs, print their table and bars, and write everything as JSON.

        Raises:
            BenchmarkError: runs failed; the others have been told and written.
        """
        args = self.args
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # what was started is ended too
        if self.limits_cores:
            # Pools of TensorStore and of Rust take no other limit from us.
            os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: args.threads])
        records, failures = self.finish(self.plan_runs())
        bars = list(self.judge([] if args.quick else records))
        print(f"\n{QUICK if args.quick else ''}{self.tabulate(records)}\n\n{NOTES}#{self.name}\n")
        print(*report.describe_bars(bars), sep="\n", flush=True)
        told = {"quick": args.quick, "bars": bars, "results": records, "failures": failures}
        told |= report.describe_place(self.packages) | self.list_extras()
        write_json(args.json, told)
        print(f"\n{args.json}")
        if failures:
            methods = ", ".join(failure["method"] for failure in failures)
            raise BenchmarkError(f"{len(failures)} runs failed", got=methods)

    def finish(self, runs: Sequence[Run]) -> tuple[list[Result], list[Result]]:
        """Do the runs that are not kept; the records and the failures of all."""
        records, failures = [], []
        for number, run in enumerate(runs):
            line = f"[{number + 1}/{len(runs)}] {self.title(run)}"
            kept = run.read_record(self.args.work) is not None
            if not kept:
                print(f"{line}: began {time.strftime('%H:%M:%S')}", flush=True)
            try:
                records.append(self.obtain(run))
                told = self.describe(records[-1])
                print(f"{line}: {'kept: ' if kept else ''}{told}", flush=True)
            except (ClueError, OSError, LookupError, ValueError, RuntimeError) as error:
                message = f"{type(error).__name__}: {error}"  # torch raises RuntimeError
                failures.append(asdict(run) | {"error": message})
                print(f"{line}: FAILED: {message}", flush=True)
        return records, failures

    def title(self, run: Run) -> str:
        number = f", {self.counted} {run.fold}" if self.counted else ""
        return f"{run.method} on {run.data_set}{number}{f', seed {run.seed}' if run.seed else ''}"

    def obtain(self, run: Run) -> Result:
        """The record of a run, which is done unless it is kept, and scored by the code of now."""

        def make(folder: Path) -> None:
            self._require_unchanged(run)
            began = time.monotonic()
            result = self.measure(run, folder)
            self._require_unchanged(run)
            write_json(folder / RESULT, asdict(run) | result | {"wall_s": time.monotonic() - began})

        folder = make_once(run.folder(self.args.work), make, mark=RESULT)
        code = compute_digest(*self.score_sources)
        with lock_folder(folder):
            record = json.loads((folder / RESULT).read_text())
            if self.score_sources and record.get("scored_by") != code:
                record |= self.score(run, folder) | {"scored_by": code}
                write_json(folder / RESULT, record)
        return dict(record)

    def _require_unchanged(self, run: Run) -> None:
        """A result is kept under the digest its run was planned with: that must stay true."""
        if self.digest(run.method, run.data_set) != run.digest:
            what, where = "sources or cells changed while the benchmark ran", self.title(run)
            raise BenchmarkError(what, where=where, fix="start it again")


def resolve_path(text: str) -> Path:
    """A path as a `type` of argparse, for commands that run in another folder."""
    return Path(text).resolve()
