"""Cells of any number to convert and to stream, written piece by piece as .h5ad.

Counts are negative binomial with log-normal gene abundances, in cell types and plates; accessible
peaks are binary. A file lies plate by plate, as atlases do, so that what reads it has to shuffle.
"""

from dataclasses import dataclass, replace
from math import exp
from pathlib import Path
from statistics import NormalDist

import anndata as ad
import h5py
import numpy as np
import pandas as pd
import scipy.sparse as sp

from tests.benchmarks.kept import compute_digest, make_once

Rng = np.random.Generator
PLATES, TYPES = 20, 12
DISPERSION = 2.0  # r of the negative binomial: variance = mean + mean^2 / r
SPREAD = 2.0  # standard deviation of the log abundance of features, as in droplet data
DEPTH = 0.3  # standard deviation of the log depth of cells
PIECE = 4096  # cells made at a time: some 300 MB


@dataclass(frozen=True)
class Shape:
    """The cells of a file."""

    name: str
    cells: int
    features: int
    nonzeros: int  # of a cell, on average
    binary: bool


RNA, ATAC = Shape("rna", 200_000, 20_000, 1_480, False), Shape("atac", 50_000, 100_000, 3_500, True)
SHAPES = {shape.name: shape for shape in (RNA, ATAC)}
QUICK_CELLS = {"rna": 8_000, "atac": 4_000}


def choose_shape(name: str, quick: bool) -> Shape:
    return replace(SHAPES[name], cells=QUICK_CELLS[name]) if quick else SHAPES[name]


def digest_shape(shape: Shape) -> str:
    return compute_digest(Path(__file__), repr(shape))


def find_file(shape: Shape, work: Path) -> Path:
    """The .h5ad of a shape, made once."""
    folder = work / "data" / f"{shape.name}-{shape.cells}-{digest_shape(shape)[:8]}"
    return make_once(folder, lambda made: write_cells(shape, made / "cells.h5ad")) / "cells.h5ad"


def count_nonzeros(path: Path) -> int:
    with h5py.File(path) as file:
        return int(file["X/data"].shape[0])


@dataclass(frozen=True)
class CellModel:
    """How the cells of each of T types are drawn.

    A negative binomial is a Poisson number of bursts of logarithmic size, so only what is not zero
    has to be drawn.
    """

    cumulated: np.ndarray  # (T, features): share of bursts up to each feature
    bursts: np.ndarray  # (T,): expected of a cell of depth 1
    size: np.ndarray | None  # (T, features): parameter of the sizes; None for binary data


def make_model(shape: Shape, rng: Rng) -> CellModel:
    """Types share most of their features' abundances and differ in one of five."""
    base = rng.normal(0, SPREAD, shape.features)
    change = rng.normal(0, 1, (TYPES, shape.features)) * (rng.random((TYPES, shape.features)) < 0.2)
    abundance = np.exp(base + change)
    means = np.stack([scale_abundance(a / a.sum(), shape) for a in abundance])
    rates = compute_rates(means, shape.binary)
    bursts = rates.sum(1)
    size = None if shape.binary else means / (DISPERSION + means)
    return CellModel(rates.cumsum(1) / bursts[:, None], bursts, size)


def compute_rates(means: np.ndarray, binary: bool) -> np.ndarray:
    """Expected bursts of each feature."""
    return means if binary else DISPERSION * np.log1p(means / DISPERSION)


def scale_abundance(share: np.ndarray, shape: Shape) -> np.ndarray:
    """Expected counts of features with these shares, such that a cell has the shape's non-zeros."""
    depths = [exp(NormalDist(0, DEPTH).inv_cdf((i + 0.5) / 16)) for i in range(16)]
    low, high = 0.0, 1e3 * shape.features
    while high - low > 1e-3 * high:
        total = (low + high) / 2
        rates = compute_rates(total * share, shape.binary)
        expected = np.mean([-np.expm1(-depth * rates).sum() for depth in depths])
        low, high = (total, high) if expected < shape.nonzeros else (low, total)
    return high * share


def draw_cells(model: CellModel, types: np.ndarray, rng: Rng) -> sp.csr_matrix:
    """Counts of cells of the given types, (len(types), features) float32 as files have them."""
    depth = np.exp(rng.normal(0, DEPTH, len(types)))
    bursts = rng.poisson(depth * model.bursts[types])
    cell = np.repeat(np.arange(len(types), dtype=np.int32), bursts)
    feature = np.empty(len(cell), np.int32)
    for t in np.unique(types):
        here = np.flatnonzero((types == t)[cell])
        feature[here] = np.searchsorted(model.cumulated[t], rng.random(len(here)), side="right")
    n_features = model.cumulated.shape[1]
    # Rounding may leave a share beyond the last feature.
    np.minimum(feature, n_features - 1, out=feature)
    size = np.ones(len(cell), np.float32)
    if model.size is not None:
        size = rng.logseries(model.size[types[cell], feature]).astype(np.float32)
    # Adds bursts up, and sorts.
    counts = sp.coo_matrix((size, (cell, feature)), shape=(len(types), n_features)).tocsr()
    if model.size is None:
        counts.data[:] = 1
    return counts


def draw_labels(shape: Shape, rng: Rng) -> tuple[np.ndarray, np.ndarray]:
    """Plate and type of every cell, (cells,) each: plate by plate, with its own mix of types."""
    plate = np.arange(shape.cells) * PLATES // shape.cells
    mix = rng.dirichlet(np.full(TYPES, 2.0), PLATES).cumsum(1)  # (P, T)
    cell_type = (rng.random(shape.cells)[:, None] > mix[plate]).sum(1).clip(max=TYPES - 1)
    return plate, cell_type


def write_cells(shape: Shape, path: Path, seed: int = 0) -> None:
    """The cells as anndata writes them by default (not compressed), in the memory of one piece."""
    print(f"making {path}: {shape.cells:,} cells x {shape.features:,}", flush=True)
    plates, types = draw_labels(shape, np.random.default_rng(seed + 1))
    obs = pd.DataFrame(index=[f"cell-{i:08d}" for i in range(shape.cells)])
    obs["plate"] = pd.Categorical([f"plate-{plate:02d}" for plate in plates])
    obs["cell_type"] = pd.Categorical([f"type-{cell_type:02d}" for cell_type in types])
    var = pd.DataFrame(index=[f"{shape.name}-{i:06d}" for i in range(shape.features)])
    empty = sp.csr_matrix((shape.cells, shape.features), dtype=np.float32)
    ad.AnnData(empty, obs=obs, var=var).write_h5ad(path)
    rng, ends = np.random.default_rng(seed), [np.zeros(1, np.int64)]
    model, growing = make_model(shape, rng), {"maxshape": (None,), "chunks": (2**18,)}
    with h5py.File(path, "r+") as file:
        group = file["X"]
        for name in ("data", "indices", "indptr"):
            del group[name]
        data = group.create_dataset("data", (0,), "float32", **growing)
        indices = group.create_dataset("indices", (0,), "int32", **growing)
        for first in range(0, shape.cells, PIECE):
            part, low = draw_cells(model, types[first : first + PIECE], rng), int(ends[-1][-1])
            for target, values in ((data, part.data), (indices, part.indices)):
                target.resize((low + part.nnz,))
                target[low:] = values
            ends.append(low + part.indptr[1:].astype(np.int64))
        group["indptr"] = np.concatenate(ends)
