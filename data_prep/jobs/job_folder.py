"""One conversion, addition or SVD at a time in OUT.partial: claimed, told apart from other jobs, removed when done.

OUT.partial/lock                     held while a job is at work
OUT.partial/job.json                 what the job is; another one is refused
OUT.partial/<digest of that>/        its files: a worker that was given up, but goes on, writes where nobody else looks
"""

from __future__ import annotations

import fcntl
import glob
import hashlib
import json
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from clue_dist.errors import DataError, StoreError, list_names
from clue_dist.files import translate_disk_errors, write_file
from data_prep.jobs.whole_files import make_folder, remove_leftovers

_JOB = "job.json"


@contextmanager
def claim_job(out: Path, description: dict[str, Any], what: str = "conversion") -> Iterator[Path]:
    """Claim OUT.partial for the job of this `description` (JSON-able); yields a folder in it, removes all on success.

    what: the job is, for people.

    Raises:
        StoreError: OUT exists, or has no name; another job was or is under way there; the disk is full.
        DataError: OUT.partial cannot be a folder.
    """
    partial = find_partial_folder(out)
    if out.exists():
        if not any(partial.glob("*/store")):
            discard_job(partial)  # left by a run that was killed after its commit
        raise StoreError(
            "something is already there", where=out, fix="choose another --out, or remove it"
        )
    fix = "free some space, then run the same command again: it goes on"
    with translate_disk_errors(partial, fix):
        make_folder(partial)
        with _locked(partial, what):
            description = normalise_json(description)
            _same_as_before(partial, description, what)
            remove_leftovers(partial)
            folder = partial / _digest(description)
            folder.mkdir(exist_ok=True)
            try:
                yield folder
            except DataError:
                discard_job(partial)  # the inputs must change: nothing to go on with
                raise
            discard_job(partial)


def find_partial_folder(out: Path) -> Path:
    """The folder beside OUT in which the job is at work.

    Raises:
        StoreError: OUT has no name of its own: it is the folder one is in, or one above it.
    """
    if out.name in ("", ".."):
        fix = "name a folder that is not there yet"
        raise StoreError(
            "the output needs a name", where="--out", got=out, expected="STORE.zarr, say", fix=fix
        )
    return out.with_name(out.name + ".partial")


def normalise_json(description: dict[str, Any]) -> dict[str, Any]:
    """As it is read again from a file."""
    found: dict[str, Any] = json.loads(json.dumps(description))
    return found


def read_job(partial: Path) -> dict[str, Any] | None:
    """What the job in a folder is, if there is one."""
    path = partial / _JOB
    if not path.exists():
        return None
    found: dict[str, Any] = json.loads(path.read_text())
    return found


def discard_job(partial: Path) -> None:
    """Remove the folder of a job, which nobody finds from the first moment on."""
    away = partial.with_name(f"{partial.name}.{uuid.uuid4().hex[:8]}.tmp")
    with suppress(FileNotFoundError):
        partial.rename(away)
    for left in partial.parent.glob(
        f"{glob.escape(partial.name)}.*.tmp"
    ):  # also by those killed in the midst of it
        shutil.rmtree(left, ignore_errors=True)


def _digest(description: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(description, sort_keys=True).encode()).hexdigest()[:12]


@contextmanager
def _locked(folder: Path, what: str) -> Iterator[None]:
    with (folder / "lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            fix = "wait for it" + (", or choose another --out" if what == "conversion" else "")
            raise StoreError(f"another {what} is writing here now", where=folder, fix=fix) from None
        yield


def _same_as_before(partial: Path, description: dict[str, Any], what: str) -> None:
    """Refuse to go on with another job than the one that was begun; write down a new one."""
    before = read_job(partial)
    if before is None:
        write_file(partial / _JOB, json.dumps(description, indent=1))
        return
    changed = [key for key in description if before.get(key) != description[key]]
    if changed:
        raise StoreError(
            f"an interrupted {what} of other inputs or options is here",
            where=partial,
            got=f"a change of {list_names(changed)}",
            fix=f"run it again as it was, or remove {partial.name} to start afresh",
        )
