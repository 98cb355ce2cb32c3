"""Commands of benchmarks: the Python of a peer is found, a result is read from a log."""

from pathlib import Path

import pytest

from tests.benchmarks import commands
from tests.benchmarks.commands import BenchmarkError


def write_program(path: Path, exit_code: int) -> Path:
    path.parent.mkdir(parents=True)
    path.write_text(f"#!/bin/sh\nexit {exit_code}\n")
    path.chmod(0o755)
    return path


def test_another_python_is_found_where_it_starts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shim = write_program(tmp_path / "shims/python3.77", 127)
    monkeypatch.setenv("PATH", str(shim.parent))
    monkeypatch.setenv("PYENV_ROOT", str(tmp_path / "pyenv"))
    with pytest.raises(BenchmarkError, match=r"no Python 3\.77") as error:
        commands.find_python("3.77")
    assert f"{shim}, which does not start" in str(error.value)
    assert "uv python install 3.77" in str(error.value)
    real = write_program(tmp_path / "pyenv/versions/3.77.1/bin/python3.77", 0)
    assert commands.find_python("3.77") == real


def test_a_probes_last_line_of_json_is_its_result(tmp_path: Path) -> None:
    log = tmp_path / "log"
    log.write_text('{"cells": 1}\nprogress\n{"cells": 2}\na warning\n')
    assert commands.read_last_json(log) == {"cells": 2}
    log.write_text("Killed\n")
    with pytest.raises(BenchmarkError, match=r"no result[\s\S]*Killed"):
        commands.read_last_json(log)
