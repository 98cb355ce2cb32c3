"""Cells of any number to convert and to stream, written piece by piece as .h5ad.

Counts are negative binomial with log-normal gene abundances, in cell types and plates; accessible peaks are binary.
A file lies plate by plate, as atlases do, so that what reads it has to shuffle.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from math import exp
from pathlib import Path
from statistics import NormalDist

import anndata as ad
import h5py
import numpy as np
import pandas as pd
import scipy.sparse as sp

from tests.benchmarks import common

PLATES, TYPES = 20, 12
DISPERSION = 2.0  # r of the negative binomial: variance = mean + mean^2 / r
SPREAD = 2.0  # standard deviation of the log abundance of features, as in droplet data
DEPTH = 0.3  # standard deviation of the log depth of cells
PIECE = 4096  # cells made at a time: some 300 MB


@dataclass(frozen=True)
class Shape:
    """nonzeros: a cell's, on average."""

    name: str
    cells: int
    features: int
    nonzeros: int
    binary: bool


SHAPES = {
    s.name: s
    for s in (
        Shape("rna", 200_000, 20_000, 1_480, False),
        Shape("atac", 50_000, 100_000, 3_500, True),
    )
}
QUICK_CELLS = {"rna": 8_000, "atac": 4_000}


def shape_of(name: str, quick: bool) -> Shape:
    return replace(SHAPES[name], cells=QUICK_CELLS[name]) if quick else SHAPES[name]


def digest_of(shape: Shape) -> str:
    return common.digest(Path(__file__), repr(shape))


def file_of(shape: Shape, work: Path) -> Path:
    """The .h5ad of a shape, made once."""
    name = f"{shape.name}-{shape.cells}-{digest_of(shape)[:8]}"
    return (
        common.once(work / "data" / name, lambda folder: write(shape, folder / "cells.h5ad"))
        / "cells.h5ad"
    )


def nonzeros_in(path: Path) -> int:
    with h5py.File(path) as file:
        return int(file["X/data"].shape[0])


@dataclass(frozen=True)
class Model:
    """How the cells of each type are drawn.

    A negative binomial is a Poisson number of bursts of logarithmic size, so only what is not zero has to be drawn.
    cumulated: (T, features) share of bursts up to each feature; bursts: (T,) expected a cell of depth 1;
    size: (T, features) parameter of the logarithmic distribution, None for binary data.
    """

    cumulated: np.ndarray
    bursts: np.ndarray
    size: np.ndarray | None


def model_of(shape: Shape, rng: np.random.Generator) -> Model:
    """Types share most of their features' abundances and differ in one of five."""
    base = rng.normal(0, SPREAD, shape.features)
    change = rng.normal(0, 1, (TYPES, shape.features)) * (rng.random((TYPES, shape.features)) < 0.2)
    abundance = np.exp(base + change)
    means = np.stack([scaled(a / a.sum(), shape) for a in abundance])
    rates = rates_of(means, shape.binary)
    bursts = rates.sum(1)
    size = None if shape.binary else means / (DISPERSION + means)
    return Model(rates.cumsum(1) / bursts[:, None], bursts, size)


def rates_of(means: np.ndarray, binary: bool) -> np.ndarray:
    """Expected bursts of each feature."""
    return means if binary else DISPERSION * np.log1p(means / DISPERSION)


def scaled(share: np.ndarray, shape: Shape) -> np.ndarray:
    """Expected counts of each feature, (features,), such that a cell has the shape's non-zeros. share: sums to 1."""
    depths = [exp(NormalDist(0, DEPTH).inv_cdf((i + 0.5) / 16)) for i in range(16)]
    low, high = 0.0, 1e3 * shape.features
    while high - low > 1e-3 * high:
        total = (low + high) / 2
        rates = rates_of(total * share, shape.binary)
        expected = np.mean([-np.expm1(-depth * rates).sum() for depth in depths])
        low, high = (total, high) if expected < shape.nonzeros else (low, total)
    return high * share


