"""By how much z of cells differs between two models."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from clue_dist.errors import DataError
from clue_dist.inference.cells import open_cells
from clue_dist.inference.cells.named_counts import CellWarning
from clue_dist.inference.shift import measure_shift
from tests.fakes import FakeTrainedModel, Projection
from tests.stores import make_store


class Turned(Projection):
    """Gives z with its dimensions in the reverse order."""

    def embed_batch(self, batch, per_modality=True):
        joint, alone = super().embed_batch(batch, per_modality)
        return joint.flip(1), alone


def test_z_that_turns_as_a_whole_keeps_its_neighbours(tmp_path: Path) -> None:
    store = make_store(tmp_path / "s.zarr", {"rna+adt": 60})
    before = FakeTrainedModel(dict(store.manifest.modalities))
    turned = FakeTrainedModel(before.modalities, model=Turned(before.modalities, 3))
    other = FakeTrainedModel(before.modalities, latent=1)
    cells = open_cells(store, before)
    shift = measure_shift(before, before, cells, cells)
    assert (shift.moved, shift.neighbours_kept, shift.by_chance) == (0, 1, 15 / 59)
    shift = measure_shift(before, turned, cells, cells)
    assert shift.moved > 0.5
    assert shift.neighbours_kept > 0.99
    shift = measure_shift(before, other, cells, cells)
    assert math.isnan(shift.moved)
    assert shift.by_chance < shift.neighbours_kept < 1


def test_cells_that_one_model_does_not_know_are_refused(tmp_path: Path) -> None:
    store = make_store(tmp_path / "s.zarr", {"rna+adt": 60, "adt": 20})
    after = FakeTrainedModel(dict(store.manifest.modalities))
    before = FakeTrainedModel({"rna": after.modalities["rna"]})
    with pytest.warns(CellWarning, match="does not know adt"):
        cells = open_cells(store, before)
    with pytest.raises(DataError, match=r"60 and 80, of which 60 are(.|\n)*`modalities=`"):
        measure_shift(before, after, cells, open_cells(store, after))
    shared = [open_cells(store, model, modalities=["rna"]) for model in (before, after)]
    assert measure_shift(before, after, *shared).by_chance == 15 / 59


def test_other_cells_of_the_same_number_are_refused(tmp_path: Path) -> None:
    store = make_store(tmp_path / "s.zarr", {"rna": 40, "adt": 40})
    models = [
        FakeTrainedModel({name: store.manifest.modalities[name]}) for name in store.modalities
    ]
    with pytest.warns(CellWarning, match="does not know"):
        cells = [open_cells(store, model) for model in models]
    with pytest.raises(DataError, match="40 and 40, of which 0 are the same"):
        measure_shift(*models, *cells)


def test_a_few_cells_have_no_neighbours(tmp_path: Path) -> None:
    store = make_store(tmp_path / "s.zarr", {"rna+adt": 16})
    model = FakeTrainedModel(dict(store.manifest.modalities))
    cells = open_cells(store, model)
    with pytest.raises(DataError, match="too few cells"):
        measure_shift(model, model, cells, cells)
