"""A model learns new batches: decoders know them, and nothing else of it changes."""

from __future__ import annotations

import argparse
from pathlib import Path

import pandas as pd
import pytest
import torch

from clue_dist import progress
from clue_dist.api.trained_run import load
from clue_dist.checkpoint.model_card import read_model_card, write_model_card
from clue_dist.commands.fine_tune import plan_further_training
from clue_dist.config_file import load_config
from clue_dist.errors import ConfigError, DataError
from clue_dist.inference import new_batches
from clue_dist.inference.cells.store_cells import StoreCells
from clue_dist.inference.load_model import TrainedModel, load_model
from clue_dist.inference.new_batches import learn_batches, tune_batches
from clue_dist.inference.stream import embed_in_memory
from clue_dist.store.batch_vocabulary import BatchVocabulary
from clue_dist.store.reader import Store
from clue_dist.train.initial_weights import plan_warm_start
from tests.stores import make_store
from tests.unit.run_helpers import commit_weights, make_model, make_setup

FEATURES = {"rna": 30, "adt": 8}


@pytest.fixture(autouse=True)
def _few_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(new_batches, "STEPS", 8)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that knows two batches."""
    folder = tmp_path_factory.mktemp("batches")
    make_store(folder / "old.zarr", features=FEATURES)
    setup = make_setup(folder / "old.zarr")
    write_model_card(folder / "run", setup.store, setup.config)
    commit_weights(folder / "run" / "best" / "step-00000005", make_model(setup).state_dict())
    return folder / "run"


class RareBatch(StoreCells):
    """All cells are of one new batch, but for one in the second slice."""

    def read_obs(self) -> pd.DataFrame:
        obs = super().read_obs().assign(batch="batch-2")
        obs.iloc[self.slice_cells(4)[1].rows[0], obs.columns.get_loc("batch")] = "rare"
        return obs

    @property
    def batches(self) -> BatchVocabulary:
        names = [*super().batches.names, "rare"]
        return BatchVocabulary.from_lists(names, {}, "")


@pytest.fixture
def trained_model(run: Path) -> TrainedModel:
    return load_model(run)


@pytest.fixture(scope="module")
def new_store(run: Path) -> Store:
    """Cells of four batches, two of which the run knows."""
    return make_store(run.parent / "new.zarr", features=FEATURES, batches=4, seed=1)


def test_decoders_learn_the_new_batches_alone(
    trained_model: TrainedModel, new_store: Store
) -> None:
    tuned, report = learn_batches(trained_model, StoreCells(new_store, trained_model))
    assert report.names == ["batch-2", "batch-3"]
    assert tuned.batch_vocabulary.names == ["batch-0", "batch-1", "batch-2", "batch-3"]
    assert report.gain > 0
    before, after = trained_model.model.state_dict(), tuned.model.state_dict()
    assert before.keys() == after.keys()
    for name, values in before.items():
        assert after[name][: len(values)].equal(values), name
        assert len(after[name]) == len(values) + 2 * name.endswith("batch.weight"), name
    first, second = after["decoders.0.batch.weight"][2:]
    assert not first.equal(second)


def test_steps_are_counted(
    trained_model: TrainedModel,
    new_store: Store,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(progress, "PATIENCE", 0.0)
    monkeypatch.setattr(progress, "has_spectator", lambda: False)
    learn_batches(trained_model, StoreCells(new_store, trained_model))
    assert "learning batches: 8 of 8, " in capsys.readouterr().err  # both slices four times


def test_every_new_batch_is_looked_at(
    trained_model: TrainedModel, new_store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A batch of few cells lies in few slices, which must not all be passed over."""
    monkeypatch.setattr(new_batches, "STEP_CELLS", 4)
    monkeypatch.setattr(new_batches, "TEACHING_CELLS", 8)
    tuned, report = learn_batches(trained_model, RareBatch(new_store, trained_model))
    assert report.names == ["batch-2", "rare"]
    assert report.n_cells < 40
    for decoder in tuned.model.decoders:
        rows = decoder.batch.weight
        assert not rows[3].equal(rows[:2].mean(0))


def test_no_embedding_moves(trained_model: TrainedModel, new_store: Store) -> None:
    cells = StoreCells(new_store, trained_model)
    tuned, _ = learn_batches(trained_model, cells)
    before, after = (embed_in_memory(model, cells).joint for model in (trained_model, tuned))
    torch.testing.assert_close(before, after, rtol=0, atol=0)


