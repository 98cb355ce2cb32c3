"""Carries out a Dockerfile without Docker: its steps run by chroot in a fresh Debian.

debootstrap makes that Debian. Mounts live in a mount namespace of the step's own and vanish with
it, so that removing the root cannot reach through one. Of Dockerfiles it knows what
docker/Dockerfile.cpu uses; anything else is an error.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
import urllib.request
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from signal import SIGKILL, SIGTERM
from string import Template
from typing import NamedTuple

import psutil

DEFAULT_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
BASE = re.compile(r"debian:(?P<suite>[a-z]+)-\d{8}-slim(@sha256:[0-9a-f]{64})?")
PROXIES = ("http_proxy", "https_proxy", "no_proxy", "HTTP_PROXY", "HTTPS_PROXY", "NO_PROXY")

IN_NAMESPACES = ("unshare", "--mount", "--pid", "--fork")

# $1 root, $2 user:group, $3 working folder, then volumes as Docker writes them, --, the command.
# Docker gives 64 MB of shared memory, too.
CHROOT = """
root=$1 user=$2 folder=$3; shift 3
mount -t proc proc "$root/proc"
mount -t sysfs -o ro sysfs "$root/sys"
mount -t tmpfs -o mode=1777,size=64m tmpfs "$root/dev/shm"
while [ "$1" != -- ]; do
  IFS=: read -r from to mode <<<"$1"; shift
  mkdir -p "$root$to"
  mount --bind "$from" "$root$to"
  [ "$mode" != ro ] || mount -o remount,bind,ro "$root$to"
