"""Run folders that were changed: embedding with them and going on from them is refused, or uses what was saved."""

from __future__ import annotations

import json
import os
import shutil
from functools import lru_cache
from pathlib import Path

import numpy as np
from torch import Tensor

from clue_dist import config as configs
from clue_dist.checkpoint import resuming, run_folder
from clue_dist.inference.embed import embed_store
from clue_dist.inference.load_model import load_model
from clue_dist.ranks import Ranks
from clue_dist.store.reader import Store
from clue_dist.store.writer import hash_file
from tests.benchmarks.hostile import spoil
from tests.benchmarks.hostile.hdf5 import in_bytes
from tests.benchmarks.hostile.trial import Trial, wrong
from tests.distributed.command import largest_difference, python, train_args
from tests.stores import make_store

TOLD = ("config.json", "model.json")  # which no checkpoint signs


def ready(base: Path) -> None:
    make_store(base / "s.zarr", cells={"rna+adt": 60, "rna": 40}, features={"rna": 20, "adt": 6})
    length = (
        "train.epochs=6",
        "train.validate_every=2",
        "train.checkpoint_every=3",
        "train.patience=0",
    )
    python(*train_args(base, base / "s.zarr", "run", *length))


def run(base: Path, folder: Path, number: int, rng: np.random.Generator) -> Trial:
    root = Path(shutil.copytree(base / "run", folder / "run"))
    paths = [root / name for name in TOLD] if number % 4 == 0 else _saved(root)
    path = paths[int(rng.integers(len(paths)))]
    if number % 4 == 3:
        told = _another(path, int(rng.integers(5)), folder)
    elif path.suffix == ".json":
        told = _json(path, rng)
    else:
        told = in_bytes(path, rng, folder)
    signed = number % 8 > 3 and path.name not in TOLD
    if signed:
        _sign(path)
    fits = path.name not in TOLD and not signed
    attempts = {
        "embed": lambda: embedded(root, base, folder, fits),
        "resume": lambda: resumed(root, base, fits),
    }
    return Trial(
        f"{path.relative_to(root)}{', signed again' if signed else ''}: {told}"[:300], attempts
    )


def embedded(root: Path, base: Path, folder: Path, fits: bool) -> None:
    """fits: what is used must be what was saved under that name."""
    loaded = load_model(root)
    if fits:
        _same(loaded.model.state_dict(), _weights(base / "run" / "best" / loaded.name))
    embed_store(loaded, Store(str(base / "s.zarr")), folder / "out.h5ad", run=root)


def resumed(root: Path, base: Path, fits: bool) -> None:
    found = resuming.choose_checkpoint(root, "auto", Ranks())
    if found is None:
        return
    config = configs.load_config(base / "run" / "config.json")
    resuming.require_same_run(root, config, Store(str(base / "s.zarr")).fingerprint, found)
    model = load_model(base / "run").model
    run_folder.load_weights(model, found, "choose another")
    if fits:
        _same(model.state_dict(), _weights(base / "run" / "checkpoints" / found.name))


@lru_cache
def _weights(folder: Path) -> dict[str, Tensor]:
    return run_folder.read_weights(folder)


def _same(got: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    if got.keys() != expected.keys() or largest_difference(got, expected):
        wrong("weights that are not those that were saved")


def _saved(root: Path) -> list[Path]:
    return sorted(
        path for kind in ("best", "checkpoints") for path in root.glob(f"{kind}/step-*/*")
    )


def _json(path: Path, rng: np.random.Generator) -> str:
    content = path.read_bytes()
    if rng.random() < 0.2:
        content, told = spoil.broken_text(content, rng)
        path.write_bytes(content)
        return told
    tree, told = spoil.spoiled(json.loads(content), rng, int(rng.integers(1, 3)))
    path.write_bytes(spoil.text_of(tree))
    return told


def _another(path: Path, kind: int, folder: Path) -> str:
    """Something else in the place of a file."""
    moved = folder / f"moved-{path.name}"
    path.rename(moved)
    if kind == 1:
        path.mkdir()
    elif kind == 2:
        os.mkfifo(path)
    elif kind == 3:
        path.symlink_to(moved)
    elif kind == 4:
        path.symlink_to("/dev/zero")
    return (
        "gone",
        "a folder",
        "a pipe",
        "a link to the file itself",
        "a link to zeros without an end",
    )[kind]


def _sign(path: Path) -> None:
    """COMMIT.json with what lies there now."""
    commit = path.parent / run_folder.COMMIT
    if path != commit and path.is_file() and not path.is_symlink():
        listing = json.loads(commit.read_text())
        listing[path.name] = hash_file(path).model_dump()
        commit.write_text(json.dumps(listing))
