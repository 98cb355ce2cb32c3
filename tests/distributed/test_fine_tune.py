"""A trained model is trained on: with new unpaired cells, with another modality, by both doors."""

from __future__ import annotations

from pathlib import Path

import mudata as md
import numpy as np
import pytest

import clue_dist
from clue_dist.api.trained_run import Run, load
from clue_dist.errors import ConfigError
from data_prep.simulate import SimulationSpec, build_mudata, parse_features
from tests.distributed.command import alone
from tests.unit.fit_helpers import SMALL

pytestmark = pytest.mark.slow

FEATURES = ("rna:30", "adt:6", "atac:40")
# So small a rate that the weights stay what they were.
STILL = {"train.epochs": 1, "train.lr": 1e-12}


@pytest.fixture(scope="module")
def cells() -> md.MuData:
    """200 cells: 100 with all three modalities, the others with one; half of them of a batch."""
    spec = SimulationSpec.from_features(
        parse_features(list(FEATURES)), {}, cells=200, paired=0.5, seed=0
    )
    return build_mudata(spec)


@pytest.fixture(scope="module")
def old_cells(cells: md.MuData) -> md.MuData:
    """The cells with RNA and proteins, which were all that was measured."""
    return md.MuData({name: cells[name][:100].copy() for name in ("rna", "adt")})


@pytest.fixture(scope="module")
def run(old_cells: md.MuData, tmp_path_factory: pytest.TempPathFactory) -> Run:
    return clue_dist.fit(old_cells, tmp_path_factory.mktemp("tune") / "old", settings=SMALL)


def test_all_weights_train_on_with_new_unpaired_cells(
    run: Run, cells: md.MuData, old_cells: md.MuData, tmp_path: Path
) -> None:
    more = md.MuData({name: cells[name].copy() for name in ("rna", "adt")})
    for table in more.mod.values():
        table.obs["batch"] = np.where(
            np.arange(table.n_obs) < 100, table.obs["batch"].astype(str), "new"
        )
    # Features in another order, and one that the model does not know.
    more.mod["rna"] = more["rna"][:, ::-1].copy()
    more.mod["rna"].var_names = ["unknown", *more["rna"].var_names[1:]]
    more.update()
    tuned = run.fine_tune(more, tmp_path / "new", train="all", settings={"train.epochs": 1})
    old, new = run.trained_model, tuned.trained_model
    assert new.modalities == old.modalities
    names = [model.batch_vocabulary.names for model in (old, new)]
    assert {*names[1]} == {*names[0], "new"}
    assert new.config.train.lr == pytest.approx(0.3 * old.config.train.lr)
    assert old.seen_cells < new.seen_cells
    assert np.isfinite(tuned.embed(more)).all()
    shift = tuned.measure_shift(run.folder, old_cells)
    assert 2 * shift.by_chance < shift.neighbours_kept < 1


def test_another_modality_stands_beside_the_old_ones(
    run: Run, cells: md.MuData, old_cells: md.MuData, tmp_path: Path
) -> None:
    tuned = run.fine_tune(
        cells, tmp_path / "new", train="all", new_modalities=["atac"], settings=STILL
    )
    old, new = run.trained_model, tuned.trained_model
    assert list(new.modalities) == [*old.modalities, "atac"]
    assert {name: new.modalities[name] for name in old.modalities} == old.modalities
    before = old.model.state_dict()
    for name, values in new.model.state_dict().items():
        part, number, *_ = name.split(".")
        if part in ("trunks", "decoders") and number in "01" and values.dtype.is_floating_point:
            np.testing.assert_allclose(values, before[name], atol=1e-6, err_msg=name)
    # A cell with ATAC alone may have no counts.
    assert np.isfinite(tuned.embed(cells)[:100]).all()
    assert tuned.impute(old_cells, "atac").n_vars == 40
    # The modality that nothing has trained yet takes its part in z.
    shift = tuned.measure_shift(run, old_cells)
    assert np.isnan(shift.moved)
    assert shift.neighbours_kept > 2 * shift.by_chance, shift


def test_the_command_does_as_the_call(run: Run, cells: md.MuData, tmp_path: Path) -> None:
    cells.write(tmp_path / "cells.h5mu")
    store, out = str(tmp_path / "new.zarr"), str(tmp_path / "new")
    words = ["--features-from", str(run.folder), "--new-modality", "atac", "--out", store]
    alone("-m", "data_prep", "convert", str(tmp_path / "cells.h5mu"), *words)
    words = ["--run", str(run.folder), "--store", store, "--out", out, "--train", "all"]
    done = alone("launch/fine_tune.py", *words, "--set", "train.epochs=1")
    assert "modalities kept: rna, adt; new: atac" in done.stdout
    assert list(load(out).trained_model.modalities) == ["rna", "adt", "atac"]


def test_what_only_the_training_of_all_weights_takes_is_refused(
    run: Run, old_cells: md.MuData, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match="without settings"):
        run.fine_tune(old_cells, tmp_path / "new", settings=STILL)
