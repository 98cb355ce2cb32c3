"""One conversion, or SVD, at a time in OUT.partial: claimed, told apart from other jobs, removed when it is done."""

from __future__ import annotations

import errno
import fcntl
import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from clue_dist.errors import DataError, StoreError, listed
from data_prep.files import make_folder, remove_leftovers

_DISK = {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EFBIG, errno.EACCES, errno.EIO}


@contextmanager
def job(out: Path, description: dict[str, Any], what: str = "conversion") -> Iterator[Path]:
    """Claim OUT.partial for the job of this `description` (JSON-able); yields the folder, removes it on success.

    what: the job is, for people.

    Raises:
        StoreError: OUT exists; another job was or is under way there; the disk is full.
        DataError: OUT.partial cannot be a folder.
    """
    partial = out.with_name(out.name + ".partial")
    if out.exists():
        if partial.exists() and not (partial / "store").exists():
            shutil.rmtree(partial)  # left by a run that was killed after its commit
        raise StoreError("something is already there", where=out, fix="choose another --out, or remove it")
    with _loud(partial):
        make_folder(partial)
        with _locked(partial, what):
            _same_as_before(partial / "job.json", description, what)
            remove_leftovers(partial)
            try:
                yield partial
            except DataError:
                shutil.rmtree(partial, ignore_errors=True)  # the inputs must change: nothing to go on with
                raise
            shutil.rmtree(partial)


@contextmanager
def _locked(folder: Path, what: str) -> Iterator[None]:
    with (folder / "lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            fix = "wait for it" + (", or choose another --out" if what == "conversion" else "")
            raise StoreError(f"another {what} is writing here now", where=folder, fix=fix) from None
        yield


def _same_as_before(path: Path, description: dict[str, Any], what: str) -> None:
    """Refuse to go on with another job than the one that was begun; write down a new one."""
    description = json.loads(json.dumps(description))
    if not path.exists():
        temporary = path.with_suffix(".tmp")
        temporary.write_text(json.dumps(description, indent=1))
        temporary.rename(path)
        return
    before = json.loads(path.read_text())
    changed = [key for key in description if before.get(key) != description[key]]
    if changed:
        raise StoreError(
            f"an interrupted {what} of other inputs or options is here",
            where=path.parent,
            got=f"a change of {listed(changed)}",
            fix=f"run it again as it was, or remove {path.parent.name} to start afresh",
        )


@contextmanager
def _loud(folder: Path) -> Iterator[None]:
    """Say in plain words that the disk is full; every file that matters is renamed into place, so nothing is torn."""
    try:
        yield
    except OSError as error:
        if error.errno not in _DISK and "written" not in str(error):  # NumPy's short writes carry no number
            raise
        fix = "free some space, then run the same command again: it goes on"
        raise StoreError("the disk is full or refuses to be written", where=folder, got=error, fix=fix) from error
