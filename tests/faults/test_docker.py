"""The Dockerfiles: what they promise, and training in the CPU variant.

Where a Docker engine answers, it builds the image. Elsewhere the same steps are carried out in a
clean Debian.
"""

from __future__ import annotations

import re
import runpy
import shutil
import subprocess
import time
import uuid
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from signal import SIGKILL, SIGTERM

import pytest
from packaging.utils import canonicalize_name

from clue_dist.checkpoint import run_folder
from clue_dist.store.manifest_parts import FileDigest
from clue_dist.store.writer import hash_file
from tests.distributed.command import ROOT, launched, metrics, train_args
from tests.faults.clean_root import CleanRoot, Container, copied, instructions, let_in, missing
from tests.faults.command import saved_steps
from tests.faults.needs import skip_or_fail
from tests.pins import read_pins
from tests.ports import find_free_port
from tests.stores import make_store

DOCKERFILES = ("Dockerfile", "Dockerfile.cpu")
BUILD = pytest.mark.timeout(900)  # the first test that asks for an image waits for it
ENDLESS = ("train.epochs=10000", "train.patience=0", "log.every=1", "train.checkpoint_every=100000")


def rests(dockerfile: str, name: str) -> list[str]:
    return [
        rest for n, rest in instructions((ROOT / "docker" / dockerfile).read_text()) if n == name
    ]


@pytest.mark.parametrize("dockerfile", DOCKERFILES)
def test_base_and_packages_are_pinned(dockerfile: str) -> None:
    (base,) = rests(dockerfile, "FROM")
    assert re.fullmatch(
        r"[\w/]+:([a-z]+-\d{8}|\d+\.\d+\.\d+)(-[\w.]+)*(@sha256:[0-9a-f]{64})?", base
    )
    installs = [
        part
        for run in rests(dockerfile, "RUN")
        for part in run.split("&&")
        if "pip install" in part
    ]
    assert len(installs) == 3
    assert all(
        "-c constraints.txt" in part or "--no-deps --no-build-isolation" in part
        for part in installs
    )


@pytest.mark.parametrize("dockerfile", DOCKERFILES)
def test_it_runs_as_a_user_with_stores_and_runs_mounted(dockerfile: str) -> None:
    assert rests(dockerfile, "USER") == ["clue"]
    assert rests(dockerfile, "VOLUME") == ['["/stores", "/runs"]']


@pytest.mark.parametrize("dockerfile", DOCKERFILES)
def test_all_that_is_copied_is_let_in(dockerfile: str) -> None:
    for rest in rests(dockerfile, "COPY"):
        for source in rest.split()[:-1]:
            assert list(copied(ROOT, source)), source


def test_nothing_else_is_let_in() -> None:
    ignore = (ROOT / ".dockerignore").read_text()
    for path in ("clue_dist/data/plan.py", "docker/entrypoint.py", "constraints.txt"):
        assert let_in(path, ignore)
    for path in (
        ".git/config",
        ".venv/bin/python",
        "runs/a/x",
        "data/pbmc/x",
        "tests/stores.py",
        "docker/Dockerfile",
    ):
        assert not let_in(path, ignore)
    assert not let_in("clue_dist/data/__pycache__/plan.cpython-311.pyc", ignore)


def test_the_variants_differ_in_base_and_torch() -> None:
    """So that what is tested of one holds for the other."""
    cuda, cpu = (instructions((ROOT / "docker" / d).read_text()) for d in DOCKERFILES)
    alone = [
        f"{i.name} {i.rest.split()[0]} {i.rest.split()[1]}"
        for i in cpu
        if i not in cuda and i.name == "RUN"
    ]
    assert alone == ["RUN apt-get update", "RUN pip install", "RUN useradd --create-home"]
    assert [i for i in cpu if i not in cuda and i.name not in ("RUN", "FROM")] == [
        ("ENV", "DS_ACCELERATOR=cpu"),
        ("ARG", "TORCH_INDEX="),
    ]
    assert [i.name for i in cuda if i not in cpu] == ["FROM", "RUN", "RUN", "RUN"]


@pytest.mark.parametrize(
    ("command", "expected"),
    [
        ("/opt/venv/bin/python3.11 -u launch/train.py --local_rank=0 --config c.json", True),
        ("python launch/train.py --config c.json", True),
        (
            "/opt/venv/bin/python /opt/venv/bin/deepspeed --num_accelerators 2 launch/train.py",
            False,
        ),
        ("python -u -m deepspeed.launcher.launch --world_info=e30= launch/train.py", False),
        ("python docker/entrypoint.py deepspeed launch/train.py", False),
        ("python launch/embed.py --run train.py", False),
        ("tail -f train.py", False),
        ("python /opt/venv/bin/clue train --config atlas", True),
        ("python -u -m clue_dist.commands.train --local_rank=0 --config atlas", True),
        ("python /opt/venv/bin/clue embed --run train", False),
        ("python", False),
    ],
)
def test_what_is_a_rank(command: str, expected: bool) -> None:
    assert (
        runpy.run_path(str(ROOT / "docker/entrypoint.py"))["is_training_command"](command.split())
        is expected
    )


