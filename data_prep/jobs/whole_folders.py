"""Folders that exist whole or not at all, whoever else writes the same one."""

from __future__ import annotations

import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from clue_dist.errors import DataError
from clue_dist.files import TEMPORARY_ENDING


def make_folder(folder: Path) -> None:
    """Make a folder and those above it, where they are missing.

    Raises:
        DataError: a file is in the way, permission is lacking, the name is too long.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        what, fix = "the folder cannot be made", "choose another --out"
        raise DataError(what, where=folder, got=error, fix=fix) from None


@contextmanager
def make_whole_folder(final: Path) -> Iterator[Path]:
    """Yield a new folder to fill, which becomes `final` at the end; a failure leaves nothing.

    If another worker was faster, its folder stays: a task that runs twice gives the same bytes.
    """
    temporary = final.with_name(f"{final.name}.{uuid.uuid4().hex[:8]}{TEMPORARY_ENDING}")
    temporary.mkdir(parents=True)
    try:
        yield temporary
        try:
            temporary.rename(final)
        except OSError:  # a folder that is not empty cannot be replaced
            if not final.exists():
                raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def remove_leftovers(folder: Path) -> None:
    """Remove what killed writers left unfinished under `folder`.

    The endings are those of this project, of zarr-python and of TensorStore.
    """
    endings = (f"*{TEMPORARY_ENDING}", "*.partial", "*.__lock")
    for path in [path for ending in endings for path in folder.rglob(ending)]:
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)
