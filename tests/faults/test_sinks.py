"""Training never depends on its sinks: wandb is killed, the terminal is closed.

And what holds a run folder: a lock, which may not work there.
"""

from __future__ import annotations

import fcntl
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import psutil
import pytest

from clue_dist.checkpoint import wandb_run
from clue_dist.config import Config, LogConfig
from clue_dist.errors import ResumeError
from clue_dist.ranks import Ranks
from clue_dist.resilience import run_lock
from clue_dist.resilience.run_lock import hold_run_lock
from clue_dist.train.sinks import Sinks
from tests.distributed.command import ROOT, environment, metrics, run, spawned, train_args
from tests.faults.command import saved_steps
from tests.processes import run_ranks
from tests.stores import make_store


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sinks")
    make_store(
        folder / "s.zarr",
        cells={"rna+adt": 200, "rna": 60, "adt": 40},
        features={"rna": 60, "adt": 10},
    )
    return folder


def started(folder: Path, name: str, *settings: str, **more: object) -> subprocess.Popen[str]:
    """Training of its own session, once it has logged ten steps."""
    args = train_args(folder, folder / "s.zarr", name, "log.every=1", *settings)
    env = {k: v for k, v in environment().items() if not k.startswith("WANDB")}
    # As in a terminal, whatever runs the tests.
    command = ["env", "--default-signal=HUP,INT", "python", *args]
    process = subprocess.Popen(
        command, cwd=ROOT, env=env, text=True, start_new_session=True, **more
    )  # type: ignore[call-overload]
    log, deadline = folder / name / "metrics.jsonl", time.monotonic() + 60
    while not (log.exists() and log.read_text().count("\n") > 10):
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.02)
    return process


def test_wandb_is_killed_in_mid_run(folder: Path) -> None:
    out = (folder / "wandb.out").open("w+")
    process = started(
        folder, "wandb", "train.epochs=40", "log.wandb=offline", stdout=out, stderr=out
    )
    helpers = psutil.Process(process.pid).children(recursive=True)
    assert any("wandb" in " ".join(h.cmdline()) for h in helpers)
    for helper in helpers:
        helper.kill()
    assert process.wait(120) == 0
    out.seek(0)
    assert "wandb is off from here on" in out.read()
    steps = [line["step"] for line in metrics(folder / "wandb")]
    assert steps == list(range(1, len(steps) + 1))
    assert saved_steps(folder / "wandb")[0] == steps[-1] > 150


def test_a_closed_terminal_saves(folder: Path) -> None:
    """What it printed to is gone, too."""
    process = started(folder, "closed", "train.epochs=2000", stdout=subprocess.PIPE)
    assert process.stdout is not None
    process.stdout.close()
    os.kill(process.pid, signal.SIGHUP)
    assert process.wait(30) == 75
    assert saved_steps(folder / "closed")[0] == metrics(folder / "closed")[-1]["step"]


def test_ctrl_c_saves(folder: Path) -> None:
    process = started(folder, "typed", "train.epochs=2000", stdout=subprocess.DEVNULL)
    os.killpg(process.pid, signal.SIGINT)
    assert process.wait(30) == 75
    assert saved_steps(folder / "typed")[0] == metrics(folder / "typed")[-1]["step"]


def test_where_no_lock_can_be_held_it_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refused(*_: object) -> None:
        raise OSError(38, "Function not implemented")

    monkeypatch.setattr(fcntl, "flock", refused)
    with hold_run_lock(tmp_path, Ranks()):
        assert "no lock can be held here" in capsys.readouterr().out


def test_the_lock_is_one_jobs_and_names_it(tmp_path: Path) -> None:
    with (
        hold_run_lock(tmp_path, Ranks()),
        pytest.raises(ResumeError, match="another job is training") as refused,
        hold_run_lock(tmp_path, Ranks()),
    ):
        raise AssertionError("not reached")
    assert f"process {os.getpid()} on {socket.gethostname()}" in str(refused.value)
    assert f"remove {tmp_path / '.lock'}" in str(refused.value)


