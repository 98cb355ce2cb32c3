"""The encoders' input: what sets biological batches apart becomes shorter, and little else."""

from __future__ import annotations

import copy
from pathlib import Path

import numpy as np
import pytest
import torch

from clue_dist import config as configs
from clue_dist.data.assembly import read_batch
from clue_dist.model import initialise
from clue_dist.model.batch_shrinkage import find_batch_shrinkage
from clue_dist.model.clue import CLUE
from clue_dist.model.initialise import _shrink_batches, initialise_model, sample_cells
from clue_dist.model.modality_spec import specify_modalities
from clue_dist.store.reader import Store
from tests.stores import make_store

N, WIDTH = 8000, 6


def draw_batches(shift: float) -> tuple[np.ndarray, np.ndarray]:
    """Cells of two batches, `shift` apart along the first axis; the second axis is the longest."""
    generator = np.random.default_rng(0)
    cells = generator.normal(size=(N, WIDTH)) * [1, 5, 1, 1, 1, 0.5]
    batch = np.arange(N) % 2
    cells[:, 0] += shift * (batch - 0.5)
    return cells - cells.mean(0), batch


def test_the_direction_between_batches_is_shortened_by_how_far_they_lie_apart() -> None:
    for shift in (0.2, 2.0, 20.0):
        cells, batch = draw_batches(shift)
        shrunken = cells @ find_batch_shrinkage(cells, batch, 10).matrix.T
        length = shrunken.std(0) / cells.std(0)
        # The ridge is a part of the variance that batches are compared with.
        ridge = 8 * WIDTH / N * (cells - draw_means(cells, batch)).var(0).mean()
        ratio = (shift / 2) ** 2 / (1 + ridge)
        np.testing.assert_allclose(length[0], (1 + 10 * ratio) ** -0.5, rtol=0.05)
        np.testing.assert_allclose(length[1:], 1, rtol=0.05)
        told = find_batch_shrinkage(cells, batch, 10).batch_separation
        np.testing.assert_allclose(told, ratio, rtol=0.05, atol=0.01)


def draw_means(cells: np.ndarray, batch: np.ndarray) -> np.ndarray:
    return np.stack([cells[batch == code].mean(0) for code in (0, 1)])[batch]


def test_cells_that_differ_by_chance_alone_keep_their_length() -> None:
    """50 cells of two batches in 20 dimensions: some direction sets them apart."""
    cells = np.random.default_rng(0).normal(size=(50, 20))
    cells -= cells.mean(0)
    batch = np.arange(50) % 2
    shrunken = cells @ find_batch_shrinkage(cells, batch, 10).matrix.T
    assert np.linalg.norm(shrunken) > 0.95 * np.linalg.norm(cells)
    alone = cells @ find_batch_shrinkage(cells, np.arange(50), 10).matrix.T
    assert np.linalg.norm(alone) > 0.9 * np.linalg.norm(cells)


@pytest.mark.parametrize("known", [True, False])
def test_batches_lie_nearer_in_what_the_encoders_read(tmp_path: Path, known: bool) -> None:
    """Counts depend on the label alone: labels stand for batches here."""
    store = make_store(tmp_path / "s.zarr", cells={"rna+adt": 600}, features={"rna": 30, "adt": 8})
    config = configs.Config(model={"trunk": {"projection": 6}})
    model = CLUE(specify_modalities(store.manifest.modalities, config), 2, config.model)
    n_train = {"rna+adt": 600}
    initialise_model(model, store, n_train, svd=True, seed=0)
    counts, _ = sample_cells(store, n_train, "rna")
    label = store.segments["rna+adt"].read_codes("label", np.arange(600))
    trunk = model.get_trunk("rna")
    before = measure_separation(model, store, label)
    with torch.no_grad():
        _shrink_batches(trunk, counts, label if known else label * 0, weight=10)
    after = measure_separation(model, store, label)
    if known:
        assert after < 0.4 * before
        assert trunk.batch_separation > 0.5
    else:
        assert after == before
        assert trunk.batch_separation < 1e-9


def test_cells_of_an_unknown_batch_say_nothing(tmp_path: Path) -> None:
    store = make_store(tmp_path / "s.zarr", cells={"rna": 300}, features={"rna": 30})
    config = configs.Config(model={"trunk": {"projection": 6}})
    model = CLUE(specify_modalities(store.manifest.modalities, config), 2, config.model)
    initialise_model(model, store, {"rna": 300}, svd=True, seed=0)
    counts, _ = sample_cells(store, {"rna": 300}, "rna")
    code = (
        store.segments["rna"].read_codes("label", np.arange(300)) - 1
    )  # three, of which one is -1
    trunk, other = model.get_trunk("rna"), copy.deepcopy(model.get_trunk("rna"))
    with torch.no_grad():
        _shrink_batches(trunk, counts, code, weight=10)
        _shrink_batches(other, counts[code >= 0], code[code >= 0], weight=10)
    assert trunk.batch_separation > 0.1
    for name, values in trunk.state_dict().items():
        assert torch.equal(values, other.state_dict()[name])


def test_one_known_batch_leaves_the_projection_as_it_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = make_store(tmp_path / "s.zarr", cells={"rna": 300}, features={"rna": 30})
    config = configs.Config(model={"trunk": {"projection": 6}})
    model = CLUE(specify_modalities(store.manifest.modalities, config), 2, config.model)
    counts, batch = sample_cells(store, {"rna": 300}, "rna")
    monkeypatch.setattr(initialise, "sample_cells", lambda *_: (counts, batch - 1))
    initialise_model(model, store, {"rna": 300}, svd=True, seed=0)
    assert model.get_trunk("rna").batch_separation == 0


def measure_separation(model: CLUE, store: Store, label: np.ndarray) -> float:
    """How far the means of labels lie apart in the RNA's components, (1,), by cells' deviation."""
    batch = read_batch(store, "rna+adt", np.arange(len(label)))
    with torch.no_grad():
        components = model.get_trunk("rna").compute_components(batch.modalities["rna"].counts)
    x = components[:, :6].double().numpy()
    means = np.stack([x[label == code].mean(0) for code in range(3)])[label]
    return float((means - x.mean(0)).std() / (x - means).std())
