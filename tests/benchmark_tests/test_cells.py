"""Cells that benchmarks draw have the stated shape."""

from dataclasses import replace
from pathlib import Path

import anndata as ad
import numpy as np
import pytest

from tests.benchmarks import cells
from tests.benchmarks.cells import SHAPES, Shape

SMALL = Shape("rna", 600, 300, 40, binary=False)


@pytest.mark.parametrize(
    "shape", [SMALL, replace(SMALL, name="atac", binary=True)], ids=lambda shape: shape.name
)
def test_cells_have_the_stated_shape_whatever_the_piece(
    shape: Shape, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cells, "PIECE", 256)
    path = tmp_path / "cells.h5ad"
    cells.write_cells(shape, path)
    table = ad.read_h5ad(path)
    assert table.shape == (shape.cells, shape.features)
    assert cells.count_nonzeros(path) == table.X.nnz == (table.X.toarray() > 0).sum()
    assert table.X.nnz / shape.cells == pytest.approx(shape.nonzeros, rel=0.1)
    assert table.X.has_canonical_format
    assert (table.X.data == table.X.data.round()).all()
    assert (table.X.data.max() == 1) == shape.binary
    assert table.obs["plate"].is_monotonic_increasing
    assert table.obs["cell_type"].nunique() > 2
    assert table.obs_names.is_unique


def test_counts_vary_as_the_negative_binomial_does() -> None:
    n, mean, one = 40_000, 3.0, np.ones((1, 1))
    rates = cells.compute_rates(mean * one, binary=False).sum(1)
    model = cells.CellModel(one, rates, mean / (cells.DISPERSION + mean) * one)
    depth = np.random.default_rng(0).normal(0, cells.DEPTH, n)  # the first that is drawn
    drawn = cells.draw_cells(model, np.zeros(n, int), np.random.default_rng(0))
    counts, scale = drawn.toarray()[:, 0], np.exp(depth).mean()
    assert counts.mean() == pytest.approx(mean * scale, rel=0.02)
    variance = scale * (mean + mean**2 / cells.DISPERSION) + mean**2 * np.exp(depth).var()
    assert counts.var() == pytest.approx(variance, rel=0.05)


def test_a_quick_look_has_fewer_cells_of_the_same_kind() -> None:
    for name, shape in SHAPES.items():
        assert cells.choose_shape(name, quick=True) == replace(shape, cells=cells.QUICK_CELLS[name])
        assert cells.choose_shape(name, quick=False) == shape
