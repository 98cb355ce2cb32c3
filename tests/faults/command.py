"""launch/train.py with planted faults, and what is compared of the runs."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from tests.distributed.command import ROOT, metrics, spawned

TIMES = ("cells_per_s", "data_wait", "saving_wait", "peak_host_memory_gb")


def planted(ranks: int, args: list[str], *faults: str) -> list[str]:
    """A command line for so many ranks."""
    return spawned(ranks, "tests/faults/plant.py", *faults, "--", *args)


def write_small_recipe(folder: Path) -> None:
    """Write configs/atlas.json into a folder, as the project has it but narrow and without sinks.

    For tests of the commands that name it; that the recipe trains is tested by itself.
    """
    recipe = json.loads((ROOT / "configs" / "atlas.json").read_text())
    recipe["model"] |= {
        "latent": 8,
        "trunk": {"projection": 8, "hidden": 16, "members": 2},
        "decoder": {"hidden": 16},
        "discriminator": {"hidden": 16},
    }
    recipe["log"] = {"wandb": "disabled", "tensorboard": False}
    (folder / "configs").mkdir()
    (folder / "configs" / "atlas.json").write_text(json.dumps(recipe))


def timeless(run: Path, split: str = "train") -> list[dict[str, Any]]:
    """What a run logged, but for what depends on the clock."""
    return [{k: v for k, v in line.items() if k not in TIMES} for line in metrics(run, split)]


def saved_steps(run: Path, kind: str = "checkpoints") -> list[int]:
    """Steps of committed checkpoints, newest first."""
    found = [re.fullmatch(r"step-(\d+)", p.parent.name) for p in (run / kind).glob("*/COMMIT.json")]
    return sorted((int(m[1]) for m in found if m), reverse=True)
