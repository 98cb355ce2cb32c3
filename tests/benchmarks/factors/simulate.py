"""Counts of cells whose shared and private factors are known, cut into a mosaic."""

from dataclasses import dataclass
from itertools import combinations
from pathlib import Path

import mudata as md
import numpy as np
import scipy.sparse as sp
from anndata import AnnData

from clue_dist.errors import DataError

TEST, PAIRED = 0.2, 0.4  # shares of the cells; the others carry one modality each, in equal parts


@dataclass(frozen=True)
class Assay:
    """One modality."""

    name: str
    features: int
    depth: float  # counts of a cell with an average library
    dispersion: float  # the NB's r


@dataclass(frozen=True)
class Design:
    """What is simulated: every assay sees the shared factors and private ones of its own."""

    assays: tuple[Assay, ...]
    cells: int = 8000
    shared: int = 8
    private: int = 8
    # Standard deviation of a factor's effect on the log rate of a feature, so weak that even the
    # counts do not show all of it.
    shared_strength: float = 0.1
    private_strength: float = 0.08

    def __post_init__(self) -> None:
        alone = self.cells * (1 - TEST - PAIRED)
        if alone < len(self.assays) or self.shared < 1 or self.private < 1:
            raise DataError("a design without cells of every kind, or without factors", got=self)

    @property
    def names(self) -> list[str]:
        return [assay.name for assay in self.assays]

    @property
    def subsets(self) -> dict[str, tuple[str, ...]]:
        """Two or more assays, but not all of them, by name."""
        sizes = range(2, len(self.names))
        return {"+".join(some): some for size in sizes for some in combinations(self.names, size)}


@dataclass(frozen=True)
class Simulation:
    """The cells of a design."""

    design: Design
    seed: int
    counts: dict[str, sp.csr_matrix]  # by assay, (cells, features)
    factors: dict[str, np.ndarray]  # "shared", and by assay its private ones, (cells, factors)


def simulate_cells(design: Design, seed: int = 0) -> Simulation:
    """Factors are standard normals, log rates linear in them, counts negative binomial."""
    shared = np.random.default_rng([seed, 0]).standard_normal((design.cells, design.shared))
    factors, counts = {"shared": shared}, {}
    for i, assay in enumerate(design.assays):
        rng = np.random.default_rng([seed, 1 + i])
        private = rng.standard_normal((design.cells, design.private))
        scaled = np.hstack([shared * design.shared_strength, private * design.private_strength])
        factors[assay.name], counts[assay.name] = private, _draw_counts(assay, scaled, rng)
    return Simulation(design, seed, counts, factors)


def _draw_counts(assay: Assay, factors: np.ndarray, rng: np.random.Generator) -> sp.csr_matrix:
    """Counts of every cell, at least one in each, of factors as strong as they are."""
    effect = rng.standard_normal((factors.shape[1], assay.features))
    rate = np.exp(rng.normal(0, 1, assay.features) + factors @ effect)  # (cells, features)
    library = assay.depth * rng.lognormal(0, 0.3, (len(factors), 1))
    mean = rate / rate.sum(1, keepdims=True) * library
    counts = rng.poisson(rng.gamma(assay.dispersion, mean / assay.dispersion)).astype(np.int32)
    counts[counts.sum(1) == 0, 0] = 1  # the conversion drops empty cells
    return sp.csr_matrix(counts)


def cut_parts(design: Design) -> dict[str, np.ndarray]:
    """Which cells are "test", "paired" or carry one assay alone.

    Cells are independent draws, so any order will do.
    """
    test, paired = round(design.cells * TEST), round(design.cells * (TEST + PAIRED))
    alone = np.linspace(paired, design.cells, len(design.assays) + 1).astype(int)
    parts = np.split(np.arange(design.cells), [test, *alone[:-1]])
    return dict(zip(("test", "paired", *design.names), parts, strict=True))


def list_seen(parts: dict[str, np.ndarray], assay: str) -> np.ndarray:
    """Training cells that carry an assay."""
    return np.concatenate([parts["paired"], parts[assay]])


def write_files(simulation: Simulation, folder: Path) -> None:
    """train.h5mu to learn from and test.h5mu to embed, as the command line reads them.

    In test.h5mu: the paired training cells, on which probes learn, and the test cells, with all
    assays, and once more with each of the subsets, as if the others had not been measured.
    """
    design, parts = simulation.design, cut_parts(simulation.design)
    probed = np.concatenate([parts["paired"], parts["test"]])
    subsets = {"": tuple(design.names)} | design.subsets
    folder.mkdir(parents=True, exist_ok=True)
    train, test = {}, {}
    for name in design.names:
        shown = {subset: probed for subset, some in subsets.items() if name in some}
        train[name] = _make_table(simulation, name, {"": list_seen(parts, name)})
        test[name] = _make_table(simulation, name, shown)
    with md.set_options(pull_on_update=False):
        md.MuData(train).write(folder / "train.h5mu")
        md.MuData(test).write(folder / "test.h5mu")


def list_barcodes(rows: np.ndarray, subset: str = "") -> list[str]:
    """Of cells, or of what is left of them where only a subset of assays was measured."""
    return [f"cell{i:06d}{subset and f'_{subset}'}" for i in rows]


def _make_table(simulation: Simulation, name: str, rows: dict[str, np.ndarray]) -> AnnData:
    """Cells of one assay, by the subset that they show it in."""
    table = AnnData(simulation.counts[name][np.concatenate(list(rows.values()))])
    table.obs_names = [
        name for subset, some in rows.items() for name in list_barcodes(some, subset)
    ]
    table.var_names = [f"{name}{i:05d}" for i in range(table.n_vars)]
    return table
