"""Compiles kernels, and finds numba a folder for the code that it has compiled.

Numba keeps compiled code beside the source or in the home folder, and gives up where it may write
to neither: in a container whose user has no home, say, with a package that was installed by root.
"""

from __future__ import annotations

import atexit
import functools
import os
import shutil
import stat
import tempfile
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, TypeVar

from numba import config, njit

from clue_dist.process import print_error

T = TypeVar("T")


def compile_kernel(function: Callable[..., Any]) -> Any:
    """Compile a function with numba, for threads; later processes find the code in numba's cache.

    Without any folder to write to, or on a full disk, each process compiles for itself.
    """
    try:
        kernel = retry_with_cache(lambda: njit(nogil=True, cache=True)(function))
    except RuntimeError:
        return njit(nogil=True)(function)
    if hasattr(kernel, "_cache"):  # a plain function has none (NUMBA_DISABLE_JIT=1)
        _tolerate_full_disk(kernel._cache)
    return kernel


def _tolerate_full_disk(cache: Any) -> None:
    """Keep numba from giving up where it cannot save what it has compiled."""
    save = cache.save_overload

    def save_or_go_on(signature: Any, compiled: Any) -> None:
        with suppress(OSError):
            save(signature, compiled)

    cache.save_overload = save_or_go_on


def retry_with_cache(work: Callable[[], T]) -> T:
    """Run what makes numba look for its cache; where it finds none, again with a temporary one.

    Args:
        work: compiles functions, or imports a package that does.

    Raises:
        RuntimeError: there is no temporary folder either; or what `work` raised the second time.
    """
    try:
        return work()
    except RuntimeError:  # "no locator available"
        if not choose_temporary_cache():
            raise
        return work()


@functools.cache
def choose_temporary_cache() -> bool:
    """Let numba keep compiled code in a temporary folder, and print where.

    Returns:
        Whether there is such a folder.
    """
    try:
        folder = _make_private_folder()
    except OSError:
        return False
    # Processes that this one starts find the folder in their environment.
    config.CACHE_DIR = os.environ["NUMBA_CACHE_DIR"] = str(folder)
    if os.environ.get("LOCAL_RANK", os.environ.get("SLURM_LOCALID", "0")) == "0":
        print_error(
            f"compiled code goes to {folder}, as neither the package nor the home folder can be "
            "written; NUMBA_CACHE_DIR names another folder"
        )
    return True


def _make_private_folder() -> Path:
    """Make a temporary folder that is this user's alone, or find the one of an earlier process.

    Numba unpickles what it finds there: a folder that somebody else has put in its place is not
    used.
    """
    user = os.getuid()
    folder = Path(tempfile.gettempdir(), f"clue_dist-numba-{user}")
    folder.mkdir(mode=0o700, exist_ok=True)
    found = folder.lstat()
    others_may_write = found.st_mode & (stat.S_IWGRP | stat.S_IWOTH)
    if stat.S_ISDIR(found.st_mode) and found.st_uid == user and not others_may_write:
        return folder
    folder = Path(tempfile.mkdtemp(prefix="clue_dist-numba-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder
