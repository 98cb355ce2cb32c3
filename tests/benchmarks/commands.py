"""Commands that benchmarks start, and the environments that other methods need."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import IO, Any

from clue_dist.errors import ClueError
from tests.benchmarks.kept import compute_digest, make_once
from tests.distributed.command import ROOT, environment

POOLS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")


class BenchmarkError(ClueError):
    """A run of a benchmark that failed."""

    exit_code = 1


def run_command(command: Sequence[str | Path], log: Path, threads: int) -> float:
    """Run a command in the repository's root, its output at the end of `log`; seconds it took.

    Raises:
        BenchmarkError: it did not exit with 0; the message has the tail of the log.
    """
    words = [str(word) for word in command]
    with log.open("a") as output:
        print("$", *words, file=output, flush=True)
        began = time.monotonic()
        with start_process(words, output, threads) as process:
            try:
                code = process.wait()
            except BaseException:
                os.killpg(process.pid, signal.SIGTERM)
                raise
        seconds = time.monotonic() - began
    if code:
        where, tail = " ".join(words), read_tail(log)
        raise BenchmarkError(f"exit code {code}", where=where, got=f"\n{tail}", fix=f"see {log}")
    return seconds


def start_process(words: Sequence[str], output: IO[Any], threads: int) -> subprocess.Popen[bytes]:
    """Start a command in the repository's root."""
    env, nothing = environment() | dict.fromkeys(POOLS, str(threads)), subprocess.DEVNULL
    streams = {"stdin": nothing, "stdout": output, "stderr": output}
    # A session of its own, so that a signal can reach all that the command starts (ranks).
    return subprocess.Popen(words, cwd=ROOT, env=env, **streams, start_new_session=True)


def read_tail(log: Path, lines: int = 15) -> str:
    return "\n".join(log.read_text(errors="replace").splitlines()[-lines:])


def read_last_json(log: Path) -> dict[str, Any]:
    """The last line of a log that is a JSON object: the result that a probe printed."""
    lines = [line for line in log.read_text().splitlines() if line.startswith("{")]
    if not lines:
        raise BenchmarkError("a probe printed no result", where=log, got=f"\n{read_tail(log)}")
    return dict(json.loads(lines[-1]))


def install_python(requirements: Path, work: Path, version: str | None = None) -> Path:
    """The Python of an environment with the pins of a file, made if need be.

    version: "3.12" where another Python than this one is needed.
    """

    def install(folder: Path) -> None:
        print(f"installing {requirements.name} into {folder}: takes minutes", flush=True)
        log, pip = folder.with_name(f"{folder.name}.log"), [folder / "bin/python", "-m", "pip"]
        pip += ["install", "--quiet", "--disable-pip-version-check"]
        run_command(
            [find_python(version) if version else sys.executable, "-m", "venv", folder], log, 1
        )
        # torch goes first: as somebody else's dependency it may bring gigabytes of CUDA along.
        if torch := [pin for pin in read_pins(requirements) if pin.startswith("torch==")]:
            run_command([*pip, *torch], log, 1)
        run_command([*pip, "--requirement", requirements], log, 1)
        for pin in read_lone_pins(requirements):
            run_command([*pip, "--no-deps", pin], log, 1)

    name = f"{requirements.stem}-{compute_digest(requirements)[:8]}"
    return make_once(work / "venvs" / name, install) / "bin/python"


def find_python(version: str) -> Path:
    """An installed Python of a version such as "3.12": from PATH, or one that pyenv keeps.

    Raises:
        BenchmarkError: there is none that starts.
    """
    name = f"python{version}"
    pyenv = Path(os.environ.get("PYENV_ROOT", Path.home() / ".pyenv")) / "versions"
    folders = [*map(Path, os.get_exec_path()), *sorted(pyenv.glob(f"{version}*/bin"))]
    found = [folder / name for folder in folders if (folder / name).exists()]
    for path in found:
        # pyenv's shims are found but refuse to start a version that is not switched on.
        if subprocess.run([path, "-c", "import venv"], capture_output=True).returncode == 0:
            return path
    ways = f"`uv python install {version}`, `pyenv install {version}`, or `apt install {name}-venv`"
    raise BenchmarkError(
        f"no Python {version} here, which a peer needs",
        got=", ".join(f"{path}, which does not start" for path in found) or f"no {name} on PATH",
        fix=f"install it so that `{name}` is on PATH: {ways}",
    )


def read_pins(requirements: Path) -> list[str]:
    """The packages of an environment, those that come alone among them."""
    lines = requirements.read_text().splitlines()
    pins = [line for line in lines if line and not line.startswith("#")]
    return pins + read_lone_pins(requirements)


def read_lone_pins(requirements: Path) -> list[str]:
    """Packages that are installed without what they ask for, on lines "# --no-deps NAME==..."."""
    return re.findall(r"^# --no-deps (\S+)", requirements.read_text(), re.MULTILINE)