def test_what_the_clean_root_makes_of_a_dockerfile(tmp_path: Path) -> None:
    text = "# a\nFROM debian:x\nRUN a \\\n# b\n && b\n\ncopy x y\n"
    assert instructions(text) == [("FROM", "debian:x"), ("RUN", "a  && b"), ("COPY", "x y")]
    (tmp_path / "Dockerfile").write_text("ADD a b\n")
    with pytest.raises(NotImplementedError, match="ADD"):
        CleanRoot(tmp_path / "root", ROOT, {}).build(tmp_path / "Dockerfile")


@dataclass
class Engine:
    """The same as CleanRoot, by Docker."""

    tag: str

    def build(self, dockerfile: Path) -> None:
        subprocess.run(
            ["docker", "build", "-f", dockerfile, "-t", self.tag, ROOT], check=True, timeout=800
        )

    def start(self, *command: str, volumes: Sequence[str] = ()) -> Container:
        name = f"clue-dist-{uuid.uuid4().hex[:8]}"
        mounts = [f"--volume={volume}" for volume in volumes]
        docker = [
            "docker",
            "run",
            "--rm",
            "--name",
            name,
            "--network",
            "host",
            *mounts,
            self.tag,
            *command,
        ]
        commands: dict[int, list[str]] = {
            SIGTERM: ["stop", "-t", "60", name],
            SIGKILL: ["kill", name],
        }
        return Container(
            docker,
            lambda _, number: subprocess.run(["docker", *commands[number]], capture_output=True),
        )

    def remove(self) -> None:
        subprocess.run(["docker", "image", "rm", "--force", self.tag], capture_output=True)


def engine_answers() -> bool:
    if shutil.which("docker") is None:
        return False
    return (
        subprocess.run(
            ["docker", "info", "--format", "{{.ServerVersion}}"], capture_output=True
        ).returncode
        == 0
    )


@pytest.fixture(scope="module")
def image(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Engine | CleanRoot]:
    if engine_answers():
        made: Engine | CleanRoot = Engine(f"clue_dist_test:{uuid.uuid4().hex[:8]}")
    else:
        if lacking := missing(ROOT / "constraints.txt"):
            skip_or_fail(f"no Docker engine answers, and no clean root: {lacking}")
        # pip finds torch for CPUs where this machine's pip is told to look
        made = CleanRoot(tmp_path_factory.mktemp("docker") / "root", ROOT, {"TORCH_INDEX": ""})
    try:
        made.build(ROOT / "docker/Dockerfile.cpu")
        yield made
    finally:
        made.remove()


@dataclass
class Mounts:
    stores: Path
    runs: Path

    @property
    def volumes(self) -> list[str]:
        return [f"{self.stores}:/stores:ro", f"{self.runs}:/runs"]

    def training(self, name: str, *settings: str) -> list[str]:
        """launch/train.py and its arguments as they read in the container."""
        script, _, config, *rest = train_args(self.runs, Path("/stores/s.zarr"), name, *settings)
        return [script, "--config", f"/runs/{Path(config).name}", *rest, f"run=/runs/{name}"]


@pytest.fixture(scope="module")
def mounts(tmp_path_factory: pytest.TempPathFactory) -> Mounts:
    folder = tmp_path_factory.mktemp("mounts")
    made = Mounts(folder / "stores", folder / "runs")
    made.stores.mkdir()
    made.runs.mkdir()
    made.runs.chmod(0o777)  # whoever the container's user is here
    make_store(
        made.stores / "s.zarr", cells={"rna+adt": 220, "rna": 60}, features={"rna": 60, "adt": 10}
    )
    return made


def hashes(folder: Path) -> dict[Path, FileDigest]:
    return {path: hash_file(path) for path in sorted(folder.rglob("*")) if path.is_file()}


@BUILD
def test_versions_are_the_pinned_ones(image: Engine | CleanRoot) -> None:
    code, output = image.start("pip", "list", "--format=freeze").finish(60)
    assert code == 0, output
    found = dict(line.split("==") for line in output.splitlines())
    found = {canonicalize_name(name): version for name, version in found.items()}
    assert {"torch", "deepspeed", "zarr", "tensorstore"} < found.keys()
    pins = read_pins()
    loose = {n for n, v in found.items() if n not in pins or v not in pins[n].specifier}
    assert loose <= {"pip", "clue-dist"}


@BUILD
def test_it_may_write_to_runs_alone(image: Engine | CleanRoot, mounts: Mounts) -> None:
    folders = "/stores /opt/clue_dist /opt/venv /runs"
    script = f'id -u; for d in {folders}; do touch "$d/x" && echo "wrote $d"; done; true'
    code, output = image.start("bash", "-c", script, volumes=mounts.volumes).finish(60)
    lines = [line for line in output.splitlines() if not line.startswith("touch:")]
    assert (code, lines) == (0, ["1000", "wrote /runs"])


