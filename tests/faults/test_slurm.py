"""launch/slurm/train.sbatch on a real Slurm of two nodes.

A job that is preempted, signalled or short of a rank comes back.
"""

from __future__ import annotations

import os
import re
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from tests.distributed.command import (
    ROOT,
    best_weights,
    largest_difference,
    metrics,
    run,
    spawned,
    train_args,
    write_quick_python,
)
from tests.faults.command import saved_steps, timeless, write_small_recipe
from tests.faults.jobs import find_last_step
from tests.faults.needs import needs
from tests.faults.slurm import Slurm, cluster, daemon, missing
from tests.stores import make_store

pytestmark = needs(missing())

SAVE_EVERY = 50
# 60 steps; 290 cells are trained on.
SETTINGS = (f"train.epochs={60 * 64 / 290}", "log.every=1", f"train.checkpoint_every={SAVE_EVERY}")
# Steps take a while but little CPU: what a test does to a job meets it in mid run.
SLOW_TRAINING = f"""
import runpy, sys
plant, train = {str(ROOT / "tests/faults/plant.py")!r}, {str(ROOT / "launch/train.py")!r}
sys.argv = [plant, "pause:0.1", "--", train, *sys.argv[1:]]
runpy.run_path(plant, run_name="__main__")
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("slurm")
    make_store(
        folder / "s.zarr",
        cells={"rna+adt": 200, "rna": 60, "adt": 40},
        features={"rna": 60, "adt": 10},
    )
    run(*spawned(2, *args_of(folder, "whole")))
    return folder


@pytest.fixture(scope="module")
def slurm(folder: Path) -> Iterator[Slurm]:
    """A cluster on which jobs are submitted in a folder like the project's."""
    project = folder / "project"
    for made in ("project/launch", "project/.venv/bin", "cluster"):
        (folder / made).mkdir(parents=True)
    (project / "launch" / "slurm").symlink_to(ROOT / "launch" / "slurm")
    (project / "launch" / "train.py").write_text(SLOW_TRAINING)
    write_quick_python(project / ".venv" / "bin")
    with cluster(folder / "cluster", project) as slurm:
        yield slurm


def args_of(folder: Path, name: str) -> list[str]:
    return train_args(folder, folder / "s.zarr", name, *SETTINGS)


def submitted(slurm: Slurm, folder: Path, name: str, *settings: str, **variables: str) -> str:
    """A job on both nodes that trains into run `name`, once it has logged some steps."""
    script = (
        "--nodes=2",
        "--ntasks-per-node=1",
        f"--output={folder}/{name}.out",
        "launch/slurm/train.sbatch",
    )
    job = slurm.submit(*script, *args_of(folder, name)[1:], *settings, **variables)
    await_steps(slurm, folder, name, job, 10)
    return job


def await_steps(slurm: Slurm, folder: Path, name: str, job: str, beyond: int) -> None:
    deadline = time.monotonic() + 90
    while find_last_step(folder / name) <= beyond:
        state = slurm.state(job)["JobState"]
        assert state in ("PENDING", "CONFIGURING", "RUNNING"), (state, output(folder, name))
        assert time.monotonic() < deadline, output(folder, name)
        time.sleep(0.2)


def output(folder: Path, name: str) -> str:
    path = folder / f"{name}.out"
    return path.read_text() if path.exists() else "no output"


def ends_like_the_unbroken_run(slurm: Slurm, folder: Path, name: str, job: str) -> None:
    state = slurm.wait(job, 180)
    assert (state["JobState"], state["ExitCode"], state["Restarts"]) == ("COMPLETED", "0:0", "1"), (
        output(folder, name)
    )
    assert timeless(folder / name) == timeless(folder / "whole")
    assert largest_difference(best_weights(folder / name), best_weights(folder / "whole")) == 0.0


@pytest.mark.parametrize(
    ("how", "words"),
    [("requeue", ()), ("USR1", ("--resume", "never")), ("TERM", ())],
    ids=["requeue", "USR1", "TERM"],
)
def test_stopped_in_time_it_comes_back_by_itself_and_loses_no_step(
    slurm: Slurm, folder: Path, how: str, words: tuple[str, ...]
) -> None:
    """Also where its command says that it begins anew: a later attempt goes on."""
    # Nothing is saved but what the stop saves, at whichever step it comes.
    job = submitted(slurm, folder, how, "train.checkpoint_every=9999", *words)
    asked = time.time()
    if how == "requeue":
        slurm.run("scontrol", "requeue", job)
    else:
        slurm.run("scancel", f"--signal={how}", job)
    newest = await_commit(folder / how, asked)
    assert newest.stat().st_mtime - asked < 25
    stopped_at = metrics(folder / how)[-1]["step"]
    assert saved_steps(folder / how)[0] == stopped_at  # not one step is done again
    ends_like_the_unbroken_run(slurm, folder, how, job)
    assert f"going on from step {stopped_at}" in (folder / f"{how}.out").read_text()
    if how != "requeue":
        assert "exit code 75: back into the queue" in (folder / f"{how}.out").read_text()