def test_of_two_jobs_on_one_folder_the_second_is_refused_and_the_first_goes_on(
    folder: Path,
) -> None:
    process = started(folder, "shared", "train.epochs=2000", stdout=subprocess.DEVNULL)
    args = train_args(folder, folder / "s.zarr", "shared", "log.every=1", "train.epochs=2000")
    done = run(*spawned(2, *args), expect=2)
    assert done.stderr.count("another job is training in this run folder") == 1
    assert f"process {process.pid} on {socket.gethostname()}" in done.stderr
    before = metrics(folder / "shared")[-1]["step"]
    process.terminate()
    assert process.wait(30) == 75
    steps = [line["step"] for line in metrics(folder / "shared")]
    assert steps == list(range(1, len(steps) + 1))
    assert saved_steps(folder / "shared")[0] == steps[-1] >= before


def test_lines_are_taken_while_a_checkpoint_waits_for_a_slow_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    slow, over = threading.Event(), threading.Event()

    def fsync(_: int) -> None:
        slow.set()
        assert over.wait(30)

    with Sinks(
        tmp_path, Config(log=LogConfig(wandb="disabled", tensorboard=False)), 10, 0, Ranks()
    ) as looked_at:
        monkeypatch.setattr(os, "fsync", fsync)
        saving = threading.Thread(target=looked_at.flush_to_disk)
        saving.start()
        assert slow.wait(30)
        looked_at.write_numbers("train", 1, {"loss": 0.5, "data_wait": 0.0, "cells_per_s": 1.0})
        assert saving.is_alive()
        over.set()
        saving.join()
    assert [line["step"] for line in metrics(tmp_path)] == [1]


def test_an_earlier_attempt_of_the_same_job_is_waited_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SLURM_JOB_ID", "77")
    went_in = threading.Event()

    def again() -> None:
        with hold_run_lock(tmp_path, Ranks()):
            went_in.set()

    with hold_run_lock(tmp_path, Ranks()):
        later = threading.Thread(target=again)
        later.start()
        assert not went_in.wait(1.5)
        assert later.is_alive(), "it was refused"
    assert went_in.wait(20)
    later.join()
    monkeypatch.setattr(run_lock, "EARLIER_ATTEMPT_LIMIT", 1.0)
    with (
        hold_run_lock(tmp_path, Ranks()),
        pytest.raises(ResumeError, match="Slurm job 77"),
        hold_run_lock(tmp_path, Ranks()),
    ):
        raise AssertionError("not reached")


def test_a_sink_that_cannot_be_imported_is_left(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with Sinks(tmp_path, Config(), 10, 0, Ranks()) as sinks:
        sinks.write_numbers("validation", 1, {"loss": 0.5})
    said = capsys.readouterr().out
    assert "wandb is off from here on" in said
    assert "TensorBoard is off from here on" in said
    assert metrics(tmp_path, "validation") == [{"step": 1, "split": "validation", "loss": 0.5}]


def test_without_its_server_wandb_goes_offline(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with socket.socket() as dead:
        dead.bind(("127.0.0.1", 0))  # and nobody listens
        monkeypatch.setenv("WANDB_BASE_URL", f"http://127.0.0.1:{dead.getsockname()[1]}")
        monkeypatch.setenv("WANDB_API_KEY", "a" * 40)
        monkeypatch.delenv("WANDB_MODE", raising=False)
        monkeypatch.setattr(wandb_run, "WANDB_WAIT", 3)
        with Sinks(tmp_path, Config(log=LogConfig(wandb="online")), 10, 0, Ranks()) as looked_at:
            looked_at.write_numbers("train", 1, {"loss": 0.5})
    assert "wandb is offline" in capsys.readouterr().out
    (recorded,) = tmp_path.glob("wandb/offline-run-*/*.wandb")
    assert recorded.stat().st_size > 0
    assert metrics(tmp_path) == [{"step": 1, "split": "train", "loss": 0.5}]


def test_a_run_folder_that_is_not_shared_is_told_on_all_ranks(tmp_path: Path) -> None:
    code = f"""
        from pathlib import Path
        from clue_dist.errors import ResumeError
        from clue_dist.ranks import Ranks
        from clue_dist.resilience.run_lock import hold_run_lock
        ranks = Ranks.from_environment().join_group()
        try:
            with hold_run_lock(Path({str(tmp_path)!r}) / f"disk-of-{{ranks.rank}}", ranks):
                print("went in")
        except ResumeError as error:
            print(error)
        ranks.leave_group()
    """
    for output in run_ranks(2, code):
        assert "not the same on all machines" in output
        assert "rank 1 does not see what rank 0 writes" in output
        assert "went in" not in output
