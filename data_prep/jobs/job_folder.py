"""One conversion, addition or SVD at a time in OUT.partial, which is removed when it is done.

OUT.partial/lock                     held while a job is at work
OUT.partial/job.json                 what the job is; another job is refused
OUT.partial/<digest of job.json>/    files of the job. A worker that was given up may go on writing,
                                     but where no other job looks
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
from clue_dist.files import TEMPORARY_ENDING, translate_disk_errors, write_file
from data_prep.jobs.whole_folders import make_folder, remove_leftovers

_JOB = "job.json"


@contextmanager
def claim_job(out: Path, description: dict[str, Any], what: str = "conversion") -> Iterator[Path]:
    """Claim OUT.partial for a job, and remove it once the job has succeeded.

    Args:
        out: what the job makes.
        description: description of the job, JSON-able: all that decides the result.
        what: the job is, for messages.

    Yields:
        A folder in OUT.partial, with what an interrupted run of the same job left.

    Raises:
        StoreError: OUT exists, or has no name; another job was or is under way there; the disk is
            full.
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
        with _hold_lock(partial, what):
            description = normalise_json(description)
            _require_same_job(partial, description, what)
            remove_leftovers(partial)
            # Workers of a job with another description, even late ones, write to another folder.
            folder = partial / _hash_description(description)
            folder.mkdir(exist_ok=True)
            try:
                yield folder
            except DataError:
                discard_job(partial)  # the inputs must change, so what is done will be of no use
                raise
            discard_job(partial)


def find_partial_folder(out: Path) -> Path:
    """The folder beside OUT in which the job is at work.

    Raises:
        StoreError: OUT has no name of its own: it is the current folder, or one above it.
    """
    if out.name in ("", ".."):
        raise StoreError(
            "the output needs a name",
            where="--out",
            got=out,
            expected="STORE.zarr, say",
            fix="name a folder that is not there yet",
        )
    return out.with_name(out.name + ".partial")


def normalise_json(description: dict[str, Any]) -> dict[str, Any]:
    """A description as it comes back from a file: tuples are lists there, and keys are texts."""
    normalised: dict[str, Any] = json.loads(json.dumps(description))
    return normalised


def read_job(partial: Path) -> dict[str, Any] | None:
    """The description of the job in OUT.partial; None where there is no job."""
    path = partial / _JOB
    if not path.exists():
        return None
    description: dict[str, Any] = json.loads(path.read_text())
    return description


def discard_job(partial: Path) -> None:
    """Remove OUT.partial. It is renamed first, so that no other process finds half of it."""
    doomed = partial.with_name(f"{partial.name}.{uuid.uuid4().hex[:8]}{TEMPORARY_ENDING}")
    with suppress(FileNotFoundError):
        partial.rename(doomed)
    # Processes that were killed while they removed a job left such folders too.
    for folder in partial.parent.glob(f"{glob.escape(partial.name)}.*{TEMPORARY_ENDING}"):
        shutil.rmtree(folder, ignore_errors=True)


def _hash_description(description: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(description, sort_keys=True).encode()).hexdigest()[:12]


@contextmanager
def _hold_lock(folder: Path, what: str) -> Iterator[None]:
    with (folder / "lock").open("w") as file:
        try:
            # The system drops this lock when the process ends, in whatever way.
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            fix = "wait for it" + (", or choose another --out" if what == "conversion" else "")
            raise StoreError(f"another {what} is writing here now", where=folder, fix=fix) from None
        yield


def _require_same_job(partial: Path, description: dict[str, Any], what: str) -> None:
    """Refuse to go on with another job than the one that was begun; write down a new one."""
    begun = read_job(partial)
    if begun is None:
        write_file(partial / _JOB, json.dumps(description, indent=1))
        return
    changed = [key for key in description if begun.get(key) != description[key]]
    if changed:
        raise StoreError(
            f"an interrupted {what} of other inputs or options is here",
            where=partial,
            got=f"a change of {list_names(changed)}",
            fix=f"run it again as it was, or remove {partial.name} to start afresh",
        )