def await_commit(run_folder: Path, asked: float) -> Path:
    """The marker of the first checkpoint that was saved after somebody asked for it."""
    deadline = time.monotonic() + 60
    while True:
        for path in run_folder.glob("checkpoints/step-????????/COMMIT.json"):
            if path.stat().st_mtime > asked:
                return path
        assert time.monotonic() < deadline, run_folder
        time.sleep(0.05)


def test_a_rank_that_is_killed_brings_the_job_back(slurm: Slurm, folder: Path) -> None:
    job = submitted(slurm, folder, "killed")
    os.kill(rank_of(folder / "killed", 1), signal.SIGKILL)
    ends_like_the_unbroken_run(slurm, folder, "killed", job)


@pytest.mark.parametrize(("save_every", "ends"), [("9999", "FAILED"), ("5", "COMPLETED")])
def test_losses_end_the_job_only_where_no_checkpoint_comes_between(
    slurm: Slurm, folder: Path, save_every: str, ends: str
) -> None:
    """One loss is allowed here, and two ranks are killed."""
    name = f"losses-{ends}"
    job = submitted(slurm, folder, name, f"train.checkpoint_every={save_every}", MAX_LOSSES="1")
    os.kill(rank_of(folder / name, 1), signal.SIGKILL)
    said, deadline = folder / f"{name}.out", time.monotonic() + 90
    while (
        len(begun := re.findall(r"(?:starting|going on from step (\d+)): ", said.read_text())) < 2
    ):
        assert time.monotonic() < deadline, output(folder, name)
        time.sleep(0.1)
    await_steps(slurm, folder, name, job, int(begun[-1] or 0) + 10)
    os.kill(rank_of(folder / name, 1), signal.SIGKILL)
    state = slurm.wait(job, 120)
    assert (state["JobState"], state["Restarts"]) == (ends, "1" if ends == "FAILED" else "2"), (
        output(folder, name)
    )
    assert state["ExitCode"] in (("0:0",) if ends == "COMPLETED" else ("76:0", "137:0")), output(
        folder, name
    )
    assert not list(slurm.project.glob(f".losses-{job}"))


def rank_of(run_folder: Path, rank: int) -> int:
    """The process of a rank that trains into a run folder."""
    for process in psutil.process_iter(["cmdline"]):
        words = process.info["cmdline"] or []
        if (
            "launch/train.py" in words
            and any(str(run_folder) in w for w in words)
            and "srun" not in words[0]
        ):
            try:
                if process.environ().get("SLURM_PROCID") == str(rank):
                    return process.pid
            except psutil.Error:  # it ended while we looked
                continue
    raise AssertionError("no such process")


def test_an_error_that_starting_again_does_not_mend_is_told_once(
    slurm: Slurm, folder: Path
) -> None:
    job = slurm.submit(
        "--nodes=2",
        f"--output={folder}/wrong.out",
        "launch/slurm/train.sbatch",
        *args_of(folder, "wrong")[1:],
        "train.lrr=1",
    )
    state = slurm.wait(job, 60)
    assert (state["JobState"], state["ExitCode"], state["Restarts"]) == ("FAILED", "2:0", "0")
    assert output(folder, "wrong").count("did you mean `train.lr`?") == 1


def test_a_damaged_chunk_is_told_once_and_not_tried_again(slurm: Slurm, folder: Path) -> None:
    """In the project's own folder: what torch prints is decided before it is imported."""
    store = make_store(
        folder / "torn.zarr",
        cells={"rna+adt": 200, "rna": 60},
        features={"rna": 60, "adt": 10},
        block_cells=16,
    )
    shard = store.root / "strata/rna/rna/codes/c/0/0"
    data = bytearray(shard.read_bytes())
    data[3] ^= 0x10
    shard.write_bytes(data)
    args = [*args_of(folder, "torn")[1:], f"store={store.root}"]
    script = ("--nodes=2", f"--output={folder}/torn.out", "launch/slurm/train.sbatch")
    job = slurm.submit(*script, *args, folder=ROOT)
    state = slurm.wait(job, 120)
    said = output(folder, "torn")
    assert (state["JobState"], state["ExitCode"], state["Restarts"]) == ("FAILED", "2:0", "0"), said
    assert said.count("error: part of the store is missing or damaged") == 1
    assert "array rna/codes, blocks 0 to 3 (cells 0 to 63)" in said
    assert "Traceback" not in said
    assert "frame #0" not in said  # how torch warns that rank 0 is gone


