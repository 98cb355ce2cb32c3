"""Commands of data_prep that are killed, and calls that are counted to see what is done again."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable, Mapping
from types import ModuleType

import pytest

from tests.distributed.command import alone

_VICTIM = """
import importlib, json, os, resource, signal, sys
from clue_dist.process import run_main
from data_prep.cli import commands

def find(place):
    module, name = place.rsplit(".", 1)
    return importlib.import_module(module), name

place, n, file_bytes, constants = json.loads(sys.argv.pop(1))
for constant, value in constants.items():
    setattr(*find(constant), value)
real, calls = getattr(*find(place)), [0]

def fatal(*args, **kwargs):
    calls[0] += 1
    if calls[0] == n:
        os.kill(os.getpid(), signal.SIGKILL)
    return real(*args, **kwargs)

setattr(*find(place), fatal)
if file_bytes is not None:
    resource.setrlimit(resource.RLIMIT_FSIZE, (file_bytes, file_bytes))
run_main(commands.main)
"""


def run_victim(
    *words: str,
    place: str = "os.getcwd",
    n: int = -1,
    file_bytes: int | None = None,
    constants: Mapping[str, int] | None = None,
) -> subprocess.CompletedProcess[str]:
    """Run `python -m data_prep` in a process that kills itself, or whose files may not grow.

    Args:
        words: its words.
        place: the function at whose call it does so, with its module.
        n: at which call; at none by default.
        file_bytes: the most bytes a file may take.
        constants: what constants are there, by their names with their modules.
    """
    faults = json.dumps([place, n, file_bytes, dict(constants or {})])
    return alone("-c", _VICTIM, faults, *words, expect=None)


def count_calls(monkeypatch: pytest.MonkeyPatch, module: ModuleType, name: str) -> list[int]:
    """Count the calls of a module's function from now on, in a list of one number."""
    real: Callable[[object], None] = getattr(module, name)
    calls = [0]

    def counted(task: object) -> None:
        calls[0] += 1
        real(task)

    monkeypatch.setattr(module, name, counted)
    return calls
