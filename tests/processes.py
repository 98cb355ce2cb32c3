"""Starts the ranks of one job on this machine, each in a process of its own, without a launcher.

The processes are forked from a server that has imported what they need, which is most of what they
would take to start. Each of them is new: nothing has run in it before.
"""

from __future__ import annotations

import multiprocessing
import os
import sys
import tempfile
import textwrap
from collections.abc import Callable
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Any

from tests.ports import find_free_port

ROOT = Path(__file__).parents[1]
LAUNCHER_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")

_FORKS = multiprocessing.get_context("forkserver")
_FORKS.set_forkserver_preload(
    ["clue_dist.inference.evaluate", "clue_dist.resilience.peers", "pytest", "tests.warm_kernels"]
)


def start_ranks(
    world: int, folder: Path, work: Callable[..., None], *arguments: Any
) -> list[ForkServerProcess]:
    """Start `work` on every rank of a job; what rank 2 prints goes into the file 2.out of `folder`.

    Args:
        work: A function of a module, as only its name is sent to the ranks.
    """
    port = str(find_free_port())
    shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": str(world)}
    shared["OMP_NUM_THREADS"] = "1"
    processes = []
    for rank in range(world):
        environment = {
            name: value
            for name, value in os.environ.items()
            if name not in LAUNCHER_VARIABLES and not name.startswith("SLURM_")
        }
        environment |= shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)}
        output = folder / f"{rank}.out"
        process = _FORKS.Process(target=_run_rank, args=(environment, output, work, arguments))
        process.start()
        processes.append(process)
    return processes


def await_ranks(processes: list[ForkServerProcess], timeout_s: float = 120) -> list[int | None]:
    """Wait until processes have ended, or `timeout_s` for each; their exit codes, None without."""
    for process in processes:
        process.join(timeout_s)
    return [process.exitcode for process in processes]


def end_ranks(processes: list[ForkServerProcess]) -> None:
    """End what is left of processes."""
    for process in processes:
        process.kill()
        process.join()


def run_ranks(world: int, *code: str, expect: int = 0, timeout_s: float = 120) -> list[str]:
    """Run the parts of `code`, one after another, on every rank of a job.

    Fails with the output of a rank whose exit code is not `expect`.

    Returns:
        What each rank printed.
    """
    script = "\n".join(textwrap.dedent(part) for part in code)
    with tempfile.TemporaryDirectory() as folder:
        processes = start_ranks(world, Path(folder), _run_script, script)
        try:
            codes = await_ranks(processes, timeout_s)
        finally:
            end_ranks(processes)
        outputs = [(Path(folder) / f"{rank}.out").read_text() for rank in range(world)]
    for rank, (exit_code, output) in enumerate(zip(codes, outputs, strict=True)):
        assert exit_code == expect, f"rank {rank}: exit code {exit_code}\n{output}"
    return outputs


def _run_script(script: str) -> None:
    exec(compile(script, "<script>", "exec"), {"__name__": "__main__"})


def _run_rank(
    environment: dict[str, str],
    output: Path,
    work: Callable[..., None],
    arguments: tuple[Any, ...],
) -> None:
    """Make this process what a launcher would have started, and do the work."""
    import torch

    os.environ.clear()
    os.environ.update(environment)
    os.chdir(ROOT)
    torch.set_num_threads(1)
    with output.open("w") as file:
        for stream in (sys.stdout, sys.stderr):
            os.dup2(file.fileno(), stream.fileno())
    work(*arguments)
