"""Tries hostile inputs one after another, in a process of its own: what it does to that process is told too.

.venv/bin/python -m tests.benchmarks.hostile.probe GROUP FOLDER SEED    numbers of inputs come by standard input
"""

from __future__ import annotations

import faulthandler
import json
import os
import resource
import select
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from tests.benchmarks.hostile import (
    forged,
    genome,
    inputs,
    manifests,
    places,
    runs,
    settings,
    stores,
    svds,
)
from tests.benchmarks.hostile.trial import Trial, outcome
from tests.benchmarks.hostile.watch import plant, watched
from tests.distributed.command import ROOT, environment

Make = Callable[[Path, Path, int, np.random.Generator], Trial]
# Of each group: what makes its sound inputs, and what makes a hostile one of them.
GROUPS: dict[str, tuple[Callable[[Path], None], Make]] = {
    "manifest": (stores.ready, manifests.manifest),
    "metadata": (stores.ready, manifests.metadata),
    "files": (stores.ready, places.files),
    "arrays": (stores.ready, forged.arrays),
    "svd": (stores.ready, svds.stored_svd),
    "h5ad": (inputs.ready, inputs.h5ad),
    "h5mu": (inputs.ready, inputs.h5mu),
    "10x": (inputs.ready, inputs.tenx),
    "mtx": (inputs.ready, inputs.mtx),
    "fragments": (genome.ready, genome.fragments),
    "config": (settings.ready, settings.config),
    "run": (runs.ready, runs.run),
}
LIMIT = 30  # seconds an input may take, on a machine that is busy with something else
MEMORY = 3 * 2**30  # bytes an input may ask for


class Prober:
    """A process that tries inputs of a group; it is started anew when one of them ends it.

    folder: the group's, in which `base` holds the sound inputs.
    """

    def __init__(self, group: str, folder: Path, seed: int) -> None:
        self._words = [sys.executable, "-m", __name__, group, str(folder), str(seed)]
        self._log = folder / "probe.log"
        self._process: subprocess.Popen[bytes] | None = None

    def tried(self, number: int) -> dict[str, Any]:
        """How the input of this number ended; see `outcome`."""
        process = self._process = self._process or self._started()
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdin.write(b"%d\n" % number)
        process.stdin.flush()
        line = b""
        if select.select([process.stdout], [], [], LIMIT + 30)[0]:  # it ends itself before
            line = process.stdout.readline()
        if line.endswith(b"\n"):
            return dict(json.loads(line))
        process.kill()
        code, self._process = process.wait(), None
        how = (
            "no answer in time"
            if code in (-signal.SIGKILL, 1)
            else f"ended by signal or code {code}"
        )
        return {
            "number": number,
            "what": f"input {number}",
            "end": "crashed",
            "told": {"process": how},
            "ran": [],
        }

    def close(self) -> None:
        if self._process is not None and self._process.stdin is not None:
            self._process.stdin.close()
            self._process.wait(30)

    def _started(self) -> subprocess.Popen[bytes]:
        limits = {
            "OMP_NUM_THREADS": "1",
            "MALLOC_ARENA_MAX": "4",
        }  # arenas take address space, which is limited
        with self._log.open("ab") as log:
            return subprocess.Popen(
                self._words,
                cwd=ROOT,
                env=environment() | limits,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
            )


def main() -> None:
    group, folder, seed = sys.argv[1], Path(sys.argv[2]), int(sys.argv[3])
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever prints
    plant(folder / "canary")
    _, make = GROUPS[group]
    for line in sys.stdin:
        number = int(line)
        faulthandler.dump_traceback_later(LIMIT, exit=True)  # with exit code 1
        _limit_memory()
        answers.write(json.dumps(_tried(make, folder, number, seed)) + "\n")
        answers.flush()
        faulthandler.cancel_dump_traceback_later()


def _tried(make: Make, folder: Path, number: int, seed: int) -> dict[str, Any]:
    scratch = folder / "scratch"
    shutil.rmtree(scratch, ignore_errors=True)
    scratch.mkdir()
    rng = np.random.default_rng([seed, number])
    trial = make(folder / "base", scratch, number, rng)
    began, before = time.monotonic(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with watched(folder / "canary") as ran:
        found = outcome(trial)
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    found["end"] = "crashed" if ran else found["end"]
    return found | {
        "number": number,
        "ran": ran,
        "seconds": time.monotonic() - began,
        "grown_mb": grown // 1024,
    }


def _limit_memory() -> None:
    """MEMORY more than there is now: what asks for it fails, instead of filling the machine."""
    with open("/proc/self/statm") as file:
        now = int(file.read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (now + MEMORY, resource.RLIM_INFINITY))


if __name__ == "__main__":
    main()
