"""Several jobs on one machine whose launcher gives all of them the same port, as by default."""

from __future__ import annotations

import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.distributed.command import ROOT, environment, metrics, train_args
from tests.faults.command import planted
from tests.ports import find_free_port
from tests.stores import make_store

LONG = ("train.epochs=1000", "log.every=1")
STOPPED = 75


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("jobs")
    make_store(
        folder / "s.zarr",
        cells={"rna+adt": 200, "rna": 60, "adt": 40},
        features={"rna": 60, "adt": 10},
    )
    return folder


@pytest.fixture
def port() -> str:
    return str(find_free_port())


StartJob = Callable[..., "subprocess.Popen[str]"]


@pytest.fixture
def start_job(folder: Path, port: str) -> Iterator[StartJob]:
    """Start two ranks that train, step by slow step, into a run folder, and are given the port."""
    jobs = []

    def start(name: str, *settings: str) -> subprocess.Popen[str]:
        job = subprocess.Popen(
            planted(2, train_args(folder, folder / "s.zarr", name, *settings), "pause:0.1"),
            cwd=ROOT,
            env=environment() | {"MASTER_PORT": port},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        jobs.append(job)
        return job

    yield start
    for job in jobs:
        job.kill()  # and with it the ranks
        job.communicate()


def test_jobs_that_come_later_leave_and_the_first_one_goes_on(
    folder: Path, port: str, start_job: StartJob
) -> None:
    first = start_job("first", *LONG)
    await_lines(folder / "first", 4)
    for name in ("second", "first"):  # another run folder, and the same
        later = start_job(name, *LONG)
        output, _ = later.communicate(timeout=120)
        assert later.returncode == 2, output
        assert f"taken by another job\n  where: rank 0 of 2 on {socket.gethostname()}" in output
        assert "got: process " in output
        assert f"--master_port {int(port) + 1}" in output
        assert "Traceback" not in output
        assert not (folder / "second").exists()
    await_lines(folder / "first", 20)
    first.terminate()
    output, _ = first.communicate(timeout=120)
    assert first.returncode == STOPPED, output
    steps = [line["step"] for line in metrics(folder / "first")]
    assert steps == list(range(1, len(steps) + 1))


def await_lines(run: Path, count: int) -> None:
    """Wait until a run has logged so many more lines."""
    awaited, deadline = count_lines(run) + count, time.monotonic() + 120
    while count_lines(run) < awaited:
        assert time.monotonic() < deadline
        time.sleep(0.05)


def count_lines(run: Path) -> int:
    log = run / "metrics.jsonl"
    return log.read_text().count("\n") if log.exists() else 0


def test_of_jobs_that_start_at_once_one_finishes(start_job: StartJob) -> None:
    jobs = [start_job(f"at-once-{number}", "train.epochs=2") for number in range(3)]
    outputs = [job.communicate(timeout=200)[0] for job in jobs]
    codes = {job.returncode for job in jobs}
    assert codes in ({0, 2}, {0}), outputs  # one that starts late may find the port free again
    assert not any("Traceback" in output for output in outputs)
