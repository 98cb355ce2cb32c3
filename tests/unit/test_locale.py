"""Commands understand and print every name, whatever the locale."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from pydantic import ValidationError

from clue_dist.config import Config
from clue_dist.errors import StoreError
from clue_dist.store.location import parse_location

SCRIPT = """
import pathlib, sys
from clue_dist.process import print_line, run_main

def main():
    path = pathlib.Path(sys.argv[1])
    print_line(f"{path.name}: {path.read_text()}")

run_main(main)
"""


def run_script(argument: str | bytes, **environment: str) -> subprocess.CompletedProcess[bytes]:
    env = {"PATH": os.environ["PATH"], "PYTHONPATH": os.pathsep.join(sys.path), **environment}
    command = [sys.executable, "-c", SCRIPT, argument]
    return subprocess.run(command, env=env, capture_output=True, check=False)


def test_a_locale_without_utf8_changes_nothing(tmp_path: Path) -> None:
    path = tmp_path / "müll.txt"
    path.write_text("größer", encoding="utf-8")
    locale = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    done = run_script(str(path), **locale)
    assert (done.returncode, done.stdout.decode()) == (0, "müll.txt: größer\n"), done.stderr


def test_a_name_that_is_no_utf8_is_printed_nevertheless(tmp_path: Path) -> None:
    path = os.fsencode(tmp_path / "m") + b"\xfcll.txt"
    Path(os.fsdecode(path)).write_text("smaller", encoding="utf-8")
    # As in any locale of UTF-8 but C.UTF-8, which may not be installed here.
    done = run_script(path, LC_ALL="C.UTF-8", PYTHONIOENCODING="utf-8:strict")
    assert (done.returncode, done.stdout) == (0, b"m\\udcfcll.txt: smaller\n"), done.stderr


def test_a_store_or_run_folder_that_is_no_utf8_is_refused_before_anything_is_written() -> None:
    path = os.fsdecode(b"/data/m\xfcll/s.zarr")
    with pytest.raises(StoreError, match="the path is no UTF-8"):
        parse_location(path)
    with pytest.raises(ValidationError, match="the path is no UTF-8"):
        Config(run=path)
