"""`deepspeed --hostfile` over pdsh on two hosts: one dies, the job ends in time, and goes on."""

from __future__ import annotations

import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.distributed.command import ROOT, metrics, train_args
from tests.faults.command import saved_steps, timeless
from tests.faults.hosts import INTERFACE, Host, explain_missing_hosts, open_two_hosts
from tests.faults.needs import needs
from tests.ports import find_free_port
from tests.stores import make_store

pytestmark = needs(explain_missing_hosts())

SAVE_EVERY = 20
SETTINGS = ("train.epochs=60", "log.every=1")
LAST_STEP = 272


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("hosts")
    make_store(
        folder / "s.zarr",
        cells={"rna+adt": 200, "rna": 60, "adt": 40},
        features={"rna": 60, "adt": 10},
    )
    (folder / "hostfile").write_text("one slots=1\ntwo slots=1\n")
    (folder / "environment").write_text(f"GLOO_SOCKET_IFNAME={INTERFACE}\nOMP_NUM_THREADS=1")
    return folder


@pytest.fixture
def hosts(folder: Path, tmp_path: Path) -> Iterator[tuple[Host, Host]]:
    with open_two_hosts(tmp_path) as hosts:
        yield hosts


def start_training(
    host: Host, folder: Path, name: str, *launcher: str, save_every: int = SAVE_EVERY
) -> subprocess.Popen[bytes]:
    """Start `deepspeed launch/train.py` as typed on a host."""
    variables = ["env", f"DS_ENV_FILE={folder / 'environment'}"]
    settings = (*SETTINGS, f"train.checkpoint_every={save_every}")
    arguments = train_args(folder, folder / "s.zarr", name, *settings)
    output = folder / f"{name}.out"
    return host.start_command(*variables, "deepspeed", *launcher, *arguments, output=output)


def use_both_hosts(folder: Path) -> tuple[str, ...]:
    """Write the options of `deepspeed` for both hosts."""
    return (f"--hostfile={folder / 'hostfile'}", f"--master_port={find_free_port()}")


def await_steps(folder: Path, name: str, count: int) -> None:
    """Wait until a run has logged more than `count` steps."""
    log, deadline = folder / name / "metrics.jsonl", time.monotonic() + 90
    while not (log.exists() and log.read_text().count("\n") > count):
        assert time.monotonic() < deadline, read_output(folder, name)
        time.sleep(0.05)


def find_commits(run: Path) -> dict[int, float]:
    """Find the checkpoints of a run: when each was committed, by step."""
    return {
        int(path.parent.name[5:]): path.stat().st_mtime
        for path in run.glob("checkpoints/step-????????/COMMIT.json")
    }


def read_output(folder: Path, name: str) -> str:
    return (folder / f"{name}.out").read_text()


@pytest.mark.parametrize("victim", [1, 0], ids=["the other host", "the host of rank 0"])
def test_a_host_dies_and_the_job_goes_on_with_the_one_that_is_left(
    folder: Path, hosts: tuple[Host, Host], victim: int
) -> None:
    name, left = f"dies{victim}", hosts[1 - victim]
    # Typed on the host that is left, so that there is an exit code to look at.
    job = start_training(left, folder, name, *use_both_hosts(folder))
    await_steps(folder, name, 50)
    died = time.monotonic()
    hosts[victim].cut_power()
    code = job.wait(60)
    took = time.monotonic() - died
    output = read_output(folder, name)
    assert code != 0, output
    assert took < 30, output
    assert "another rank is lost" in output
    newest = saved_steps(folder / name)[0]
    # Lost are the checkpoint that was being saved as the host died, and the steps since.
    assert newest >= metrics(folder / name)[-1]["step"] - 2 * SAVE_EVERY

    alone = ("--num_accelerators", "1", f"--master_port={find_free_port()}")
    again = start_training(left, folder, name, *alone)
    assert again.wait(120) == 0, read_output(folder, name)
    assert f"going on from step {newest}, saved by 2 ranks" in read_output(folder, name)
    assert [line["step"] for line in timeless(folder / name)] == list(range(1, LAST_STEP + 1))


def test_stopped_from_the_command_line_all_hosts_save(
    folder: Path, hosts: tuple[Host, Host]
) -> None:
    # Nothing is saved but what the stop saves, at whichever step it comes.
    job = start_training(hosts[0], folder, "stopped", *use_both_hosts(folder), save_every=1000)
    await_steps(folder, "stopped", 30)
    asked = time.time()
    job.send_signal(signal.SIGTERM)  # to `deepspeed` itself, which has its hosts stopped
    assert job.wait(40) != 0
    while not (commits := find_commits(folder / "stopped")):
        assert time.time() - asked < 40, read_output(folder, "stopped")
        time.sleep(0.1)
    newest = max(commits)
    assert newest < LAST_STEP
    assert commits[newest] - asked < 25
    time.sleep(1)  # nothing more is trained
    assert newest == metrics(folder / "stopped")[-1]["step"] == saved_steps(folder / "stopped")[0]


def test_the_commands_of_the_docs_typed_as_they_stand(tmp_path: Path, folder: Path) -> None:
    """In a folder like the project's; a host dies, and its line is taken out as the docs say."""
    (tmp_path / "net").mkdir()
    for name in ("launch", "configs"):
        (tmp_path / name).symlink_to(ROOT / name)
    make_store(
        tmp_path / "atlas.zarr", cells={"rna+adt": 120, "rna": 40}, features={"rna": 60, "adt": 10}
    )
    (tmp_path / ".deepspeed_env").write_text(f"GLOO_SOCKET_IFNAME={INTERFACE}\nOMP_NUM_THREADS=1")
    section = (ROOT / "docs/cluster.md").read_text().partition("## Hosts without a scheduler")[2]
    copy, command = section.partition("```\n")[2].partition("```")[0].splitlines()
    assert copy == "cp launch/hostfile.example hostfile"
    subprocess.run(copy.split(), cwd=tmp_path, check=True)
    hostfile = tmp_path / "hostfile"
    named = (
        hostfile.read_text()
        .replace("node1 slots=4", "one slots=1")
        .replace("node2 slots=4", "two slots=1")
    )
    hostfile.write_text(named)
    output, log = tmp_path / "output", tmp_path / "runs" / "atlas" / "metrics.jsonl"
    with open_two_hosts(tmp_path / "net") as (one, two):
        job = one.start_command("bash", "-c", command, output=output, folder=tmp_path)
        deadline = time.monotonic() + 120
        while not (log.exists() and log.read_text().count("\n") > 3):
            assert job.poll() is None, output.read_text()
            assert time.monotonic() < deadline
            time.sleep(0.05)
        two.cut_power()
        assert job.wait(40) != 0
        hostfile.write_text(named.replace("two slots=1\n", ""))
        again = one.start_command("bash", "-c", command, output=output, folder=tmp_path)
        assert again.wait(240) == 0, output.read_text()[-3000:]
    assert "another rank is lost" in output.read_text()
    assert "finished at step" in output.read_text()
    steps = [line["step"] for line in metrics(tmp_path / "runs" / "atlas")]
    assert steps == sorted(set(steps))
