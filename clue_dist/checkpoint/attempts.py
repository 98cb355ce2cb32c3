"""RUN/attempts.jsonl: a line for each time that training began or went on, for people to read."""

from __future__ import annotations

import importlib.metadata
import json
import platform
import shlex
import sys
import time
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path

from clue_dist.files import translate_write_errors

ATTEMPTS_FILE = "attempts.jsonl"
_PACKAGES = ("clue-dist", "torch", "deepspeed", "zarr", "anndata", "mudata", "numpy")


@dataclass(frozen=True)
class TrainingAttempt:
    """How training was started, and on what. A field that an earlier version lacked is empty."""

    step: int  # the step that it began after
    total_steps: int  # the step that it was to end at
    ranks: int
    device: str  # of rank 0
    train_cells: dict[str, int] = field(default_factory=dict)  # by segment of the store
    held_out_cells: dict[str, int] = field(default_factory=dict)
    time: str = ""  # local time, ISO 8601
    command: str = ""  # what each rank runs
    host: str = ""  # of rank 0
    versions: dict[str, str] = field(default_factory=dict)  # by package


def record_attempt(run_folder: Path, attempt: TrainingAttempt) -> None:
    """Add a line to the attempts of a run: what is given, and what this process knows of itself.

    Raises:
        SavingError: it cannot be written.
    """
    # The launcher adds --local_rank, which nobody types.
    words = [word for word in sys.argv if not word.startswith("--local_rank")]
    known = {
        "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "command": shlex.join(words),
        "host": platform.node(),
        "versions": list_versions(),
    }
    with (
        translate_write_errors(ATTEMPTS_FILE, run_folder),
        (run_folder / ATTEMPTS_FILE).open("a", encoding="utf-8", errors="surrogateescape") as file,
    ):
        file.write(json.dumps(asdict(attempt) | known) + "\n")


def read_attempts(run_folder: Path) -> list[TrainingAttempt]:
    """Read how training was started, the earliest first; none of a run of an earlier version."""
    path, attempts = run_folder / ATTEMPTS_FILE, []
    text = path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""
    for line in text.splitlines():
        try:
            attempts.append(TrainingAttempt(**json.loads(line)))
        except (ValueError, TypeError):  # half a line, or one of another version
            continue
    return attempts


def list_versions() -> dict[str, str]:
    """List the versions of Python, of this package and of those that results depend on."""
    versions = {"python": platform.python_version()}
    for name in _PACKAGES:
        with suppress(importlib.metadata.PackageNotFoundError):  # it runs from a bare checkout
            versions[name] = importlib.metadata.version(name)
    return versions
