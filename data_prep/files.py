"""Folders that exist whole or not at all, whoever else writes the same one."""

from __future__ import annotations

import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from clue_dist.errors import DataError


def make_folder(folder: Path) -> None:
    """Make a folder and those above it, where they are missing.

    Raises:
        DataError: a file is in the way, or permission is lacking.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError, PermissionError) as error:
        raise DataError("the folder cannot be made", where=folder, got=error, fix="choose another --out") from None


@contextmanager
def whole_folder(final: Path) -> Iterator[Path]:
    """A new folder to fill, renamed to `final` at the end; whatever fails leaves nothing behind.

    If another worker was faster (a task that was run twice gives the same bytes), its folder stays.
    """
    temporary = final.with_name(f"{final.name}.{uuid.uuid4().hex[:8]}.tmp")
    temporary.mkdir(parents=True)
    try:
        yield temporary
        try:
            temporary.rename(final)
        except OSError:
            if not final.exists():
                raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def remove_leftovers(folder: Path) -> None:
    """Remove what killed writers left unfinished anywhere under `folder`: ours, zarr-python's and TensorStore's."""
    for path in [p for pattern in ("*.tmp", "*.partial", "*.__lock") for p in folder.rglob(pattern)]:
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)
