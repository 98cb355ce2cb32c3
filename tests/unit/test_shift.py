"""By how much z of cells differs between two models."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from clue_dist.errors import DataError
from clue_dist.inference.cells import open_cells
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


def test_a_few_cells_have_no_neighbours(tmp_path: Path) -> None:
    store = make_store(tmp_path / "s.zarr", {"rna+adt": 16})
    model = FakeTrainedModel(dict(store.manifest.modalities))
    cells = open_cells(store, model)
    with pytest.raises(DataError, match="too few cells"):
        measure_shift(model, model, cells, cells)
