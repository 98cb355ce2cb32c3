"""Hostile configs: random trees, recipes that were changed, and `--set`, against the loading of configs and, where that
takes them, against all that is checked before training."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np

from clue_dist import config as configs
from clue_dist.config import Config
from clue_dist.train.setup import prepare_setup
from tests.benchmarks.hostile import spoil
from tests.benchmarks.hostile.trial import Trial, wrong
from tests.benchmarks.hostile.watch import bomb
from tests.distributed.command import ROOT
from tests.stores import make_store

RECIPES = sorted((ROOT / "configs").glob("*.json"))


def ready(base: Path) -> None:
    make_store(base / "s.zarr", cells={"rna+adt": 60, "rna": 40}, features={"rna": 20, "adt": 6})


def config(base: Path, folder: Path, number: int, rng: np.random.Generator) -> Trial:
    tree = json.loads(RECIPES[number % len(RECIPES)].read_text())
    if number % 3 == 0:
        tree = Config.model_validate(tree).model_dump(mode="json")  # with every setting there is
    tree |= {"store": str(base / "s.zarr"), "run": str(folder / "run")}
    path, overrides = folder / "config.json", list[str]()
    if number % 10 == 9:
        content, told = spoil.broken_text(path_content := json.dumps(tree).encode(), rng)
        if rng.random() < 0.1:
            content, told = bomb(base / "canary"), "a pickle"
        assert content != path_content
        path.write_bytes(content)
    elif number % 10 == 8:
        path.write_text(json.dumps(tree))
        told = override(tree, rng)
        overrides.append(told)
    else:
        tree, told = spoil.spoiled(tree, rng, 1 + number % 3)
        path.write_bytes(spoil.text_of(tree))
    return Trial(f"config: {told}"[:300], {"load": lambda: loaded(path, overrides, base)})


def override(tree: object, rng: np.random.Generator) -> str:
    places = spoil.nodes(tree)
    at = ".".join(map(str, places[rng.integers(len(places))]))
    at = [at, at + ".x", f"..{at}", at.replace(".", ".."), at.upper(), "", "."][rng.integers(7)]
    value = spoil.VALUES[rng.integers(len(spoil.VALUES))]
    text = value if isinstance(value, str) else json.dumps(value)
    return f"{at}{['=', '==', ''][rng.integers(3)]}{text}"


def loaded(path: Path, overrides: list[str], base: Path) -> None:
    """Read, kept, read again, and all that is checked before training."""
    got = configs.load_config(path, overrides)
    path.with_name("kept.json").write_text(got.to_json())
    if configs.load_config(path.with_name("kept.json")) != got:
        wrong("a config that is kept is read back as another")
    setup = prepare_setup(got, 1)
    if not 1 <= setup.total_steps < 10**12:
        wrong(f"{setup.total_steps} steps")
    setup.format_summary()
