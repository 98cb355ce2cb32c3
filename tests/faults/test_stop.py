"""Asked to stop under the deepspeed launcher: all ranks save at the end of the step, no step is lost."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from pathlib import Path

import psutil
import pytest

from tests.distributed.command import ROOT, environment, launched, metrics, run, train_args
from tests.faults.command import planted, saved_steps
from tests.stores import make_store


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("stop")
    make_store(
        folder / "s.zarr",
        cells={"rna+adt": 200, "rna": 60, "adt": 40},
        features={"rna": 60, "adt": 10},
    )
    return folder


def started(folder: Path, name: str, shell: str) -> subprocess.Popen[bytes]:
    """Two ranks, by a shell as a person has it, once they have logged some steps."""
    args = train_args(
        folder, folder / "s.zarr", name, "log.every=1", "train.epochs=9999", f"run={folder / name}"
    )
    # As in a terminal, whatever runs the tests
    command = [
        "env",
        "--default-signal=INT",
        "bash",
        "-c",
        f'{shell}\n"$@"',
        "bash",
        *launched(2, *args),
    ]
    process = subprocess.Popen(
        command,
        cwd=ROOT,
        env=environment(),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    log, deadline = folder / name / "metrics.jsonl", time.monotonic() + 90
    while not (log.exists() and log.read_text().count("\n") > 10):
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.02)
    return process


@pytest.mark.parametrize(("moment", "code"), [("start", 75), ("end", 0)])
def test_signals_are_heeded_before_the_first_step_and_after_the_last(
    folder: Path, moment: str, code: int
) -> None:
    args = train_args(folder, folder / "s.zarr", moment, "log.every=1", "train.epochs=2")
    done = run(*planted(2, args, f"term:1:{moment}"), expect=code)
    saved = saved_steps(folder / moment)
    assert saved == [metrics(folder / moment)[-1]["step"]]
    assert saved == [1] if code else "finished at step" in done.stdout


def nothing_lost(folder: Path, name: str, asked: float) -> None:
    saved = saved_steps(folder / name)[0]
    assert saved == metrics(folder / name)[-1]["step"]
    marker = folder / name / "checkpoints" / f"step-{saved:08d}" / "COMMIT.json"
    assert marker.stat().st_mtime - asked < 25


def test_usr1_to_all_as_the_readme_tells_ends_with_75(folder: Path) -> None:
    process, asked = started(folder, "usr1", "trap '' USR1"), time.time()
    run("pkill", "-USR1", "-f", f"launch/train.py.*run={folder / 'usr1'}( |$)")
    assert process.wait(40) == 75
    nothing_lost(folder, "usr1", asked)


def test_term_to_the_launcher_saves_in_the_time_it_gives(folder: Path) -> None:
    process, asked = started(folder, "term", ":"), time.time()
    below = psutil.Process(process.pid).children(recursive=True)
    (launcher,) = (p for p in below if "deepspeed.launcher.launch" in p.cmdline())
    launcher.terminate()
    assert process.wait(40) != 0
    nothing_lost(folder, "term", asked)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_the_whole_group_is_signalled_as_by_a_batch_system_or_ctrl_c(
    folder: Path, number: signal.Signals
) -> None:
    process, asked = started(folder, number.name, ":"), time.time()
    ranks = [
        p
        for p in psutil.Process(process.pid).children(recursive=True)
        if "--local_rank" in " ".join(p.cmdline())
    ]
    os.killpg(process.pid, number)
    assert process.wait(40) != 0
    _, alive = psutil.wait_procs(ranks, timeout=25)
    assert not alive
    nothing_lost(folder, number.name, asked)
