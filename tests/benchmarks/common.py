"""What every benchmark needs: runs that are kept, environments, bars, and JSON that says where it was measured.

Whatever is made lies under a work folder and is made once: a benchmark that was broken off goes on when it is typed
again, and two that run side by side share what either has made.
"""

from __future__ import annotations

import argparse
import fcntl
import hashlib
import json
import math
import operator
import os
import platform
import shutil
import signal
import statistics
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import psutil

from clue_dist.errors import ClueError
from tests.distributed.command import ROOT, environment

RESULT = "result.json"
OPERATORS = {"<": operator.lt, "<=": operator.le, ">": operator.gt, ">=": operator.ge}


class BenchmarkError(ClueError):
    """A run of a benchmark that failed."""

    exit_code = 1


# --- made once ---


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Waits until no other process holds `path`; the lock goes with the process, however that ends."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            print(f"waiting for another process that is making {path.with_suffix('')}", flush=True)
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def once(folder: Path, make: Callable[[Path], None], mark: str = ".done") -> Path:
    """`folder`, filled by `make` unless it has been before; what was broken off is begun anew."""
    with locked(lock_of(folder)):
        if not (folder / mark).exists():
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir()
            make(folder)
            (folder / mark).touch()
    return folder


def lock_of(folder: Path) -> Path:
    return folder.with_name(f"{folder.name}.lock")


