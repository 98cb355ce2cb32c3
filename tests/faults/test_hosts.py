"""`deepspeed --hostfile` over pdsh on two hosts: one dies, the job ends in time, and goes on where a host is left."""

from __future__ import annotations

import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.distributed.command import ROOT, metrics, train_args
from tests.faults.command import saved_steps, timeless
from tests.faults.hosts import INTERFACE, Host, missing, two_hosts
from tests.faults.needs import needs
from tests.faults.slurm import free_port
from tests.stores import make_store

pytestmark = needs(missing())

SETTINGS = ("train.epochs=60", "log.every=1", "train.checkpoint_every=20")  # 270 steps


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
    with two_hosts(tmp_path) as hosts:
        yield hosts


def trained(host: Host, folder: Path, name: str, *launcher: str) -> subprocess.Popen[bytes]:
    """`deepspeed launch/train.py` as typed on a host."""
    env = ["env", f"DS_ENV_FILE={folder / 'environment'}"]
    args = train_args(folder, folder / "s.zarr", name, *SETTINGS)
    return host.start(*env, "deepspeed", *launcher, *args, out=folder / f"{name}.out")


def over_both(folder: Path) -> tuple[str, ...]:
    return (f"--hostfile={folder / 'hostfile'}", f"--master_port={free_port()}")


def await_steps(folder: Path, name: str, n: int) -> None:
    log, deadline = folder / name / "metrics.jsonl", time.monotonic() + 90
    while not (log.exists() and log.read_text().count("\n") > n):
        assert time.monotonic() < deadline, output(folder, name)
        time.sleep(0.05)


def committed_since(run: Path, when: float) -> dict[int, float]:
    """When checkpoints between the regular ones were committed, by step."""
    markers = {
        int(p.parent.name[5:]): p.stat().st_mtime
        for p in run.glob("checkpoints/step-????????/COMMIT.json")
    }
    return {step: at for step, at in markers.items() if at > when and step % 20}


def output(folder: Path, name: str) -> str:
    return (folder / f"{name}.out").read_text()


@pytest.mark.parametrize("which", [1, 0], ids=["the other host", "the host of rank 0"])
def test_a_host_dies_and_the_job_goes_on_with_the_one_that_is_left(
    folder: Path, hosts: tuple[Host, Host], which: int
) -> None:
    name, left = f"dies{which}", hosts[1 - which]
    typed_on = left  # where `deepspeed` runs, so that there is an exit code to look at
    job = trained(typed_on, folder, name, *over_both(folder))
    await_steps(folder, name, 50)
    died = time.monotonic()
    hosts[which].die()
    code = job.wait(60)
    took = time.monotonic() - died
    assert code != 0, output(folder, name)
    assert took < 30, output(folder, name)
    assert "another rank is lost" in output(folder, name)
    newest = saved_steps(folder / name)[0]
    assert (
        newest >= metrics(folder / name)[-1]["step"] - 40
    )  # the one being saved as the host died, and those since

    again = trained(left, folder, name, "--num_accelerators", "1", f"--master_port={free_port()}")
    assert again.wait(120) == 0, output(folder, name)
    assert f"going on from step {newest}, saved by 2 ranks" in output(folder, name)
    assert [line["step"] for line in timeless(folder / name)] == list(range(1, 272 + 1))


def test_stopped_from_the_command_line_all_hosts_save(
    folder: Path, hosts: tuple[Host, Host]
) -> None:
    job = trained(hosts[0], folder, "stopped", *over_both(folder))
    await_steps(folder, "stopped", 30)
    asked = time.time()
    job.send_signal(signal.SIGTERM)  # to `deepspeed` itself, which has its hosts told
    assert job.wait(40) != 0
    while not (saved := committed_since(folder / "stopped", asked)):
        assert time.time() - asked < 40, output(folder, "stopped")
        time.sleep(0.1)
    newest = max(saved)
    assert saved[newest] - asked < 25
    time.sleep(1)  # nothing more is trained
    assert newest == metrics(folder / "stopped")[-1]["step"] == saved_steps(folder / "stopped")[0]


def test_the_commands_of_the_docs_typed_as_they_stand(tmp_path: Path, folder: Path) -> None:
    """In a folder that looks like the project's; then a host dies, and its line is taken out as the docs say."""
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
    log = tmp_path / "runs" / "atlas" / "metrics.jsonl"
    with two_hosts(tmp_path / "net") as (one, two):
        job = one.start("bash", "-c", command, out=tmp_path / "said", cwd=tmp_path)
        deadline = time.monotonic() + 120
        while not (log.exists() and log.read_text().count("\n") > 3):
            assert job.poll() is None, (tmp_path / "said").read_text()
            assert time.monotonic() < deadline
            time.sleep(0.05)
        two.die()
        assert job.wait(40) != 0
        hostfile.write_text(named.replace("two slots=1\n", ""))
        again = one.start("bash", "-c", command, out=tmp_path / "said", cwd=tmp_path)
        assert again.wait(240) == 0, (tmp_path / "said").read_text()[-3000:]
    said = (tmp_path / "said").read_text()
    assert "another rank is lost" in said
    assert "finished at step" in said
    steps = [line["step"] for line in metrics(tmp_path / "runs" / "atlas")]
    assert steps == sorted(set(steps))