done
shift
exec chroot --userspec="$user" --groups= "$root" env --chdir="$folder" "$@"
"""


class Instruction(NamedTuple):
    name: str
    rest: str


def instructions(text: str) -> list[Instruction]:
    """Of a Dockerfile, comments left out and continued lines joined as Docker does it."""
    lines = [line for line in text.splitlines() if not line.lstrip().startswith("#")]
    joined = "\n".join(lines).replace("\\\n", "")
    found = [line.strip().partition(" ") for line in joined.splitlines() if line.strip()]
    return [Instruction(name.upper(), rest.strip()) for name, _, rest in found]


def let_in(path: str, ignore: str) -> bool:
    """Whether a .dockerignore leaves a file in the build: the last pattern that fits decides."""
    parts = Path(path).parts
    candidates = ["/".join(parts[: i + 1]) for i in range(len(parts))]
    kept = True
    for line in ignore.splitlines():
        if not line.strip() or line.startswith("#"):
            continue
        pattern = re.escape(line.strip().removeprefix("!"))
        pattern = pattern.replace(r"\*\*/", "(.*/)?").replace(r"\*", "[^/]*").replace(r"\?", "[^/]")
        if any(re.fullmatch(pattern, candidate) for candidate in candidates):
            kept = line.startswith("!")
    return kept


def copied(context: Path, source: str) -> Iterator[tuple[Path, str]]:
    """The files that COPY takes of a source, each with its path in the source."""
    ignore = (context / ".dockerignore").read_text()
    start = context / source
    files = sorted(p for p in start.rglob("*") if p.is_file()) if start.is_dir() else [start]
    for file in files:
        if let_in(str(file.relative_to(context)), ignore):
            yield file, str(file.relative_to(start)) if start.is_dir() else file.name


class Container:
    """A command that was started in one. `signal` sends TERM as `docker stop` does it, and KILL."""

    def __init__(
        self,
        command: Sequence[str],
        signal: Callable[[subprocess.Popen[bytes], int], object],
        env: Mapping[str, str] | None = None,
    ) -> None:
        self._signal = signal
        self._log = tempfile.TemporaryFile()  # noqa: SIM115  read when the command has ended
        self._process = subprocess.Popen(
            command, env=env, stdin=subprocess.DEVNULL, stdout=self._log, stderr=subprocess.STDOUT
        )

    @property
    def running(self) -> bool:
        return self._process.poll() is None

    def stop(self) -> None:
        self._signal(self._process, SIGTERM)

    def kill(self) -> None:
        if self.running:
            self._signal(self._process, SIGKILL)
            self._process.wait()

    def finish(self, timeout: float) -> tuple[int, str]:
        """Exit code and output; it is killed if it takes longer."""
        try:
            code = self._process.wait(timeout)
        except subprocess.TimeoutExpired:
            raise TimeoutError(self.output()) from None
        finally:
            self.kill()
        return code, self.output()

    def output(self) -> str:
        self._log.seek(0)
        return self._log.read().decode(errors="replace")


@dataclass
class CleanRoot:
    """A root folder and what the instructions carried out so far say about commands in it."""

    root: Path
    context: Path
    build_args: Mapping[str, str]
    env: dict[str, str] = field(default_factory=lambda: {"PATH": DEFAULT_PATH})
    args: dict[str, str] = field(default_factory=dict)
    shell: list[str] = field(default_factory=lambda: ["/bin/sh", "-c"])
    folder: str = "/"
    user: str = "root"
    entrypoint: list[str] = field(default_factory=list)

    def build(self, dockerfile: Path) -> None:
        for name, rest in instructions(dockerfile.read_text()):
            step = getattr(self, f"step_{name.lower()}", None)
            if step is None:
                raise NotImplementedError(f"{dockerfile.name}: {name}")
            step(rest)

    def start(self, *command: str, volumes: Sequence[str] = ()) -> Container:
        """As `docker run` starts it, under the image's entry point."""
        return self._start([*self.entrypoint, *command], self.env, volumes)

    def remove(self) -> None:
        inside = [
            line
            for line in Path("/proc/self/mounts").read_text().splitlines()
            if f" {self.root}/" in line
        ]
        assert not inside, f"still mounted: {inside}"
        if self.root.exists():
            shutil.rmtree(self.root)

    def _start(
        self, command: Sequence[str], env: Mapping[str, str], volumes: Sequence[str]
    ) -> Container:
        uid, gid, home = self._account()
        arguments = [str(self.root), f"{uid}:{gid}", self.folder, *volumes, "--", *command]
        inside = [*IN_NAMESPACES, "bash", "-euc", CHROOT, "chroot", *arguments]
        return Container(inside, signal_first, {"HOME": home, **env})

    def _account(self) -> tuple[int, int, str]:
        accounts = [line.split(":") for line in (self.root / "etc/passwd").read_text().splitlines()]
        (account,) = [a for a in accounts if self.user in (a[0], a[2])]
        return int(account[2]), int(account[3]), account[5]

    def _expand(self, text: str) -> str:
        return Template(text).substitute({**self.args, **self.env})

    def _inside(self, path: str) -> Path:
        """A path of the root as seen from outside; one that a link leads out of it is refused."""
        found = (self.root / os.path.join(self.folder, path).lstrip("/")).resolve()
        assert found.is_relative_to(self.root.resolve()), found
        return found

    def step_from(self, rest: str) -> None:
        base = BASE.fullmatch(rest)
        assert base, f"debootstrap has nothing like {rest}"
        make_debian(self.root, base["suite"])

    def step_arg(self, rest: str) -> None:
        name, _, default = rest.partition("=")
        self.args[name] = self.build_args.get(name, self._expand(default))

    def step_env(self, rest: str) -> None:
        pairs = [word.split("=", 1) for word in shlex.split(self._expand(rest))]
        self.env.update((name, value) for name, value in pairs)

    def step_shell(self, rest: str) -> None:
        self.shell = json.loads(rest)

    def step_run(self, rest: str) -> None:
        assert not re.match(r"--|\[|<<", rest), f"RUN {rest}"
        outside, volumes = of_this_machine()
        step = self._start([*self.shell, rest], {**outside, **self.args, **self.env}, volumes)
        code, output = step.finish(timeout=600)
        assert code == 0, f"exit {code}: RUN {rest}\n{output[-3000:]}"

    def step_workdir(self, rest: str) -> None:
        self.folder = os.path.join(self.folder, self._expand(rest))
        self._inside(".").mkdir(parents=True, exist_ok=True)

    def step_copy(self, rest: str) -> None:
        assert not rest.startswith(("--", "[")), f"COPY {rest}"
        *sources, target = self._expand(rest).split()
        for source in sources:
            is_folder = (self.context / source).is_dir() or target.endswith("/")
            for file, name in copied(self.context, source):
                to = self._inside(target) / name if is_folder else self._inside(target)
                to.parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(file, to)

    def step_user(self, rest: str) -> None:
        self.user = self._expand(rest)

    def step_volume(self, rest: str) -> None:
        for path in json.loads(rest):
            self._inside(path).mkdir(parents=True, exist_ok=True)

    def step_stopsignal(self, rest: str) -> None:
        assert rest == "SIGTERM", f"STOPSIGNAL {rest}"

    def step_entrypoint(self, rest: str) -> None:
        self.entrypoint = json.loads(rest)

    def step_cmd(self, rest: str) -> None:
        json.loads(rest)  # every command of a test is its own