def write_json(path: Path, content: Any) -> None:
    """Whole or not at all; numbers that are not finite become null."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.write_text(json.dumps(_finite(content), indent=1, allow_nan=False) + "\n")
    temporary.replace(path)


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _finite(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def digest(*parts: Path | str) -> str:
    """Of texts, files and everything in folders but caches and what is only read: what a result follows from."""
    total = hashlib.sha256()
    for part in parts:
        for name, content in [("", part.encode())] if isinstance(part, str) else _files(part):
            total.update(f"{name}\0{len(content)}\0".encode() + content)
    return total.hexdigest()


def _files(path: Path) -> Iterator[tuple[str, bytes]]:
    files = [path] if path.is_file() else sorted(p for p in path.rglob("*") if p.is_file())
    for file in files:
        if "__pycache__" not in file.parts and file.suffix != ".md":
            yield str(file.relative_to(path.parent)), file.read_bytes()


# --- commands and environments ---


def call(command: Sequence[str | Path], log: Path, threads: int) -> float:
    """Run a command in the repository's root, its output going to the end of `log`; the seconds it took.

    Raises:
        BenchmarkError: it did not exit with 0; the tail of the log is told.
    """
    limits = dict.fromkeys(
        ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"), str(threads)
    )
    words = [str(word) for word in command]
    with log.open("a") as output:
        print("$", *words, file=output, flush=True)
        began = time.monotonic()
        # A session of its own, so that a stop reaches what the command has started in turn (deepspeed's ranks).
        process = subprocess.Popen(
            words,
            cwd=ROOT,
            env=environment() | limits,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            start_new_session=True,
        )
        try:
            code = process.wait()
        except BaseException:
            _end(process)
            raise
        seconds = time.monotonic() - began
    if code:
        raise BenchmarkError(
            f"exit code {code}", where=" ".join(words), got=f"\n{tail(log)}", fix=f"see {log}"
        )
    return seconds


def last_json(log: Path) -> dict[str, Any]:
    """The last line of a log that is a JSON object: what a probe printed."""
    lines = [line for line in log.read_text().splitlines() if line.startswith("{")]
    if not lines:
        raise BenchmarkError("a probe printed no result", where=log, got=f"\n{tail(log)}")
    return dict(json.loads(lines[-1]))


def _end(process: subprocess.Popen[bytes]) -> None:
    os.killpg(process.pid, signal.SIGTERM)
    try:
        process.wait(20)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)


def tail(log: Path, lines: int = 15) -> str:
    return "\n".join(log.read_text(errors="replace").splitlines()[-lines:])


def python_with(requirements: Path, work: Path, version: str | None = None) -> Path:
    """The Python of a virtual environment that holds what a pinned requirements file names, made if need be.

    version: "3.12" where another Python than this one is needed.
    """

    def make(folder: Path) -> None:
        print(f"installing {requirements.name} into {folder}: takes minutes", flush=True)
        install = [
            folder / "bin/python",
            "-m",
            "pip",
            "install",
            "--quiet",
            "--disable-pip-version-check",
        ]
        log = folder.with_name(f"{folder.name}.log")
        base = interpreter(version) if version else sys.executable
        call([base, "-m", "venv", folder], log, threads=1)
        # torch goes first: as somebody else's dependency it may bring gigabytes of CUDA along.
        if torch := [pin for pin in pins(requirements) if pin.startswith("torch==")]:
            call([*install, *torch], log, threads=1)
        call([*install, "--requirement", requirements], log, threads=1)

    name = f"{requirements.stem}-{digest(requirements)[:8]}"
    return once(work / "venvs" / name, make) / "bin/python"


def interpreter(version: str) -> Path:
    """An installed Python of a version such as "3.12": from PATH, or one that pyenv keeps.

    Raises:
        BenchmarkError: there is none that starts.
    """
    name = f"python{version}"
    pyenv = Path(os.environ.get("PYENV_ROOT", Path.home() / ".pyenv")) / "versions"
    folders = [Path(part) for part in os.environ["PATH"].split(os.pathsep)]
    tried = [
        folder / name
        for folder in [*folders, *sorted(pyenv.glob(f"{version}*/bin"))]
        if (folder / name).exists()
    ]
    for path in tried:
        # pyenv's shims are found but refuse to start a version that is not switched on.
        if subprocess.run([path, "-c", "import venv"], capture_output=True).returncode == 0:
            return path
    raise BenchmarkError(
        f"no Python {version} here, which a peer needs",
        got=", ".join(f"{path}, which does not start" for path in tried) or f"no {name} on PATH",
        fix=f"install it so that `{name}` is on PATH: `uv python install {version}`, `pyenv install {version}`, "
        f"or `apt install {name}-venv`",
    )


def pins(requirements: Path) -> list[str]:
    return [
        line for line in requirements.read_text().split("\n") if line and not line.startswith("#")
    ]


# --- runs ---


@dataclass(frozen=True)
class Run:
    """One method on one fold of one data set. digest: of everything its result follows from, seed and fold aside."""

    method: str
    data_set: str
    fold: int
    seed: int
    digest: str

    @property
    def name(self) -> str:
        return f"{self.method} on {self.data_set}, fold {self.fold}, seed {self.seed}"

    def folder(self, work: Path) -> Path:
        return (
            work
            / "runs"
            / self.method
            / self.data_set
            / f"fold{self.fold}-seed{self.seed}-{self.digest[:12]}"
        )

    def record(self, work: Path) -> dict[str, Any] | None:
        """What the finished run gave, if there is one."""
        path = self.folder(work) / RESULT
        return json.loads(path.read_text()) if path.exists() else None


Result = dict[str, Any]


@dataclass(frozen=True)
class Steps:
    """How runs are done. do: what takes long, in a folder that is kept; score: what that is worth, read from the
    folder; code: digest of what `score` follows from. Where it is another than a kept run was scored by, that run is
    scored anew, and not done anew."""

    do: Callable[[Run, Path], Result]
    score: Callable[[Run, Path], Result] | None = None
    code: str = ""


def finish(
    runs: Sequence[Run], work: Path, steps: Steps, told: Callable[[Result], str]
) -> tuple[list[Result], list[Result]]:
    """Do the runs that have not been done, one line as each starts and ends; the records and the failures of all.

    told: what a record says, in a few words.
    """
    records, failures = [], []
    for number, run in enumerate(runs):
        line = f"[{number + 1}/{len(runs)}] {run.name}"
        known = run.record(work) is not None
        if not known:
            print(
                f"{line}: began {time.strftime('%H:%M:%S')}, {time_left(runs[number:], work)}",
                flush=True,
            )
        try:
            record = done(run, work, steps)
        except (
            ClueError,
            OSError,
            LookupError,
            ValueError,
            RuntimeError,
        ) as error:  # torch raises the last
            failures.append(asdict(run) | {"error": f"{type(error).__name__}: {error}"})
            print(f"{line}: FAILED: {type(error).__name__}: {error}", flush=True)
        else:
            records.append(record)
            print(f"{line}: {'kept: ' if known else ''}{told(record)}", flush=True)
    return records, failures


def done(run: Run, work: Path, steps: Steps) -> Result:
    """The record of a run, which is done if it has not been, and scored if its scores are not of this code."""

    def make(folder: Path) -> None:
        began = time.monotonic()
        result = steps.do(run, folder)
        write_json(folder / RESULT, asdict(run) | result | {"wall_s": time.monotonic() - began})

    folder = once(run.folder(work), make, mark=RESULT)
    with locked(lock_of(folder)):
        record = run.record(work)
        assert record is not None
        if steps.score is not None and record.get("scored_by") != steps.code:
            record |= steps.score(run, folder) | {"scored_by": steps.code}
            write_json(folder / RESULT, record)
    return record


def unchanged(run: Run, now: str) -> None:
    """A result is kept under the digest its run was planned with, so that must be true until it ends.

    now: the digest as it is.

    Raises:
        BenchmarkError: it is another.
    """
    if now != run.digest:
        raise BenchmarkError(
            "sources or cells changed while the benchmark ran", where=run.name, fix="start it again"
        )


def time_left(runs: Iterable[Run], work: Path) -> str:
    """A guess from what runs of the same method on the same data set took."""
    took: dict[tuple[str, str], list[float]] = defaultdict(list)
    for path in (work / "runs").glob(f"*/*/*/{RESULT}"):
        record = json.loads(path.read_text())
        took[record["method"], record["data_set"]].append(record["wall_s"])
    known = [took.get((run.method, run.data_set)) for run in runs if run.record(work) is None]
    guess = [duration(sum(statistics.median(k) for k in known if k))] if any(known) else []
    unknown = sum(k is None for k in known)
    guess += [f"{unknown} {'run' if unknown == 1 else 'runs'} of unknown length"] if unknown else []
    return f"{' and '.join(guess)} left"


def duration(seconds: float) -> str:
    if seconds < 60:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


# --- what is told ---


@dataclass(frozen=True)
class Bar:
    """A number to reach."""

    name: str
    op: str
    bar: float

    def judged(self, value: float | None, deviation: float | None = None) -> dict[str, Any]:
        """value: None where not all was run that the bar is about; then it neither holds nor fails. deviation: of the
        values it is the mean of, to be told beside it."""
        holds = None if value is None else bool(OPERATORS[self.op](value, self.bar))
        spread = {} if deviation is None else {"deviation": deviation}
        return {
            "name": self.name,
            "value": value,
            "op": self.op,
            "bar": self.bar,
            "holds": holds,
        } | spread

    def over(self, values: Sequence[float]) -> dict[str, Any]:
        """Judged by the mean of values, of folds or seeds, with their standard deviation; open where there are none."""
        if not values:
            return self.judged(None)
        return self.judged(
            statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else None
        )


def bar_lines(bars: Iterable[dict[str, Any]]) -> Iterator[str]:
    words = {True: "holds ", False: "MISSED", None: "open  "}
    for bar in bars:
        value = "not run" if bar["value"] is None else f"{bar['value']:.4g}"
        value += f" ± {bar['deviation']:.2g}" if "deviation" in bar else ""
        yield f"{words[bar['holds']]}  {bar['name']}: {value} {bar['op']} {bar['bar']:g}"


def spread(values: Sequence[float], digits: int) -> str:
    """Mean ± standard deviation, where there are two values or more."""
    mean = f"{statistics.fmean(values):.{digits}f}"
    return mean if len(values) < 2 else f"{mean} ± {statistics.stdev(values):.{digits}f}"


def aligned(rows: Sequence[Sequence[str]]) -> str:
    """Rows of text as a table; the first is the heading."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = [
        "  ".join(text.ljust(w) for text, w in zip(row, widths, strict=True)).rstrip()
        for row in rows
    ]
    return "\n".join([lines[0], "-" * max(len(line) for line in lines), *lines[1:]])


