"""Errors of a file server that is away for a while are told from errors of damaged files."""

from __future__ import annotations

import errno
import resource
from pathlib import Path

import pytest

from clue_dist.errors import LOST, StoreError
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
