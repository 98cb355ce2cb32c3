"""A run begins with the weights of an earlier one, and says what is kept and what is new."""

from __future__ import annotations

import json
import shutil
from dataclasses import asdict
from pathlib import Path

import pytest
import torch

from clue_dist.checkpoint.model_card import read_model_card, write_model_card
from clue_dist.checkpoint.resuming import StartingPoint, find_starting_point
from clue_dist.checkpoint.run_folder import COMMIT, STATE, WEIGHTS, RunState, read_weights
from clue_dist.config import Config
from clue_dist.config_file import load_config
from clue_dist.errors import ClueError, ConfigError, ResumeError
from clue_dist.inference.query import holds_training_cells
from clue_dist.ranks import Ranks
from clue_dist.store.reader import Store
from clue_dist.store.writer import hash_file
from clue_dist.train.auto_settings import resolve_auto_settings
from clue_dist.train.initial_weights import (
    follow_head_rank,
    plan_warm_start,
    set_initial_weights,
)
from clue_dist.train.loop import _read_earlier_card
from tests.stores import make_store
from tests.unit.run_helpers import MODEL, commit_weights, make_model, make_setup

FEATURES = {"rna": 30, "adt": 8}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the store `old.zarr` and a run on it."""
    folder = tmp_path_factory.mktemp("initial")
    make_store(folder / "old.zarr", features=FEATURES)
    setup = make_setup(folder / "old.zarr")
    write_model_card(folder / "run", setup.store, setup.config)
    commit_weights(folder / "run" / "best" / "step-00000005", make_model(setup).state_dict())
    return folder


def test_a_run_folder_says_what_its_model_expects(folder: Path, tmp_path: Path) -> None:
    setup = make_setup(folder / "old.zarr")
    run = tmp_path / "runs" / "first"
    for _ in range(2):  # the folder may be new or not
        write_model_card(run, setup.store, setup.config)
    card = read_model_card(run)
    assert card.fingerprint == setup.store.fingerprint
    assert list(card.modalities) == ["rna", "adt"]
    assert card.batches == setup.store.manifest.batches
    assert load_config(run / "config.json") == setup.config


@pytest.mark.slow
def test_another_store_of_the_same_features_keeps_all_but_its_new_batches(
    folder: Path, tmp_path: Path
) -> None:
    make_store(tmp_path / "more.zarr", features=FEATURES, batches=3, seed=1)
    setup = make_setup(tmp_path / "more.zarr", train={"lr": 0.01})
    warm_start = plan_warm_start(folder / "run", setup)
    assert "\n".join(warm_start.describe_weights()) == (
        f"  begins with the weights of {folder / 'run' / 'best' / 'step-00000005'}\n"
        "    modalities kept: rna, adt\n"
        "    batches kept: batch-0, batch-1; new: batch-2"
    )
    model = make_model(setup)
    new = model.state_dict()["decoders.0.batch.weight"][2].clone()
    warm_start.set_weights(model, setup)
    before = read_weights(warm_start.weights)
    for name, values in model.state_dict().items():
        torch.testing.assert_close(values[: len(before[name])], before[name])
    assert model.state_dict()["decoders.0.batch.weight"][2].equal(new)


def test_a_run_knows_the_cells_of_the_runs_before_it(folder: Path, tmp_path: Path) -> None:
    make_store(tmp_path / "new.zarr", features=FEATURES, seed=1)
    make_store(tmp_path / "other.zarr", features=FEATURES, seed=2)
    old, new, other = (
        Store(path / f"{name}.zarr")
        for path, name in ((folder, "old"), (tmp_path, "new"), (tmp_path, "other"))
    )
    setup = make_setup(tmp_path / "new.zarr")
    begin = StartingPoint(RunState(0, 1, new.fingerprint), None, setup.config, {})
    earlier = _read_earlier_card(begin, plan_warm_start(folder / "run", setup))
    run = tmp_path / "run"
    write_model_card(run, new, setup.config, earlier)
    # A later attempt knows the run alone, and not what it began with.
    going_on = StartingPoint(
        RunState(5, 1, new.fingerprint), run / "checkpoints" / "step-5", setup.config, {}
    )
    write_model_card(run, new, setup.config, _read_earlier_card(going_on, None))
    seen = read_model_card(run).identities
    assert read_model_card(run).fingerprint == new.fingerprint
    assert [holds_training_cells(store, seen) for store in (old, new, other)] == [True, True, False]
    # A run of an earlier version says the fingerprint of its store, and no more.
    content = json.loads((run / "model.json").read_text())
    del content["seen_cells"]
    (run / "model.json").write_text(json.dumps(content))
    assert read_model_card(run).identities == {new.fingerprint}


def test_a_modality_that_is_new_begins_from_its_cells(folder: Path, tmp_path: Path) -> None:
    features = {"atac": 20, "rna": 30}
    make_store(tmp_path / "other.zarr", cells={"atac+rna": 80}, features=features)
    setup = make_setup(tmp_path / "other.zarr")
    warm_start = plan_warm_start(folder / "run", setup)
    assert "modalities kept: rna; new: atac; left out: adt" in "\n".join(
        warm_start.describe_weights()
    )
    model = make_model(setup)
    warm_start.set_weights(model, setup)
    idf = model.get_trunk("atac").idf
    assert not idf.equal(torch.ones_like(idf))
    before = read_weights(warm_start.weights)["trunks.0.projection.weight"]
    assert model.get_trunk("rna").projection.weight.equal(before)


@pytest.mark.parametrize(
    ("features", "settings", "message"),
    [
        ({"rna": 31, "adt": 8}, {}, "other features of rna"),
        ({"atac": 9}, {}, "knows no modality of the store"),
        (FEATURES, {"model": MODEL | {"latent": 8}}, "changed: model.latent"),
        (FEATURES, {"modalities": {"adt": {"normalise": "none"}}}, "changed: modalities.adt.norm"),
    ],
)
def test_what_does_not_fit_is_refused(
    folder: Path,
    tmp_path: Path,
    features: dict[str, int],
    settings: dict[str, object],
    message: str,
) -> None:
    cells = {"+".join(features): 60}
    make_store(tmp_path / "other.zarr", cells=cells, features=features)
    setup = make_setup(tmp_path / "other.zarr", **settings)
    with pytest.raises(ConfigError, match=message):
        plan_warm_start(folder / "run", setup)


def test_a_run_without_sound_weights_is_refused(folder: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(folder / "run", run)
    setup = make_setup(folder / "old.zarr")
    with (run / "best" / "step-00000005" / WEIGHTS).open("ab") as file:
        file.write(b"more")
    with pytest.raises(ClueError, match="are damaged"):
        plan_warm_start(run, setup).set_weights(make_model(setup), setup)
    shutil.rmtree(run / "best")
    with pytest.raises(ResumeError, match="holds no weights"):
        plan_warm_start(run, setup)
    with pytest.raises(ResumeError, match="no run here"):
        plan_warm_start(tmp_path / "nowhere", setup)


def test_a_run_that_is_older_than_the_rank_of_heads_gives_its_weights(
    folder: Path, tmp_path: Path
) -> None:
    """Its settings lack the rank, or say "auto" where they were written again."""
    shutil.copytree(folder / "run", tmp_path / "run")
    file, setup = tmp_path / "run" / "config.json", make_setup(folder / "old.zarr")
    tree = json.loads(file.read_text())
    del tree["model"]["head_rank"]
    for model in (tree["model"], tree["model"] | {"head_rank": "auto"}):
        file.write_text(json.dumps(tree | {"model": model}))
        model = make_model(setup)
        plan_warm_start(tmp_path / "run", setup).set_weights(model, setup)
        weights = read_weights(folder / "run" / "best" / "step-00000005")
        heads = {name: values for name, values in weights.items() if name.startswith("heads.")}
        assert heads
        for name, values in heads.items():
            assert torch.equal(model.state_dict()[name], values)


def test_a_run_takes_the_rank_of_heads_from_the_one_that_it_begins_with(folder: Path) -> None:
    followed = follow_head_rank(Config(), folder / "run")
    assert resolve_auto_settings(followed, 500, 4).model.head_rank == 0
    named = Config(model={"head_rank": 5})
    assert follow_head_rank(named, folder / "run").model.head_rank == 5
    assert follow_head_rank(Config(), folder / "nowhere").model.head_rank == "auto"


def test_the_same_command_goes_on_with_what_began_with_these_weights(
    folder: Path, tmp_path: Path
) -> None:
    config = make_setup(folder / "old.zarr").config
    weights = folder / "run" / "best" / "step-00000005"
    run, checkpoint = tmp_path / "new", tmp_path / "new" / "checkpoints" / "step-00000007"

    def find_start(earlier_weights: Path | None) -> str | None:
        start = find_starting_point(
            run, config, "f", "auto", Ranks(), earlier_weights=earlier_weights
        )
        return start.state.origin

    origin = find_start(weights)
    assert origin == str(weights.resolve())
    for began_with in (origin, None):
        shutil.rmtree(run, ignore_errors=True)
        commit_weights(checkpoint, {})
        (checkpoint / WEIGHTS).rename(checkpoint / "rank-00000.safetensors")
        state = RunState(7, 1, "f", origin=began_with)
        (checkpoint / STATE).write_text(json.dumps(asdict(state)))
        files = [path for path in checkpoint.iterdir() if path.name != COMMIT]
        listing = {path.name: hash_file(path).model_dump() for path in files}
        (checkpoint / COMMIT).write_text(json.dumps(listing))
        (run / "config.json").write_text(config.to_json())
        assert find_start(None) == began_with
        if began_with is not None:
            assert find_start(weights.with_name("step-00000009")) == began_with
        else:
            with pytest.raises(ResumeError, match="did not begin with these weights"):
                find_start(weights)


def test_initial_weights_shrink_batches_as_the_settings_say(tmp_path: Path) -> None:
    make_store(tmp_path / "s.zarr", features=FEATURES, batches=2)
    weights = []
    for shrinkage in (0.0, 10.0):
        trunk = {"batch_shrinkage": shrinkage}
        setup = make_setup(tmp_path / "s.zarr", model=MODEL | {"trunk": MODEL["trunk"] | trunk})
        model = make_model(setup)
        set_initial_weights(model, setup)
        weights.append(model.state_dict()["trunks.0.projection.weight"])
    assert not torch.equal(*weights)