def machine() -> dict[str, Any]:
    info = Path("/proc/cpuinfo")
    models = [
        line.partition(":")[2].strip()
        for line in info.read_text().splitlines()
        if "model name" in line
    ]
    return {
        "platform": platform.platform(),
        "cpu": models[0] if models else platform.processor(),
        "cores": len(os.sched_getaffinity(0)),
        "memory_gib": round(psutil.virtual_memory().total / 2**30, 1),
    }


def versions(*packages: str) -> dict[str, str]:
    """Of Python and of packages in this environment."""
    return {"python": platform.python_version()} | {
        name: version(name) for name in ("clue-dist", "torch", *packages)
    }


def parser(name: str, doc: str | None, work: str) -> argparse.ArgumentParser:
    """What every benchmark is told on the command line. doc: of its module; work: folder below .benchmarks."""
    out = argparse.ArgumentParser(
        prog=f"python -m tests.benchmarks.{name}", description=(doc or "").split("\n")[0]
    )
    out.add_argument(
        "--json",
        type=Path,
        required=True,
        help="where to write results, bars, machine and versions",
    )
    out.add_argument(
        "--quick",
        action="store_true",
        help="a look of a minute: few cells, few steps, no bar judged",
    )
    out.add_argument(
        "--work", type=resolved, default=f"{ROOT}/.benchmarks/{work}", help="where runs are kept"
    )
    out.add_argument("--threads", type=int, default=2)
    return out


def resolved(path: str) -> Path:
    return Path(path).resolve()


QUICK = "QUICK LOOK: few cells, few steps; the numbers say that it runs, not how well\n"


def carry_out(
    args: argparse.Namespace,
    runs: Sequence[Run],
    steps: Steps,
    told: Callable[[Result], str],
    table: Callable[[Sequence[Result]], str],
    footnotes: str,
    bars_of: Callable[[Sequence[Result]], Iterable[dict[str, Any]]],
    packages: Sequence[str] = ("deepspeed", "scikit-learn"),
    **more: Any,
) -> None:
    """Do the runs, print their table and bars, and write everything as JSON.

    args: with `work`, `quick` and `json`; packages: whose versions go into the JSON, as `more` does.

    Raises:
        BenchmarkError: runs failed; the others have been told and written.
    """
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that what was started is ended too
    records, failures = finish(runs, args.work, steps, told)
    bars = list(bars_of(records))
    print(
        f"\n{QUICK if args.quick else ''}{table(records)}\n\n{footnotes}\n",
        *bar_lines(bars),
        sep="\n",
        flush=True,
    )
    where = {"machine": machine(), "versions": versions(*packages)}
    write_json(
        args.json,
        {"quick": args.quick, "bars": bars, "results": records, "failures": failures}
        | where
        | more,
    )
    print(f"\n{args.json}")
    if failures:
        raise BenchmarkError(
            f"{len(failures)} runs failed", got=", ".join(f["method"] for f in failures)
        )
