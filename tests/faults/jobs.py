"""Jobs of ranks under the deepspeed launcher, that are watched, killed and started again."""

import json
import os
import random
import re
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import psutil

from tests.benchmarks.commands import BenchmarkError, start_process
from tests.distributed.command import launched

STARTED = 180.0  # seconds within which a job makes its first new step


@dataclass
class Job:
    """A job on a run folder."""

    process: subprocess.Popen[bytes]
    run: Path
    log: Path
    before: int  # the newest step that was committed as it began

    def fail(self, what: str) -> BenchmarkError:
        return BenchmarkError(what, where=self.run, got=self.log.read_text()[-2000:])

    def find_ranks(self) -> list[psutil.Process]:
        """Processes of the two ranks, by rank; fewer once the job is ending."""
        while True:
            found = {}
            with suppress(psutil.NoSuchProcess):  # any process may end while psutil looks
                for child in psutil.Process(self.process.pid).children(recursive=True):
                    with suppress(psutil.NoSuchProcess):
                        words = " ".join(child.cmdline())
                        local = re.search(r"launch/train.py .*--local_rank=(\d+)", words)
                        if local:
                            found[int(local[1])] = child
            if len(found) == 2 or self.process.poll() is not None:
                return [found[rank] for rank in sorted(found)]
            time.sleep(0.05)

    def await_condition(self, holds: Callable[[], bool], within_s: float, every_s: float) -> bool:
        """Wait while the job runs; whether the condition came to hold."""
        deadline = time.monotonic() + within_s
        while not (held := holds()):
            if self.process.poll() is not None or time.monotonic() > deadline:
                break
            time.sleep(every_s)
        return held

    def await_step(self, more: int = 1) -> None:
        """Wait until it has logged `more` steps beyond the checkpoint it went on from.

        What was logged after that by the attempt before is gone once it says that it goes on.
        """

        def logged() -> bool:
            said = self.log.read_text()
            began = "starting: " in said or "going on from step" in said
            return began and find_last_step(self.run) >= self.before + more

        if not self.await_condition(logged, STARTED, 0.02):
            raise self.fail("the job made no step")

    def await_save(self, draw: random.Random, within_s: float = 20) -> bool:
        """Wait until a checkpoint is being written, and some milliseconds; whether one was."""
        seen = self.await_condition(lambda: bool(list_partials(self.run)), within_s, 0.0005)
        time.sleep(draw.uniform(0, 0.006))
        return seen

    def send_signal(self, number: signal.Signals) -> None:
        """Signal the ranks, as Slurm signals a job's processes."""
        for rank in self.find_ranks():
            rank.send_signal(number)

    def await_end(self, timeout_s: float) -> tuple[int, float]:
        """Exit code, and the seconds it took to come."""
        began = time.monotonic()
        try:
            return self.process.wait(timeout_s), time.monotonic() - began
        except subprocess.TimeoutExpired:
            raise self.fail("the job did not end") from None


@contextmanager
def start_job(run: Path, *args: str, ranks: int = 2) -> Iterator[Job]:
    """Run `deepspeed launch/train.py` on a run folder; nothing of it is left running."""
    log, before = run.with_suffix(".out"), find_committed_step(run)
    with log.open("wb") as output:
        process = start_process(launched(ranks, *args), output, threads=1)
    try:
        yield Job(process, run, log, before)
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)  # launchers and ranks are one group
        process.wait()


def find_committed_step(run: Path) -> int:
    """The newest committed step, from which the run goes on."""
    commits = run.glob("checkpoints/step-????????/COMMIT.json")
    return max((int(path.parent.name[5:]) for path in commits), default=0)


def find_commit_time(run: Path) -> float:
    """When the newest step was committed by renaming its folder, as `time.time` counts."""
    return (run / "checkpoints" / f"step-{find_committed_step(run):08d}").stat().st_ctime


def list_partials(run: Path, kind: str = "checkpoints") -> list[Path]:
    """Checkpoints being written; what is being removed bears no attempt in its name."""
    return list(run.glob(f"{kind}/step-????????.*.partial"))


def find_last_step(run: Path) -> int:
    """The step of the last whole line of metrics.jsonl."""
    path = run / "metrics.jsonl"
    if not path.exists():
        return 0
    with path.open("rb") as file:
        file.seek(max(0, path.stat().st_size - 2000))
        lines = file.read().split(b"\n")[:-1]
    return int(json.loads(lines[-1])["step"]) if lines else 0
