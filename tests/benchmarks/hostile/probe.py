"""Tries hostile inputs one after another, in a process of its own, whose end is told too."""

import faulthandler
import multiprocessing
import os
import resource
import shutil
import signal
import time
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from random import Random
from typing import Any
from unittest import mock

from tests.benchmarks.hostile import inputs, runs, stores, text, zarr_folders
from tests.benchmarks.hostile.trial import Trial
from tests.benchmarks.hostile.watch import note_code, plant_canary
from tests.distributed.command import environment

Make = Callable[[Path, Path, int, Random], Trial]
# Of each group: what makes its sound inputs, and what makes a hostile one of them.
GROUPS: dict[str, tuple[Callable[[Path], None], Make]] = {
    "manifest": (stores.make_sound, stores.spoil_manifest),
    "metadata": (stores.make_sound, stores.spoil_metadata),
    "files": (stores.make_sound, stores.replace_file),
    "arrays": (stores.make_sound, stores.forge_arrays),
    "svd": (stores.make_sound, stores.spoil_svd),
    **{f: (inputs.make_sound, partial(inputs.spoil_input, f)) for f in ("h5ad", "h5mu", "10x")},
    "zarr": (inputs.make_sound, zarr_folders.spoil_zarr),
    "mtx": (inputs.make_sound, text.spoil_mtx),
    "table": (text.make_tables, text.spoil_table),
    "fragments": (text.make_sound, text.spoil_fragments),
    "config": (runs.make_cells, runs.spoil_config),
    "run": (runs.make_run, runs.spoil_run),
}
LIMIT = 30  # seconds an input may compute, in all threads of the process
# Seconds an input may take, which only one that waits for something should reach: a machine that is
# busy gives a process a tenth of a core, or less.
WAIT_LIMIT = 600
MEMORY = 3 * 2**30  # bytes an input may ask for
# Arenas take address space, which is limited.
LIMITS = {"OMP_NUM_THREADS": "1", "MALLOC_ARENA_MAX": "4"}


class Prober:
    """A process that tries inputs of a group; it is started anew when one of them ends it."""

    def __init__(self, group: str, folder: Path, seed: int) -> None:
        """Take a group and the folder in which `base` holds its sound inputs."""
        self._task = (group, folder, seed)
        self._process: multiprocessing.process.BaseProcess | None = None

    def try_input(self, number: int) -> dict[str, Any]:
        """How the input of this number ended; see `Trial.find_outcome`."""
        if self._process is None:
            context = multiprocessing.get_context("spawn")
            self._pipe, other = context.Pipe()
            self._process = context.Process(target=serve_trials, args=(other, *self._task))
            with mock.patch.dict(os.environ, environment() | LIMITS, clear=True):
                self._process.start()
            other.close()
        self._pipe.send(number)
        with suppress(EOFError, ConnectionError):
            if self._pipe.poll(WAIT_LIMIT + 30):  # the process ends itself before
                return dict(self._pipe.recv())
        self._process.kill()
        self._process.join()
        code, self._process = self._process.exitcode, None
        late = code in (-signal.SIGKILL, -signal.SIGXCPU, 1)
        told = {"process": "no answer in time" if late else f"ended by signal or code {code}"}
        what = f"input {number}"
        return {"number": number, "what": what, "end": "crashed", "told": told, "ran": []}

    def close(self) -> None:
        if self._process is not None:
            self._pipe.send(None)
            self._process.join(30)


def serve_trials(pipe: Connection, group: str, folder: Path, seed: int) -> None:
    """Try the inputs whose numbers come through a pipe, until there is none."""
    log = os.open(folder / "probe.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for stream in (1, 2):
        os.dup2(log, stream)
    plant_canary(folder / "canary")
    faulthandler.register(signal.SIGXCPU, log, chain=True)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    for number in iter(pipe.recv, None):
        faulthandler.dump_traceback_later(WAIT_LIMIT, exit=True, file=log)  # with exit code 1
        limit_computing(LIMIT)
        # What asks for MEMORY more than there is fails, instead of filling the machine.
        pages = int(Path("/proc/self/statm").read_text().split()[0])
        limit = pages * resource.getpagesize() + MEMORY
        resource.setrlimit(resource.RLIMIT_AS, (limit, resource.RLIM_INFINITY))
        pipe.send(make_trial(group, folder, number, seed))
        faulthandler.cancel_dump_traceback_later()


def limit_computing(seconds: int) -> None:
    """End this process, with SIGXCPU, once it has computed so long from now on."""
    usage = resource.getrusage(resource.RUSAGE_SELF)
    limit = int(usage.ru_utime + usage.ru_stime) + 1 + seconds
    _, hard_limit = resource.getrlimit(resource.RLIMIT_CPU)
    resource.setrlimit(resource.RLIMIT_CPU, (limit, hard_limit))


def make_trial(group: str, folder: Path, number: int, seed: int) -> dict[str, Any]:
    scratch = folder / "scratch"
    shutil.rmtree(scratch, ignore_errors=True)
    scratch.mkdir()
    make = GROUPS[group][1]
    trial = make(folder / "base", scratch, number, Random(f"{seed} {number}"))
    began, before = time.monotonic(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with note_code() as ran:
        found = trial.find_outcome()
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024
    found |= {"end": "crashed"} if ran else {}
    seconds = time.monotonic() - began
    return found | {"number": number, "ran": ran, "seconds": seconds, "grown_mb": grown}
