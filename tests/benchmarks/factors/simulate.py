"""Counts of cells whose shared and private factors are known, cut into a mosaic."""

from __future__ import annotations

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
    """One modality. depth: counts of a cell with an average library; dispersion: the NB's r."""

    name: str
    features: int
    depth: float
    dispersion: float


@dataclass(frozen=True)
class Design:
    """What is simulated: every assay sees the `shared` factors and `private` ones of its own. strength: standard
    deviation of a factor's effect on the log rate of a feature, so weak that even the counts do not show all of it."""

    assays: tuple[Assay, ...]
    cells: int = 8000
    shared: int = 8
    private: int = 8
    shared_strength: float = 0.1
    private_strength: float = 0.08

    def __post_init__(self) -> None:
        if (
            self.cells * (1 - TEST - PAIRED) < len(self.assays)
            or self.shared < 1
            or self.private < 1
        ):
            raise DataError("a design without cells of every kind, or without factors", got=self)

    @property
    def names(self) -> list[str]:
        return [a.name for a in self.assays]

    @property
    def subsets(self) -> dict[str, tuple[str, ...]]:
        """Two or more assays, but not all of them, by name."""
        sizes = range(2, len(self.names))
        return {"+".join(some): some for size in sizes for some in combinations(self.names, size)}


@dataclass(frozen=True)
class Simulation:
    """counts: by assay, (cells, features); factors: "shared" and by assay its private ones, (cells, factors)."""

    design: Design
    seed: int
    counts: dict[str, sp.csr_matrix]
    factors: dict[str, np.ndarray]


def simulate(design: Design, seed: int = 0) -> Simulation:
    """Factors are independent standard normals; log rates are linear in them; counts are negative binomial."""
    factors = {
        "shared": np.random.default_rng([seed, 0]).standard_normal((design.cells, design.shared))
    }
    counts = {}
    for i, assay in enumerate(design.assays):
        rng = np.random.default_rng([seed, 1 + i])
        own = rng.standard_normal((design.cells, design.private))
        scaled = np.hstack(
            [factors["shared"] * design.shared_strength, own * design.private_strength]
        )
        factors[assay.name], counts[assay.name] = own, _draw(assay, scaled, rng)
    return Simulation(design, seed, counts, factors)


def _draw(assay: Assay, factors: np.ndarray, rng: np.random.Generator) -> sp.csr_matrix:
    """Counts of every cell, at least one in each. factors: (cells, shared + private), as strong as they are."""
    effect = rng.standard_normal((factors.shape[1], assay.features))
    rate = np.exp(rng.normal(0, 1, assay.features) + factors @ effect)  # (cells, features)
    library = assay.depth * rng.lognormal(0, 0.3, (len(factors), 1))
    mean = rate / rate.sum(1, keepdims=True) * library
    counts = rng.poisson(rng.gamma(assay.dispersion, mean / assay.dispersion)).astype(np.int32)
    counts[counts.sum(1) == 0, 0] = 1  # the conversion drops empty cells
    return sp.csr_matrix(counts)


def mosaic(design: Design) -> dict[str, np.ndarray]:
    """Which cells are "test", "paired" or carry one assay alone. Cells are independent draws, so any order will do."""
    test, paired = round(design.cells * TEST), round(design.cells * (TEST + PAIRED))
    edges = np.linspace(paired, design.cells, len(design.assays) + 1).astype(int)
    ranges = {"test": (0, test), "paired": (test, paired)}
    ranges |= {name: (edges[i], edges[i + 1]) for i, name in enumerate(design.names)}
    return {part: np.arange(*ends) for part, ends in ranges.items()}


def seen(parts: dict[str, np.ndarray], assay: str) -> np.ndarray:
    """Training cells that carry an assay."""
    return np.concatenate([parts["paired"], parts[assay]])


def write(simulation: Simulation, folder: Path) -> None:
    """train.h5mu to learn from and test.h5mu to embed, as the command line reads them.

    In test.h5mu: the paired training cells, on which probes learn, and the test cells, with all assays; and all of them
    once more with each of the design's subsets, as if the other assays had not been measured.
    """
    design, parts = simulation.design, mosaic(simulation.design)
    probed = np.concatenate([parts["paired"], parts["test"]])
    folder.mkdir(parents=True, exist_ok=True)
    train = {name: _table(simulation, name, {"": seen(parts, name)}) for name in design.names}
    subsets = {"": tuple(design.names)} | design.subsets
    test = {
        name: _table(
            simulation, name, {subset: probed for subset, some in subsets.items() if name in some}
        )
        for name in design.names
    }
    for file, tables in (("train", train), ("test", test)):
        with md.set_options(pull_on_update=False):
            md.MuData(tables).write(folder / f"{file}.h5mu")


def barcodes(rows: np.ndarray, subset: str = "") -> list[str]:
    """Of cells, or of what is left of them where only a subset of assays was measured."""
    return [f"cell{i:06d}{subset and f'_{subset}'}" for i in rows]


def _table(simulation: Simulation, name: str, rows: dict[str, np.ndarray]) -> AnnData:
    """Cells of one assay. rows: by the subset that they show it in."""
    table = AnnData(simulation.counts[name][np.concatenate(list(rows.values()))])
    table.obs_names = [
        barcode for subset, some in rows.items() for barcode in barcodes(some, subset)
    ]
    table.var_names = [f"{name}{i:05d}" for i in range(table.n_vars)]
    return table
