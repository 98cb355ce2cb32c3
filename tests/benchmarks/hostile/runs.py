"""Run folders and configs that were changed: refused, or what was saved and said is used."""

import json
import shutil
from functools import lru_cache, partial
from pathlib import Path
from random import Random

from torch import Tensor

from clue_dist import config_file
from clue_dist.checkpoint import resuming, run_folder
from clue_dist.config import Config
from clue_dist.inference import embed
from clue_dist.inference.cells import open_cells
from clue_dist.inference.load_model import load_model
from clue_dist.ranks import Ranks
from clue_dist.store.reader import Store
from clue_dist.store.writer import hash_file
from clue_dist.train.setup import prepare_setup
from tests.benchmarks.hostile import spoil
from tests.benchmarks.hostile.changes import OTHER_KIND, replace_path, spoil_bytes
from tests.benchmarks.hostile.trial import Trial, WrongValues
from tests.benchmarks.hostile.watch import make_bomb
from tests.distributed.command import ROOT, alone, largest_difference, train_args
from tests.stores import make_store

RECIPES = sorted((ROOT / "configs").glob("*.json"))
UNSIGNED = ("config.json", "model.json")  # files of a run folder that no checkpoint signs
REPLACED = ("gone", OTHER_KIND, "a pipe", "a link that leads out", "a link to a device")


def make_cells(base: Path) -> None:
    make_store(base / "s.zarr", cells={"rna+adt": 60, "rna": 40}, features={"rna": 20, "adt": 6})


# --- configs ---


def spoil_config(base: Path, folder: Path, number: int, rng: Random) -> Trial:
    """A recipe that was changed, or a `--set`, up to what is checked before training."""
    tree = json.loads(RECIPES[number % len(RECIPES)].read_text())
    if number % 3 == 0:
        tree = Config.model_validate(tree).model_dump(mode="json")  # with every setting there is
    tree |= {"store": str(base / "s.zarr"), "run": str(folder / "run")}
    path, overrides, content = folder / "config.json", list[str](), json.dumps(tree).encode()
    if number % 10 == 8:
        change = draw_override(tree, rng)
        overrides.append(change)
    else:
        broken = float(number % 10 == 9)
        content, change = spoil.spoil_json(content, rng, broken, 1 + number % 3)
        if broken and rng.random() < 0.1:
            content, change = make_bomb(), "a pickle"
    path.write_bytes(content)
    return Trial(f"config: {change}", {"load": partial(load_config, path, overrides)})


def draw_override(tree: object, rng: Random) -> str:
    """An argument of `--set` that may make no sense."""
    path, value = ".".join(map(str, rng.choice(spoil.list_paths(tree)))), rng.choice(spoil.VALUES)
    paths = [path, f"{path}.x", f"..{path}", path.replace(".", ".."), path.upper(), "", "."]
    text = value if isinstance(value, str) else json.dumps(value)
    return f"{rng.choice(paths)}{rng.choice(['=', '==', ''])}{text}"


def load_config(path: Path, overrides: list[str]) -> None:
    """Read, keep, read again, and check all that is checked before training."""
    config, kept = config_file.load_config(path, overrides), path.with_name("kept.json")
    kept.write_text(config.to_json())
    if config_file.load_config(kept) != config:
        raise WrongValues("a config that is kept is read back as another")
    setup = prepare_setup(config, 1)
    if not 1 <= setup.total_steps < 10**12:
        raise WrongValues(f"{setup.total_steps} steps")
    setup.format_summary()


# --- run folders ---


def make_run(base: Path) -> None:
    """A finished run of a small model."""
    make_cells(base)
    words = ("epochs=6", "validate_every=2", "checkpoint_every=3", "patience=0")
    alone(*train_args(base, base / "s.zarr", "run", *(f"train.{word}" for word in words)))


def spoil_run(base: Path, folder: Path, number: int, rng: Random) -> Trial:
    """A file of a run folder that was changed, and signed again or not."""
    root = Path(shutil.copytree(base / "run", folder / "run"))
    unsigned = [root / name for name in UNSIGNED]
    saved = sorted([*root.glob("best/step-*/*"), *root.glob("checkpoints/step-*/*")])
    path = rng.choice(saved if number % 4 else unsigned)
    signed = number % 8 > 3 and path not in unsigned
    if number % 4 == 3:
        change, outside = rng.choice(REPLACED), folder / "outside"
        outside.mkdir()
        replace_path(path, change, outside)
    elif path.suffix == ".json":
        content, change = spoil.spoil_json(path.read_bytes(), rng, 0.2, rng.randrange(1, 3))
        path.write_bytes(content)
    else:
        change = spoil_bytes(path, rng)
    commit = path.parent / run_folder.COMMIT
    if signed and path != commit and path.is_file() and not path.is_symlink():
        listing = json.loads(commit.read_text()) | {path.name: hash_file(path).model_dump()}
        commit.write_text(json.dumps(listing))
    what = f"{path.relative_to(root)}{', signed again' if signed else ''}: {change}"
    task = (root, base, path not in unsigned and not signed)
    embedding = partial(embed_cells, *task, folder / "out.h5ad")
    return Trial(what, {"embed": embedding, "resume": partial(resume_run, *task)})


def embed_cells(root: Path, base: Path, fits: bool, out: Path) -> None:
    """Embed with a run; where it `fits`, with what was saved under that name."""
    loaded = load_model(root)
    if fits:
        require_same(loaded.model.state_dict(), base / "run" / "best" / loaded.name)
    cells = open_cells(Store(str(base / "s.zarr")), loaded)
    embed.embed_cells(loaded, cells, out, run=root)


def resume_run(root: Path, base: Path, fits: bool) -> None:
    """Load what a run would go on from; where it `fits`, that is what was saved under that name."""
    found = resuming.choose_checkpoint(root, "auto", Ranks())
    if found is None:
        return
    config = config_file.load_config(base / "run" / "config.json")
    resuming.require_same_run(root, config, Store(str(base / "s.zarr")).fingerprint, found)
    model = load_model(base / "run").model
    run_folder.load_weights(model, found, "choose another")
    if fits:
        require_same(model.state_dict(), base / "run" / "checkpoints" / found.name)


read_saved = lru_cache(run_folder.read_weights)


def require_same(weights: dict[str, Tensor], folder: Path) -> None:
    expected = read_saved(folder)
    if weights.keys() != expected.keys() or largest_difference(weights, expected):
        raise WrongValues("weights that are not those that were saved")
