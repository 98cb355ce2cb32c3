"""What is made once and kept under a work folder: folders, JSON, and the digests that name them."""

import fcntl
import hashlib
import json
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from clue_dist.files import write_file


@contextmanager
def lock_folder(folder: Path) -> Iterator[None]:
    """Wait until no other process holds a folder; a lock goes with its process."""
    path = folder.with_name(f"{folder.name}.lock")
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            print(f"waiting for another process that is making {folder}", flush=True)
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def make_once(folder: Path, make: Callable[[Path], None], mark: str = ".done") -> Path:
    """Fill a folder by `make` unless it is filled; what was broken off is begun anew."""
    with lock_folder(folder):
        if not (folder / mark).exists():
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir()
            make(folder)
            (folder / mark).touch()
    return folder


def write_json(path: Path, content: Any) -> None:
    """Write a whole JSON file or none; numbers that are not finite become null."""
    path.parent.mkdir(parents=True, exist_ok=True)
    # What JSON lacks is written as NaN or Infinity, and read back as null.
    known = json.loads(json.dumps(content), parse_constant=lambda name: None)
    write_file(path, f"{json.dumps(known, indent=1)}\n", unique=True)


def compute_digest(*parts: Path | str) -> str:
    """Digest texts, files, and all in folders but caches and pages: what a result follows from.

    Raises:
        FileNotFoundError: a file or folder is not there, so the list of parts is out of date.
    """
    total = hashlib.sha256()
    for part in parts:
        for name, content in [("", part.encode())] if isinstance(part, str) else _read_files(part):
            total.update(f"{name}\0{len(content)}\0".encode() + content)
    return total.hexdigest()


def _read_files(path: Path) -> Iterator[tuple[str, bytes]]:
    inside = sorted(found for found in path.rglob("*") if found.is_file())
    for file in inside if path.is_dir() else [path]:
        if "__pycache__" not in file.parts and file.suffix != ".md":
            yield str(file.relative_to(path.parent)), file.read_bytes()