def draw(model: Model, types: np.ndarray, rng: np.random.Generator) -> sp.csr_matrix:
    """Counts of cells of the given types, (len(types), features) float32 as files have them."""
    depth = np.exp(rng.normal(0, DEPTH, len(types)))
    bursts = rng.poisson(depth * model.bursts[types])
    cell = np.repeat(np.arange(len(types), dtype=np.int32), bursts)
    feature = np.empty(len(cell), np.int32)
    for t in np.unique(types):
        here = np.flatnonzero((types == t)[cell])
        feature[here] = np.searchsorted(model.cumulated[t], rng.random(len(here)), side="right")
    n_features = model.cumulated.shape[1]
    np.minimum(
        feature, n_features - 1, out=feature
    )  # a share that rounding left beyond the last feature
    ones = np.ones(len(cell), np.float32)
    size = (
        ones
        if model.size is None
        else rng.logseries(model.size[types[cell], feature]).astype(np.float32)
    )
    counts = sp.coo_matrix(
        (size, (cell, feature)), shape=(len(types), n_features)
    ).tocsr()  # adds bursts up, sorted
    if model.size is None:
        counts.data[:] = 1
    return counts


def labels(shape: Shape, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Plate and type of every cell, (cells,) int each: plate by plate, each with its own mix of types."""
    plate = np.arange(shape.cells) * PLATES // shape.cells
    mix = rng.dirichlet(np.full(TYPES, 2.0), PLATES).cumsum(1)  # (P, T)
    type_ = (rng.random(shape.cells)[:, None] > mix[plate]).sum(1).clip(max=TYPES - 1)
    return plate, type_


def pieces(shape: Shape, seed: int = 0) -> Iterator[sp.csr_matrix]:
    rng = np.random.default_rng(seed)
    model = model_of(shape, rng)
    _, types = labels(shape, np.random.default_rng(seed + 1))
    for lo in range(0, shape.cells, PIECE):
        yield draw(model, types[lo : lo + PIECE], rng)


def write(shape: Shape, path: Path, seed: int = 0) -> None:
    """The cells as anndata writes them by default (not compressed), in the memory of one piece."""
    print(f"making {path}: {shape.cells:,} cells x {shape.features:,}", flush=True)
    plate, type_ = labels(shape, np.random.default_rng(seed + 1))
    columns = {
        "plate": [f"plate-{p:02d}" for p in plate],
        "cell_type": [f"type-{t:02d}" for t in type_],
    }
    obs = pd.DataFrame(
        columns, index=[f"cell-{i:08d}" for i in range(shape.cells)], dtype="category"
    )
    var = pd.DataFrame(index=[f"{shape.name}-{i:06d}" for i in range(shape.features)])
    empty = sp.csr_matrix((shape.cells, shape.features), dtype=np.float32)
    ad.AnnData(empty, obs=obs, var=var).write_h5ad(path)
    with h5py.File(path, "r+") as file:
        attributes = dict(file["X"].attrs)
        del file["X"]
        group = file.create_group("X")
        group.attrs.update(attributes)
        _fill(group, pieces(shape, seed))


def _fill(group: h5py.Group, parts: Iterator[sp.csr_matrix]) -> None:
    """CSR of the parts, one below the other."""
    growing = {"shape": (0,), "maxshape": (None,), "chunks": (2**18,)}
    data = group.create_dataset("data", dtype="float32", **growing)
    indices = group.create_dataset("indices", dtype="int32", **growing)
    ends = [np.zeros(1, np.int64)]
    for part in parts:
        lo = int(ends[-1][-1])
        for target, values in ((data, part.data), (indices, part.indices)):
            target.resize((lo + part.nnz,))
            target[lo:] = values
        ends.append(lo + part.indptr[1:].astype(np.int64))
    group.create_dataset("indptr", data=np.concatenate(ends))