@BUILD
def test_it_needs_no_home(image: Engine | CleanRoot, mounts: Mounts) -> None:
    """The package belongs to root: compiled code has neither place."""
    command = ["python", "-m", "data_prep", "simulate", "--out", "/runs/homeless.zarr"]
    code, output = image.start(
        "env", "HOME=/nowhere", *command, "--cells", "200", volumes=mounts.volumes
    ).finish(240)
    assert code == 0, output
    assert output.count("compiled code goes to") == 1


@BUILD
def test_it_trains(image: Engine | CleanRoot, mounts: Mounts) -> None:
    before = hashes(mounts.stores)
    command = launched(2, *mounts.training("tiny", "train.epochs=3", "log.every=1"))
    code, output = image.start(*command, volumes=mounts.volumes).finish(240)
    assert code == 0, output
    run = mounts.runs / "tiny"
    assert len(metrics(run)) == metrics(run)[-1]["step"] > 5
    assert run_folder.find_damage(run / "checkpoints" / f"step-{saved_steps(run)[0]:08d}") is None
    assert {path.stat().st_uid for path in [run, *run.rglob("*")]} == {1000}
    assert hashes(mounts.stores) == before


@BUILD
def test_the_commands_of_the_readme_typed_as_they_stand(
    image: Engine | CleanRoot, mounts: Mounts
) -> None:
    """`docker run`, `docker stop`, `docker start`, but without --gpus and the image of GPUs."""
    make_store(
        mounts.stores / "S.zarr", cells={"rna+adt": 120, "rna": 40}, features={"rna": 60, "adt": 10}
    )
    block = (
        (ROOT / "docs/cluster.md")
        .read_text()
        .partition("docker build -f docker/Dockerfile -t clue_dist .\n")[2]
    )
    typed, stop, start = (
        line for line in block.partition("```")[0].replace("\\\n", " ").splitlines()
    )
    options, _, command = typed.partition(" clue_dist ")
    assert options.startswith("docker run --name NAME ")
    assert {"STORES:/stores:ro", "RUNS:/runs"} <= set(options.split())
    assert (stop.split("#")[0].split(), start.split("#")[0].split()) == (
        ["docker", "stop", "-t", "60", "NAME"],
        ["docker", "start", "-a", "NAME"],
    )
    container = image.start(*command.split(), volumes=mounts.volumes)
    try:
        wait_for_step(mounts.runs / "NAME", 3, container)  # logged every so many steps
        container.stop()
        code, said = container.finish(60)
    finally:
        container.kill()
    assert code == 75, said
    (reached, *_) = saved_steps(mounts.runs / "NAME")
    assert f"saved at step {reached}" in said
    code, said = image.start(*command.split(), volumes=mounts.volumes).finish(240)
    assert code == 0, said
    assert f"going on from step {reached}" in said


@BUILD
def test_two_nodes_are_stopped_by_one_container_and_go_on(
    image: Engine | CleanRoot, mounts: Mounts
) -> None:
    (mounts.runs / "hosts").write_text("one slots=1\ntwo slots=1\n")
    training = mounts.training("nodes", *ENDLESS)
    reached = 0
    for node in (1, 0):  # whichever is stopped
        containers = start_nodes(image, mounts, training)
        try:
            wait_for_step(mounts.runs / "nodes", reached + 5, containers[0])
            containers[node].stop()
            ended = [container.finish(60) for container in containers]
        finally:
            for container in containers:
                container.kill()
        said = "\n".join(output for _, output in ended)
        assert [code for code, _ in ended] == [75, 75], said
        assert f"saved at step {saved_steps(mounts.runs / 'nodes')[0]}" in said
        assert not reached or f"going on from step {reached}" in said
        reached = saved_steps(mounts.runs / "nodes")[0]
        assert metrics(mounts.runs / "nodes")[-1]["step"] == reached


def start_nodes(image: Engine | CleanRoot, mounts: Mounts, training: list[str]) -> list[Container]:
    port = str(find_free_port())
    nodes = [
        "deepspeed",
        "--hostfile",
        "/runs/hosts",
        "--no_ssh",
        "--master_addr",
        "127.0.0.1",
        "--master_port",
        port,
    ]
    return [
        image.start(*nodes, "--node_rank", rank, *training, volumes=mounts.volumes)
        for rank in ("0", "1")
    ]


def wait_for_step(run: Path, step: int, container: Container, timeout: float = 120) -> None:
    """Until so many steps are logged, one a line."""
    log, deadline = run / "metrics.jsonl", time.monotonic() + timeout
    while not log.exists() or log.read_bytes().count(b"\n") < step:
        assert time.monotonic() < deadline, container.output()
        assert container.running, container.output()
        time.sleep(0.2)
