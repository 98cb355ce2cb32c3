"""Asked to stop under the deepspeed launcher, all ranks save at the end of the step."""

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


def start_training(folder: Path, name: str, shell: str) -> subprocess.Popen[bytes]:
    """Start two ranks from a shell, as a person does, and wait until they have logged some steps.

    Args:
        shell: What is typed before the command.
    """
    settings = ("log.every=1", "train.epochs=9999", f"run={folder / name}")
    arguments = train_args(folder, folder / "s.zarr", name, *settings)
    # A terminal does not have SIGINT ignored, whatever runs the tests may do.
    terminal = ["env", "--default-signal=INT", "bash", "-c", f'{shell}\n"$@"', "bash"]
    process = subprocess.Popen(
        [*terminal, *launched(2, *arguments)],
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


def require_last_step_saved(folder: Path, name: str, asked: float) -> None:
    """Require that no step is lost, and that the last one was committed in time."""
    saved = saved_steps(folder / name)[0]
    assert saved == metrics(folder / name)[-1]["step"]
    marker = folder / name / "checkpoints" / f"step-{saved:08d}" / "COMMIT.json"
    assert marker.stat().st_mtime - asked < 25


@pytest.mark.parametrize(("moment", "code"), [("start", 75), ("end", 0)])
def test_signals_are_heeded_before_the_first_step_and_after_the_last(
    folder: Path, moment: str, code: int
) -> None:
    arguments = train_args(folder, folder / "s.zarr", moment, "log.every=1", "train.epochs=2")
    done = run(*planted(2, arguments, f"term:1:{moment}"), expect=code)
    saved = saved_steps(folder / moment)
    assert saved == [metrics(folder / moment)[-1]["step"]]
    assert saved == [1] if code else "finished at step" in done.stdout


def test_usr1_to_all_as_the_docs_say_ends_with_75(folder: Path) -> None:
    process, asked = start_training(folder, "usr1", "trap '' USR1"), time.time()
    run("pkill", "-USR1", "-f", f"launch/train.py.*run={folder / 'usr1'}( |$)")
    assert process.wait(40) == 75
    require_last_step_saved(folder, "usr1", asked)


def test_term_to_the_launcher_saves_in_the_time_it_gives(folder: Path) -> None:
    process, asked = start_training(folder, "term", ":"), time.time()
    children = psutil.Process(process.pid).children(recursive=True)
    (launcher,) = (child for child in children if "deepspeed.launcher.launch" in child.cmdline())
    launcher.terminate()
    assert process.wait(40) != 0
    require_last_step_saved(folder, "term", asked)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_the_whole_group_is_signalled_as_by_a_batch_system_or_ctrl_c(
    folder: Path, number: signal.Signals
) -> None:
    process, asked = start_training(folder, number.name, ":"), time.time()
    children = psutil.Process(process.pid).children(recursive=True)
    ranks = [child for child in children if "--local_rank" in " ".join(child.cmdline())]
    os.killpg(process.pid, number)
    assert process.wait(40) != 0
    _, alive = psutil.wait_procs(ranks, timeout=25)
    assert not alive
    require_last_step_saved(folder, number.name, asked)