def test_the_new_model_is_a_folder_like_any_other(
    run: Path,
    trained_model: TrainedModel,
    new_store: Store,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    report = tune_batches(
        run, trained_model, StoreCells(new_store, trained_model), tmp_path / "new"
    )
    assert capsys.readouterr().out.startswith("2 new batches of ")  # in a notebook, too
    tuned = load_model(tmp_path / "new")
    assert tuned.batch_vocabulary.names[2:] == report.names
    assert read_model_card(tmp_path / "new").seen_cells == read_model_card(run).seen_cells
    assert "learnt later: batch-2, batch-3" in (tmp_path / "new" / "README.md").read_text()
    with pytest.raises(DataError, match="no cell is of a batch"):
        learn_batches(tuned, StoreCells(new_store, tuned))
    with pytest.raises(ConfigError, match="already there"):
        tune_batches(run, trained_model, StoreCells(new_store, trained_model), tmp_path / "new")


def test_cells_of_which_no_batch_is_known_teach_nothing(
    trained_model: TrainedModel, new_store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    cells = StoreCells(new_store, trained_model)
    obs = cells.read_obs().drop(columns="batch").reset_index(drop=True)  # cells of no name, too
    monkeypatch.setattr(cells, "read_obs", lambda: obs)
    with pytest.raises(DataError, match="got: no batch at all"):
        learn_batches(trained_model, cells)


def test_several_processes_are_refused_as_each_would_write_the_folder(
    run: Path, trained_model: TrainedModel, new_store: Store, tmp_path: Path, monkeypatch
) -> None:
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    cells = StoreCells(new_store, trained_model)
    with pytest.raises(ConfigError, match="by one process"):
        tune_batches(run, trained_model, cells, tmp_path / "tuned")
    assert not list(tmp_path.iterdir())


def test_another_word_for_the_training_is_refused(
    run: Path, new_store: Store, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match="no such training"):
        load(run).fine_tune(new_store, tmp_path, train="everything")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match=r"new_modalities=\['atac'\]"):
        load(run).fine_tune(new_store, tmp_path / "tuned", new_modalities="atac")


def test_another_word_for_a_choice_is_refused(run: Path, new_store: Store, tmp_path: Path) -> None:
    trained, tuned = load(run), tmp_path / "tuned"
    calls = {
        "fine_tune\n": lambda: trained.fine_tune(new_store, tuned, batchkey="donor"),
        'fine_tune, train="all"\n': lambda: trained.fine_tune(
            new_store, tuned, train="all", batchkey="donor"
        ),
        "measure_shift\n": lambda: trained.measure_shift(run, new_store, batchkey="donor"),
    }
    for where, call in calls.items():
        with pytest.raises(
            ConfigError, match=f"where: {where}(.|\n)*did you mean batch_key"
        ) as raised:
            call()
        assert raised.value.got == "batchkey"
    assert not tuned.exists()


def test_a_model_of_a_single_batch_has_no_place_for_others(
    new_store: Store, tmp_path: Path
) -> None:
    make_store(tmp_path / "old.zarr", features=FEATURES, batches=1)
    setup = make_setup(tmp_path / "old.zarr")
    write_model_card(tmp_path / "run", setup.store, setup.config)
    commit_weights(tmp_path / "run" / "best" / "step-00000005", make_model(setup).state_dict())
    single = load_model(tmp_path / "run")
    with pytest.raises(ConfigError, match="a single batch"):
        learn_batches(single, StoreCells(new_store, single))


def test_further_training_takes_the_settings_of_the_run(run: Path, new_store: Store) -> None:
    words = {"run": run, "store": str(new_store.root), "out": run.parent / "next"}
    arguments = argparse.Namespace(**words, overrides=["seed=3"], dry_run=True)
    planned = plan_further_training(arguments)
    config, before = (
        load_config(planned.config, planned.overrides),
        load_config(run / "config.json"),
    )
    assert (config.model, config.seed) == (before.model, 3)
    assert (config.store, config.run) == (str(new_store.root), str(run.parent / "next"))
    assert config.train.lr == pytest.approx(0.3 * before.train.lr)
    assert config.train.epochs == config.data.batch_size == "auto"
    setup = make_setup(new_store.root, train={"lr": config.train.lr})
    assert plan_warm_start(planned.init_from, setup).card == read_model_card(run)
