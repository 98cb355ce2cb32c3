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
from clue_dist.train.setup import Setup, prepare_setup

MODEL = {
    "latent": 6,
    "trunk": {"projection": 6, "hidden": 8, "members": 2},
    "decoder": {"hidden": 8},
    "discriminator": {"hidden": 8},
}


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
    (folder / STATE).write_text(json.dumps(asdict(RunState(5, 1, "f"))))
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
