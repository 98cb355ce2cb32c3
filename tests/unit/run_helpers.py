"""Run folders without training: a store, its model with fresh weights, and the files of a run."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from clue_dist.checkpoint.model_card import write_model_card
from clue_dist.checkpoint.run_folder import COMMIT, STATE, WEIGHTS, RunState
from clue_dist.config import Config
from clue_dist.inference.cells import open_cells
from clue_dist.inference.embed import embed_cells
from clue_dist.inference.load_model import TrainedModel
from clue_dist.model.clue import CLUE, build_model
from clue_dist.store.reader import Store
from clue_dist.store.writer import hash_file
from clue_dist.train.auto_settings import resolve_auto_settings
from clue_dist.train.setup import Setup, prepare_setup

MODEL = {
    "latent": 6,
    "trunk": {"projection": 6, "hidden": 8, "members": 2},
    "decoder": {"hidden": 8},
    "discriminator": {"hidden": 8},
}
_ASKED_FOR = Config(store="s", run="r", train={"checkpoint_every": 10})
# The rank of the heads is a number by the time that a run looks into its folder.
SETTINGS = _ASKED_FOR.model_copy(update={"model": resolve_auto_settings(_ASKED_FOR, 500, 4).model})


def make_setup(store: Path, **settings: object) -> Setup:
    config = {"store": str(store), "run": str(store.parent / "new"), "model": MODEL, **settings}
    return prepare_setup(Config.model_validate(config), 1)


def make_model(setup: Setup) -> CLUE:
    batches = setup.store.manifest.batch_vocabulary
    return build_model(setup.specs, batches, setup.config.model)


def commit_weights(folder: Path, weights: dict[str, torch.Tensor]) -> None:
    """Write best weights as a run keeps them."""
    folder.mkdir(parents=True)
    save_file(weights, folder / WEIGHTS)
    _commit_files(folder, step=5)


def save_step(run: Path, step: int, kind: str = "checkpoints") -> Path:
    """Save what a checkpoint consists of, with one tensor."""
    folder = run / kind / f"step-{step:08d}"
    folder.mkdir(parents=True)
    name = WEIGHTS if kind == "best" else "rank-00000.safetensors"
    save_file({"weights:0:x": torch.zeros(1)}, folder / name)
    _commit_files(folder, step)
    return folder


def write_stopped_run(run: Path) -> Path:
    """Write the folder of a run of 30 steps that keeps two checkpoints; none holds a model."""
    for step in (20, 30):
        save_step(run, step)
    save_step(run, 25, "best")
    (run / "config.json").write_text(SETTINGS.to_json())
    lines = [json.dumps({"step": step, "split": "train"}) for step in range(1, 31)]
    (run / "metrics.jsonl").write_text("\n".join(lines))
    return run


def _commit_files(folder: Path, step: int) -> None:
    """Write the state of a run, and the marker that says that all files are there."""
    (folder / STATE).write_text(json.dumps(asdict(RunState(step, 1, "f"))))
    files = {path.name: hash_file(path).model_dump() for path in folder.iterdir()}
    (folder / COMMIT).write_text(json.dumps(files))


def embed_store(trained_model: TrainedModel, store: Store, out: Path, **choices: Any) -> None:
    """Embed the cells of a store into a file; `choices` are those of `embed_cells`."""
    embed_cells(trained_model, open_cells(store, trained_model), out, **choices)


def make_run(run: Path, store: Path) -> Path:
    """Write a run on a store, whose best weights, of step 5, are fresh."""
    torch.manual_seed(0)
    setup = make_setup(store)
    write_model_card(run, setup.store, setup.config)
    commit_weights(run / "best" / "step-00000005", make_model(setup).state_dict())
    return run