def signal_first(unshare: subprocess.Popen[bytes], number: int) -> None:
    """To process 1 of the namespace: when it ends, all others in there do, and their mounts go."""
    for first in psutil.Process(unshare.pid).children():
        first.send_signal(number)


def mirror() -> str:
    """Where this machine gets Debian from."""
    files = [Path("/etc/apt/sources.list"), *Path("/etc/apt/sources.list.d").glob("*.sources")]
    text = "\n".join(file.read_text() for file in files if file.exists())
    found = re.search(r"^(?:deb|URIs:)\s.*?(https?://\S+/debian/?)(?:\s|$)", text, re.MULTILINE)
    return found[1] if found else "http://deb.debian.org/debian"


def make_debian(root: Path, suite: str) -> None:
    command = ["debootstrap", "--variant=minbase", suite, str(root), mirror()]
    code, output = Container([*IN_NAMESPACES, *command], signal_first).finish(timeout=600)
    assert code == 0, output[-3000:]
    root.chmod(0o755)  # whatever the umask
    for name in ("resolv.conf", "hosts"):
        shutil.copy(Path("/etc", name), root / "etc" / name)
    asked = subprocess.run(
        ["apt-config", "dump", "Acquire"], capture_output=True, text=True, check=True
    )
    settings = [
        line
        for line in asked.stdout.splitlines()
        if re.search(r"::(proxy|check-)", line, re.IGNORECASE)
    ]
    (root / "etc/apt/apt.conf.d/99-of-this-machine").write_text("\n".join(settings) + "\n")


def of_this_machine() -> tuple[dict[str, str], list[str]]:
    """How pip reaches packages from here: variables, and volumes under /host for their folders."""
    asked = subprocess.run(
        [sys.executable, "-m", "pip", "config", "list"], capture_output=True, text=True, check=True
    )
    pairs = [line.split("=", 1) for line in asked.stdout.splitlines()]
    pairs.sort(key=lambda pair: pair[0].startswith(":env:"))  # the environment overrides files
    settings = {re.split(r"[.]", name)[-1]: shlex.split(value)[0] for name, value in pairs}
    env = {f"PIP_{name.upper().replace('-', '_')}": value for name, value in settings.items()}
    env |= {name: os.environ[name] for name in PROXIES if name in os.environ}
    folders: set[Path] = set()

    def moved(word: re.Match[str]) -> str:
        if not Path(word[2]).exists():
            return word[0]
        folders.add(Path(word[2]).parent)  # an index points at files beside it
        return f"{word[1] or ''}/host{word[2]}"

    env = {name: re.sub(r"(?<!\S)(file://)?(/\S+)", moved, value) for name, value in env.items()}
    top = [f for f in sorted(folders) if not folders.intersection(f.parents)]
    return env, [f"{folder}:/host{folder}:ro" for folder in top]


def missing(constraints: Path) -> str | None:
    """What this machine lacks for a clean root."""
    if os.geteuid() != 0:
        return "not root"
    programs = [
        name
        for name in ("debootstrap", "unshare", "chroot", "apt-config")
        if shutil.which(name) is None
    ]
    if programs:
        return f"no {', '.join(programs)}"
    if not Path("/usr/share/keyrings/debian-archive-keyring.gpg").exists():
        return "no debian-archive-keyring"
    if subprocess.run([*IN_NAMESPACES, "true"], capture_output=True).returncode != 0:
        return "no namespaces allowed"
    try:
        urllib.request.urlopen(f"{mirror().rstrip('/')}/dists/bookworm/Release", timeout=20).close()
    except OSError as error:
        return f"Debian's archive: {error}"
    pip = [
        sys.executable,
        "-m",
        "pip",
        "install",
        "--dry-run",
        "--ignore-installed",
        "--no-deps",
        "--retries",
        "1",
    ]
    if (
        subprocess.run([*pip, "--constraint", constraints, "six"], capture_output=True).returncode
        != 0
    ):
        return "no package index answers"
    return None
