"""Mosaics of two modalities, drawn, for which the speed of a step is measured."""

from dataclasses import dataclass
from pathlib import Path

import anndata as ad
import mudata as md
import numpy as np
import pandas as pd
import scipy.sparse as sp

SPREAD = 1.5  # standard deviation of the log abundance of features
TYPES = 8


@dataclass(frozen=True)
class Modality:
    """What is drawn of a modality."""

    name: str
    features: int
    depth: int  # counts of a cell, on average
    binary: bool = False


@dataclass(frozen=True)
class Shape:
    """The cells of a mosaic: half carry both modalities, a quarter each one."""

    name: str
    cells: int
    modalities: tuple[Modality, Modality]


SMALL = Shape("small", 8_000, (Modality("rna", 2_000, 1_500), Modality("adt", 100, 2_000)))
LARGE = Shape(
    "large", 3_000, (Modality("rna", 20_000, 3_000), Modality("atac", 100_000, 4_200, binary=True))
)
SHAPES = {shape.name: shape for shape in (SMALL, LARGE)}
QUICK_CELLS = 3_200


def write_mosaic(shape: Shape, path: Path) -> None:
    """Write a shape's cells as .h5mu, the same at any time."""
    rng = np.random.default_rng(0)
    names = np.array([f"cell{i}" for i in range(shape.cells)])
    obs = pd.DataFrame({"cell_type": rng.integers(TYPES, size=len(names)).astype(str)}, index=names)
    place = rng.permutation(shape.cells) / shape.cells
    tables = {}
    for modality, lacks in zip(shape.modalities, (place >= 0.75, place < 0.25), strict=True):
        kept = np.flatnonzero(~lacks)
        table = ad.AnnData(_draw_counts(modality, len(kept), rng), obs=obs.iloc[kept])
        table.var_names = [f"{modality.name}{i}" for i in range(modality.features)]
        tables[modality.name] = table
    md.MuData(tables).write(path)


def _draw_counts(modality: Modality, n_cells: int, rng: np.random.Generator) -> sp.csr_matrix:
    """Deal each cell's counts to the features by their abundance."""
    cumulated = np.cumsum(np.exp(rng.normal(0, SPREAD, modality.features)))
    per_cell = rng.poisson(modality.depth, n_cells)
    place = rng.random(per_cell.sum()) * cumulated[-1]
    column = np.searchsorted(cumulated, place).clip(max=modality.features - 1)
    row = np.repeat(np.arange(n_cells), per_cell)
    shape = n_cells, modality.features
    counts = sp.coo_matrix((np.ones(len(row), np.float32), (row, column)), shape).tocsr()
    counts.sum_duplicates()
    if modality.binary:
        counts.data[:] = 1
    return counts