def test_cancelled_for_good_it_has_saved(slurm: Slurm, folder: Path) -> None:
    job = submitted(slurm, folder, "cancelled")
    slurm.run("scancel", job)
    assert slurm.wait(job, 60)["JobState"] == "CANCELLED"
    # Slurm calls a job cancelled while its ranks are still saving.
    deadline = time.monotonic() + 40
    while not saved_steps(folder / "cancelled") and time.monotonic() < deadline:
        time.sleep(0.1)
    assert saved_steps(folder / "cancelled")[0] == metrics(folder / "cancelled")[-1]["step"]


def test_the_command_of_the_readme_typed_as_it_stands(slurm: Slurm, tmp_path: Path) -> None:
    """Four ranks on two nodes, in a folder like the project's, with the store that it names."""
    for name in ("launch", ".venv"):
        (tmp_path / name).symlink_to(ROOT / name)
    write_small_recipe(tmp_path)
    make_store(
        tmp_path / "atlas.zarr", cells={"rna+adt": 120, "rna": 40}, features={"rna": 60, "adt": 10}
    )
    text = (ROOT / "docs/cluster.md").read_text().partition("## Slurm")[2].partition("```\n")[2]
    command = text.partition("```")[0]
    assert command.startswith("sbatch ")
    job = slurm.run("bash", "-c", command, cwd=tmp_path).stdout.split()[-1]
    state = slurm.wait(job, 300)
    said = (tmp_path / f"slurm-{job}.out").read_text()
    assert (state["JobState"], state["ExitCode"], state["NumTasks"]) == ("COMPLETED", "0:0", "4"), (
        said[-3000:]
    )
    assert "finished at step" in said
    assert (
        saved_steps(tmp_path / "runs" / "atlas")[0]
        == metrics(tmp_path / "runs" / "atlas")[-1]["step"]
    )


def test_time_that_runs_out_is_no_loss(slurm: Slurm, folder: Path) -> None:
    """By Slurm's own clock there is one minute.

    Slurm looks every half minute whether less than that and these 10 s are left, which is later
    than the ranks need to start.
    """
    limits = (
        "--time=1",
        "--signal=USR1@10",
        "--nodes=2",
        "--ntasks-per-node=1",
        f"--output={folder}/limit.out",
    )
    job = slurm.submit(
        *limits, "launch/slurm/train.sbatch", *args_of(folder, "limit")[1:], "train.epochs=9999"
    )
    said, deadline = folder / "limit.out", time.monotonic() + 180
    while "going on from step" not in (said.read_text() if said.exists() else ""):
        assert time.monotonic() < deadline, output(folder, "limit")
        time.sleep(0.2)
    slurm.run("scancel", job)
    slurm.wait(job, 60)
    first = said.read_text().partition("going on from step ")
    assert "exit code 75: back into the queue" in first[0]
    stopped_at = int(first[2].split(":")[0])
    assert f"asked to stop: saved at step {stopped_at}," in first[0]
    assert [line["step"] for line in metrics(folder / "limit")] == list(
        range(1, metrics(folder / "limit")[-1]["step"] + 1)
    )


def test_a_node_that_dies_brings_the_job_back_once_there_are_two_again(
    slurm: Slurm, folder: Path
) -> None:
    job = submitted(slurm, folder, "dead")
    slurm.power_off("two")
    died = time.monotonic()
    while slurm.processes("one"):  # the rank that is left, and the batch script
        assert time.monotonic() - died < 60, output(folder, "dead")
        time.sleep(0.2)
    assert "task 0: Exited with exit code 76" in (folder / "dead.out").read_text()
    with daemon(slurm, slurm.folder, "slurmd", "-D", "-N", "two"):
        state = slurm.wait(job, 240)
        assert (state["JobState"], state["ExitCode"]) == ("COMPLETED", "0:0"), output(
            folder, "dead"
        )
        assert int(state["Restarts"]) >= 1
        assert timeless(folder / "dead") == timeless(folder / "whole")
        assert (
            largest_difference(best_weights(folder / "dead"), best_weights(folder / "whole")) == 0.0
        )
