"""The environment that `make` sets up: the Python it is of, and a pin for each package in it."""

import os
import shutil
import subprocess
import tomllib
from collections.abc import Iterable
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

from tests.pins import CONSTRAINTS, ROOT, read_pins

# Answers what `make` asks of an interpreter: its version, a new environment, an installation.
INTERPRETER = """#!/bin/sh
case "$1 $2" in
"-c "*) echo {version} ;;
"-m venv") mkdir -p "$3/bin" && cp "$0" "$3/bin/python" ;;
"-m pip") echo "$@" >> installed ;;
esac
"""


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """What `make` reads, beside interpreters of a few versions in bin/."""
    for file in (ROOT / "Makefile", ROOT / "pyproject.toml", *CONSTRAINTS):
        shutil.copy(file, tmp_path)
    (tmp_path / "bin").mkdir()
    for version in ("3.10", "3.11", "3.12", "3.13"):
        interpreter = tmp_path / f"bin/python{version}"
        interpreter.write_text(INTERPRETER.format(version=version))
        interpreter.chmod(0o755)
    return tmp_path


def set_up(checkout: Path, *words: str) -> subprocess.CompletedProcess[str]:
    path = f"{checkout / 'bin'}:/usr/bin:/bin"
    env = {"PATH": path, "HOME": os.devnull}
    command = ["make", ".venv/.installed", *words]
    return subprocess.run(command, cwd=checkout, env=env, capture_output=True, text=True)


def version_in(checkout: Path) -> str:
    command = [checkout / ".venv/bin/python", "-c", ""]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


def test_the_oldest_supported_python_is_taken_where_none_is_asked_for(checkout: Path) -> None:
    assert set_up(checkout).returncode == 0
    assert version_in(checkout) == "3.11"
    torch, package = (checkout / "installed").read_text().splitlines()
    assert torch.endswith(" torch==2.13.0")
    assert package.endswith(" --editable .[dev]")


def test_another_python_that_is_asked_for_makes_the_environment_anew(checkout: Path) -> None:
    set_up(checkout, "PYTHON=python3.12")
    assert version_in(checkout) == "3.12"
    installed = (checkout / "installed").read_text()
    for words in (["PYTHON=python3.12"], [f"PYTHON={checkout}/bin/python3.12"], []):
        assert "up to date" in set_up(checkout, *words).stdout, words
    assert (checkout / "installed").read_text() == installed
    said = set_up(checkout, "PYTHON=python3.13").stdout
    assert ".venv is of Python 3.12, not python3.13: it is made anew" in said
    assert version_in(checkout) == "3.13"


def test_a_python_that_is_not_supported_leaves_the_environment_alone(checkout: Path) -> None:
    set_up(checkout, "PYTHON=python3.12")
    refused = set_up(checkout, "PYTHON=python3.10")
    assert refused.returncode != 0
    assert "Python 3.11, 3.12 or 3.13 is needed; none of these is one: python3.10" in refused.stderr
    assert "fix: install one" in refused.stderr
    assert version_in(checkout) == "3.12"


def test_a_set_up_that_was_broken_off_starts_anew(checkout: Path) -> None:
    set_up(checkout, "PYTHON=python3.12")
    (checkout / ".venv/.installed").rename(checkout / ".venv/.installing")
    (checkout / ".venv/half a package").touch()
    set_up(checkout)
    assert version_in(checkout) == "3.11"
    assert not (checkout / ".venv/half a package").exists()


def keep_applicable(requirements: Iterable[Requirement], extra: str = "") -> list[Requirement]:
    """Those that hold on this Python and platform."""
    return [r for r in requirements if r.marker is None or r.marker.evaluate({"extra": extra})]


def list_drawn_packages() -> set[str]:
    """Canonical names of what `.[dev]` draws here, read off what is installed."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    lines = project["dependencies"] + project["optional-dependencies"]["dev"]
    waiting = [Requirement(line) for line in lines]
    seen: set[tuple[str, str]] = set()
    while waiting:
        requirement = waiting.pop()
        for extra in ("", *requirement.extras):
            key = (canonicalize_name(requirement.name), extra)
            if key not in seen:
                seen.add(key)
                lines = metadata.requires(requirement.name) or []
                waiting += keep_applicable(map(Requirement, lines), extra)
    return {name for name, _ in seen}


def test_no_pin_is_a_beta() -> None:
    versions = {name: str(pin.specifier).removeprefix("==") for name, pin in read_pins().items()}
    assert [name for name, version in versions.items() if Version(version).is_prerelease] == []


def test_each_package_is_pinned() -> None:
    """As far as this Python shows it: a package that another one needs is pinned there."""
    pins = read_pins()
    assert all(str(pin.specifier).startswith("==") for pin in pins.values())
    pinned = {canonicalize_name(pin.name) for pin in keep_applicable(pins.values())}
    assert list_drawn_packages() - pinned == set()
