"""Starts Python code as real ranks of one job."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import textwrap
from pathlib import Path

ROOT = Path(__file__).parents[1]


def run_ranks(world: int, *code: str, expect: int = 0, timeout_s: float = 120) -> list[str]:
    """Run the pieces of `code`, one after another, in each of `world` processes; the output of each.

    Fails with a rank's output if its exit code is not `expect`; ends them all if one does not come to an end.
    """
    script = "\n".join(textwrap.dedent(c) for c in code)
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    shared = {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "WORLD_SIZE": str(world),
        "OMP_NUM_THREADS": "1",
    }
    running = [
        subprocess.Popen(
            [sys.executable, "-c", script],
            cwd=ROOT,
            env={**os.environ, **shared, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(world)
    ]
    try:
        outputs = [p.communicate(timeout=timeout_s)[0] for p in running]
    finally:
        for p in running:
            p.kill()
    for rank, (process, output) in enumerate(zip(running, outputs, strict=True)):
        assert process.returncode == expect, (
            f"rank {rank} of {world} exited with {process.returncode}:\n{output}"
        )
    return outputs
