"""Run the project's commands as a person does, each in a process of its own."""

from __future__ import annotations

import atexit
import functools
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from safetensors.torch import load_file
from torch import Tensor

from clue_dist.model.likelihoods import DISPERSION_LEARNING_RATE
from clue_dist.model.posterior_encoder import FITTED_MODULES
from tests.ports import find_free_port

ROOT = Path(__file__).parents[2]
KILLED = 128 + signal.SIGKILL  # exit code of ranks.py where its rank was killed
FAST = (
    "log.wandb=disabled",
    "log.tensorboard=false",
    "train.validate_every=1000",
    "train.checkpoint_every=1000",
)


def environment() -> dict[str, str]:
    """This process's environment without a launcher's variables; programs of .venv come first."""
    left_out = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
    env = {k: v for k, v in os.environ.items() if k not in left_out and not k.startswith("SLURM_")}
    return env | {"PATH": f"{Path(sys.executable).parent}:{env['PATH']}", "OMP_NUM_THREADS": "1"}


def run(
    *command: str, expect: int | None = 0, timeout: float = 240
) -> subprocess.CompletedProcess[str]:
    """Run a command in the repository's root; its exit code must be `expect` (None: any)."""
    done = subprocess.run(
        command, cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=timeout
    )
    if expect is not None:
        assert done.returncode == expect, (
            f"exit {done.returncode}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
        )
        if expect == 0 and "launch/train.py" in command and "--dry-run" not in command:
            # The launcher exits with 0 even where a signal ended its own child.
            assert "finished at step" in done.stdout, (
                f"{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
            )
            # Nobody who trains can change what a library will drop; the project can.
            assert "FutureWarning" not in done.stderr, done.stderr[-3000:]
    return done


def python(*args: str, **kwargs: Any) -> subprocess.CompletedProcess[str]:
    return run(sys.executable, *args, **kwargs)


def alone(*args: str, **kwargs: Any) -> subprocess.CompletedProcess[str]:
    """As `python`, where its own start is not what is tested; its exit code of a kill is KILLED."""
    return run(*spawned(1, *args), **kwargs)


def launched(ranks: int, *args: str) -> list[str]:
    """A command line under the deepspeed launcher, on a port of its own."""
    port = str(find_free_port())
    return ["deepspeed", "--num_accelerators", str(ranks), "--master_port", port, *args]


def spawned(ranks: int, *args: str) -> list[str]:
    """A command line under a launcher that starts faster than `deepspeed`, which is not tested."""
    return [sys.executable, str(ROOT / "tests/ranks.py"), str(_server()), str(ranks), *args]


def write_quick_python(folder: Path) -> None:
    """Write a program `python` for launchers whose ranks shall start as those of `spawned` do.

    What it runs is forked from the same server, gets its signals and is killed with it.
    """
    path = folder / "python"
    command = shlex.join([sys.executable, str(ROOT / "tests/ranks.py"), str(_server()), "1"])
    path.write_text(f'#!/bin/sh\nexec {command} "$@"\n')
    path.chmod(0o755)


@functools.cache
def _server() -> Path:
    """The socket of the process from which ranks are forked; it ends with this one."""
    path = Path(tempfile.mkdtemp()) / "ranks"
    command = [sys.executable, "-u", "tests/ranks.py", str(path)]
    # To look for GPUs must not begin to use them.
    env = environment() | {"PYTORCH_NVML_BASED_CUDA_CHECK": "1"}
    server = subprocess.Popen(command, cwd=ROOT, env=env, stdin=subprocess.PIPE)
    atexit.register(_end, server, path.parent)
    while not path.exists():
        assert server.poll() is None, "tests/ranks.py does not start"
        time.sleep(0.01)
    return path


def _end(server: subprocess.Popen[bytes], folder: Path) -> None:
    server.communicate()
    shutil.rmtree(folder)


def train_args(folder: Path, store: Path, name: str, *settings: str) -> list[str]:
    """Arguments of launch/train.py for a small model; writes the config beside the run."""
    config = folder / f"{name}.json"
    config.write_text(
        json.dumps(
            {
                "store": str(store),
                "run": str(folder / name),
                "model": {
                    "latent": 6,
                    "private": 0.34,
                    "trunk": {"projection": 12, "hidden": 24, "members": 2, "projection_lr": 0.1},
                    "decoder": {"hidden": 16},
                    "discriminator": {"hidden": 16},
                },
                "objective": {"lambda_contrastive": 1.0},
                "data": {"lanes": 4, "batch_size": 64, "window_blocks": 2},
                # So that numbers do not depend on the processor, nor much on the number of ranks.
                "train": {"precision": "fp32"},
            }
        )
    )
    return ["launch/train.py", "--config", str(config), "--set", *FAST, *settings]


def best_weights(run_folder: Path) -> dict[str, Tensor]:
    found = sorted((run_folder / "best").glob("step-????????/weights.safetensors"))
    files = [str(path.relative_to(run_folder)) for path in sorted(run_folder.rglob("*"))]
    assert found, f"no best weights in {run_folder}, but {files}; {metrics(run_folder, 'event')}"
    return load_file(found[-1])


def trained_weights(run_folder: Path) -> dict[str, Tensor]:
    """The best weights without what validations fit, such as the common space.

    Directions on which modalities agree alike turn with the last bit, which another number of ranks
    changes.
    """
    weights = best_weights(run_folder)
    return {n: values for n, values in weights.items() if n.split(".")[0] not in FITTED_MODULES}


def largest_difference(a: dict[str, Tensor], b: dict[str, Tensor]) -> float:
    """Between weights of the same name; of a weight beyond 1, as a share of it.

    Dispersions learn so many times as fast as the others, and what rounding changes grows with it.
    """
    assert a.keys() == b.keys()
    rates = {k: DISPERSION_LEARNING_RATE if ".theta." in k else 1.0 for k in a}
    return max(float(((a[k] - b[k]) / a[k].abs().clamp_min(1)).abs().max()) / rates[k] for k in a)


def metrics(run_folder: Path, split: str = "train") -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (run_folder / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if line["split"] == split]
