"""Jobs of two ranks under the deepspeed launcher, that are watched, killed, stopped and started again."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import psutil

from tests.benchmarks.common import BenchmarkError
from tests.distributed.command import ROOT, environment, launched

STARTED = 180.0  # seconds within which a job makes its first new step


@dataclass
class Job:
    """A job on a run folder. before: the newest step that was committed as it began."""

    process: subprocess.Popen[bytes]
    run: Path
    out: Path
    before: int

    def ranks(self) -> list[psutil.Process]:
        """Processes of the two ranks, by rank; fewer once the job is ending."""
        while len(found := self._ranks()) < 2 and self.process.poll() is None:
            time.sleep(0.01)  # psutil gives up where any process ends while it looks
        return [found[rank] for rank in sorted(found)]

    def _ranks(self) -> dict[int, psutil.Process]:
        found = {}
        with suppress(psutil.NoSuchProcess):
            for child in psutil.Process(self.process.pid).children(recursive=True):
                with suppress(psutil.NoSuchProcess):
                    words = child.cmdline()
                    local = next((w for w in words if w.startswith("--local_rank=")), None)
                    if local and "launch/train.py" in words:
                        found[int(local.partition("=")[2])] = child
        return found

    def await_step(self, more: int = 1) -> None:
        """Until it has logged `more` steps beyond the checkpoint it went on from; what was logged after that by the
        attempt before is gone once it says that it goes on."""
        deadline = time.monotonic() + STARTED
        while not self._goes_on() or last_step(self.run) < self.before + more:
            if self.process.poll() is not None or time.monotonic() > deadline:
                raise BenchmarkError(
                    "the job made no step", where=self.run, got=self.out.read_text()[-2000:]
                )
            time.sleep(0.02)

    def _goes_on(self) -> bool:
        said = self.out.read_text()
        return "starting: " in said or "going on from step" in said

    def await_save(self, draw: random.Random, within_s: float = 20) -> bool:
        """Until a checkpoint is being written, and up to some milliseconds more; whether one was."""
        deadline = time.monotonic() + within_s
        while (
            not partials(self.run) and self.process.poll() is None and time.monotonic() < deadline
        ):
            time.sleep(0.0005)
        seen = bool(partials(self.run))
        time.sleep(draw.uniform(0, 0.006))
        return seen

    def end(self, timeout_s: float) -> tuple[int, float]:
        """Exit code, and the seconds it took to come."""
        began = time.monotonic()
        try:
            return self.process.wait(timeout_s), time.monotonic() - began
        except subprocess.TimeoutExpired:
            self.kill_all()
            raise BenchmarkError(
                "the job did not end", where=self.run, got=self.out.read_text()[-2000:]
            ) from None

    def kill_all(self) -> None:
        with suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)  # launchers and ranks are one group


@contextmanager
def job(run: Path, *args: str, ranks: int = 2) -> Iterator[Job]:
    """`deepspeed launch/train.py` on a run folder; nothing of it is left running."""
    out = run.with_suffix(".out")
    before = resumes_at(run)
    with out.open("wb") as output:
        command = launched(ranks, *args)
        process = subprocess.Popen(
            command,
            cwd=ROOT,
            env=environment(),
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    one = Job(process, run, out, before)
    try:
        yield one
    finally:
        one.kill_all()
        process.wait()


def resumes_at(run: Path) -> int:
    """The newest committed step."""
    return max(
        (int(p.parent.name[5:]) for p in run.glob("checkpoints/step-????????/COMMIT.json")),
        default=0,
    )


def committed_at(run: Path) -> float:
    """When the newest step was committed, by the renaming of its folder, as `time.time` counts."""
    return (run / "checkpoints" / f"step-{resumes_at(run):08d}").stat().st_ctime


def partials(run: Path, kind: str = "checkpoints") -> list[Path]:
    """Checkpoints being written; what is being removed bears no attempt in its name."""
    return list(run.glob(f"{kind}/step-????????.*.partial"))


def last_step(run: Path) -> int:
    """Of the last whole line of metrics.jsonl."""
    path = run / "metrics.jsonl"
    if not path.exists():
        return 0
    with path.open("rb") as f:
        f.seek(max(0, path.stat().st_size - 2000))
        lines = f.read().split(b"\n")[:-1]
    return int(json.loads(lines[-1])["step"]) if lines else 0


def signalled(one: Job, number: signal.Signals) -> None:
    """As Slurm signals a job's processes: the ranks."""
    for rank in one.ranks():
        rank.send_signal(number)
