"""A folder is found however it is typed; errors of a file server are told from damaged files."""

from __future__ import annotations

import errno
import resource
from pathlib import Path

import numpy as np
import pytest

from clue_dist.errors import LOST, ConfigError, StoreError
from clue_dist.files import parse_path
from clue_dist.store import location
from clue_dist.store.reader import Store
from tests.stores import make_store


@pytest.mark.parametrize(
    ("number", "code"), [(errno.EIO, LOST), (errno.ESTALE, LOST), (errno.EACCES, 2)]
)
def test_what_the_system_says_of_a_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, code: int
) -> None:
    root = make_store(tmp_path / "s.zarr", cells={"rna": 30}, features={"rna": 10}).root

    def refused(path: Path) -> None:
        raise OSError(number, "no", str(path))

    with monkeypatch.context() as patched:
        patched.setattr(Path, "lstat", refused)
        with pytest.raises(StoreError) as raised:
            Store(root)
    assert raised.value.exit_code == code


@pytest.mark.parametrize(
    ("number", "code"), [(errno.EIO, LOST), (errno.ETIMEDOUT, LOST), (errno.EMFILE, 2)]
)
def test_what_tensorstore_says_of_it(tmp_path: Path, number: int, code: int) -> None:
    """One error of the system can be brought about; the number of another replaces its own."""
    root = make_store(tmp_path / "s.zarr", cells={"rna": 30}, features={"rna": 10}).root
    opened = location._open(root)
    limit = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (3, limit[1]))
    try:
        with pytest.raises(ValueError, match="Too many open files") as met:
            opened.read("manifest.json").result()
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limit)
    said = str(met.value)
    assert f"os_error_code='{int(errno.EMFILE)}'" in said
    error = ValueError(said.replace(f"'{int(errno.EMFILE)}'", f"'{int(number)}'"))
    assert location.translate_read_error(error, root, "what", where="here").exit_code == code


@pytest.mark.parametrize(
    ("folder", "typed"),
    [
        (".", "s.zarr"),
        ("work", "../s.zarr"),
        ("work", "../work/../s.zarr"),
        ("s.zarr", "."),
        ("s.zarr/strata", ".."),
        ("s.zarr/strata", "../strata/.."),
        ("linked", "../s.zarr"),  # the folder above is that of what the link leads to
        (".", "~/s.zarr"),
    ],
)
def test_a_folder_is_found_however_it_is_typed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, folder: str, typed: str
) -> None:
    home = tmp_path / "home"
    (home / "work").mkdir(parents=True)
    (home / "linked").symlink_to(home / "work")
    made = make_store(home / "s.zarr", cells={"rna": 30}, features={"rna": 10})
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.chdir(home / folder)
    store = Store(typed)
    assert store.fingerprint == made.fingerprint
    assert store.segments["rna"].read_barcodes(np.arange(30)).tolist() == [
        f"rna-{i}".encode() for i in range(30)
    ]


def test_a_store_is_written_to_a_folder_above(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    make_store(Path("../s.zarr"), cells={"rna": 30}, features={"rna": 10})
    assert Store(tmp_path / "s.zarr").manifest.n_cells == 30


def test_a_folder_without_a_store_is_told_by_its_own_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "s.zarr").mkdir()
    (tmp_path / "s.zarr.partial").mkdir()
    monkeypatch.chdir(tmp_path / "s.zarr")
    with pytest.raises(StoreError, match=r"no store here[\s\S]*it goes on where it stopped"):
        Store(".")


def test_a_home_that_nobody_has_is_refused() -> None:
    with pytest.raises(StoreError, match=r"~no-such-user is no home folder"):
        location.parse_location("~no-such-user/s.zarr")
    with pytest.raises(ConfigError, match=r"~no-such-user is no home folder"):
        parse_path("~no-such-user/s.zarr")
