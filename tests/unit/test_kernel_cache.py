"""Compiled code finds a folder where neither the package nor the home folder can be written."""

from __future__ import annotations

import os
import resource
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numba
import pytest

from clue_dist.store import kernel_cache
from tests.processes import ROOT

UNWRITABLE = "/proc/nowhere"  # not even root can make a folder there
CODE = """
import numpy as np
from clue_dist.store import kernels
from clue_dist.store.shuffle import permute_positions
print(sorted(permute_positions(np.arange(5), 5, 1).tolist()))
"""


@pytest.fixture
def unset_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    """Numba has no cache folder yet; temporary folders lie in `tmp_path`."""
    monkeypatch.setattr(numba.config, "CACHE_DIR", "")
    monkeypatch.setenv("NUMBA_CACHE_DIR", "")
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    kernel_cache.choose_temporary_cache.cache_clear()
    yield
    kernel_cache.choose_temporary_cache.cache_clear()


@pytest.mark.slow
@pytest.mark.parametrize("has_temporary_folder", [True, False])
def test_kernels_run_without_a_home_in_a_package_that_cannot_be_written(
    tmp_path: Path, has_temporary_folder: bool
) -> None:
    package, temporary = tmp_path / "package", tmp_path / "tmp"
    unwritten = shutil.ignore_patterns("__pycache__")
    shutil.copytree(ROOT / "clue_dist", package / "clue_dist", ignore=unwritten)
    # A file that is called as numba's folder is in the way of root, too.
    (package / "clue_dist" / "store" / "__pycache__").touch()
    temporary.mkdir()
    environment = {
        "PATH": os.environ["PATH"],
        "HOME": UNWRITABLE,
        "PYTHONPATH": str(package),
        "TMPDIR": str(temporary),
        "PYTHONSAFEPATH": "1",
    }
    code = CODE
    if not has_temporary_folder:
        refuse = "def refuse(): raise FileNotFoundError('No usable temporary directory')"
        code = f"import tempfile\n{refuse}\ntempfile.gettempdir = refuse\n{CODE}"
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, cwd=tmp_path, capture_output=True, text=True
    )
    assert (done.returncode, done.stdout) == (0, "[0, 1, 2, 3, 4]\n"), done.stderr
    assert done.stderr.count("compiled code goes to") == has_temporary_folder
    assert any(temporary.rglob("*.nbi")) == has_temporary_folder


def test_every_kernel_is_compiled_so() -> None:
    sources = [path for part in ("clue_dist", "data_prep") for path in (ROOT / part).rglob("*.py")]
    compiling = [path.name for path in sources if "njit" in path.read_text(encoding="utf-8")]
    assert compiling == ["kernel_cache.py"]


def test_a_kernel_runs_on_a_full_disk() -> None:
    @kernel_cache.compile_kernel
    def add_one(number):  # type: ignore[no-untyped-def]
        return number + 1

    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (16, limit[1]))
    try:
        assert add_one(1) == 2
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)


@pytest.mark.usefixtures("unset_cache")
def test_what_finds_no_cache_is_tried_again_with_a_temporary_one(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def work() -> str:
        if not numba.config.CACHE_DIR:
            raise RuntimeError("cannot cache function: no locator available")
        return numba.config.CACHE_DIR

    for _ in range(2):
        folder = Path(kernel_cache.retry_with_cache(work))
    assert folder.parent == tmp_path
    assert folder.stat().st_mode & 0o777 == 0o700
    assert os.environ["NUMBA_CACHE_DIR"] == str(folder)
    assert capsys.readouterr().err.count("compiled code goes to") == 1  # once


@pytest.mark.usefixtures("unset_cache")
@pytest.mark.parametrize("trap", ["a link", "others may write"])
def test_a_folder_that_others_may_have_filled_is_not_used(tmp_path: Path, trap: str) -> None:
    planted = tmp_path / f"clue_dist-numba-{os.getuid()}"
    if trap == "a link":
        (tmp_path / "elsewhere").mkdir()
        planted.symlink_to(tmp_path / "elsewhere")
    else:
        planted.mkdir()
        planted.chmod(0o777)
    assert kernel_cache.choose_temporary_cache()
    assert Path(numba.config.CACHE_DIR).parent == tmp_path
    assert Path(numba.config.CACHE_DIR) != planted
