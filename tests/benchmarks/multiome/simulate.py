"""Multiome cells in lanes, each of two .h5ad files: python -m tests.benchmarks.multiome.simulate.

A cell is a mixture of programs, whose shares are the same in its RNA and in its peaks; its type is
the largest. So a modality tells more of a cell than its type, and partners can be found.
"""

import argparse
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import anndata as ad
import numpy as np
import pandas as pd
import scipy.sparse as sp

from tests.benchmarks.cells import DEPTH, TYPES, CellModel, Rng, Shape, make_model

FEATURES = {"rna": (20_000, 1_500), "atac": (100_000, 3_500)}  # and non-zeros a cell
PROGRAMS = TYPES
# Of the Dirichlet distribution of shares: most cells have two or three programs.
CONCENTRATION = 0.3
DONORS = 8  # which make no difference
PIECE = 2048  # cells made at a time
HELD_OUT, TRAIN, TEST = "held_out", "train", "test"  # a column of obs, and its categories


@dataclass(frozen=True)
class Lane:
    """Cells of a store, and the files that have them."""

    number: int
    source: int  # lanes of equal source are made of the same files
    is_test: bool

    @property
    def name(self) -> str:
        return f"lane{self.number:03d}"

    def find_file(self, folder: Path, modality: str) -> Path:
        return folder / f"source{self.source}-{modality}.h5ad"


def plan_lanes(n_cells: int, lane_cells: int, n_sources: int) -> list[Lane]:
    """Make cells of lanes: the last one, whose cells no other lane has, is for tests.

    Raises:
        ValueError: the cells do not fill two lanes or more.
    """
    n_lanes, rest = divmod(n_cells, lane_cells)
    if rest or n_lanes < 2:
        raise ValueError(f"{n_cells} cells are not two or more times {lane_cells}")
    training = [Lane(i, i % n_sources, False) for i in range(n_lanes - 1)]
    return [*training, Lane(n_lanes - 1, n_sources, True)]


def make_models() -> dict[str, CellModel]:
    """Make the model of each modality, the same in every run."""
    models = {}
    for number, (modality, (n_features, nonzeros)) in enumerate(FEATURES.items()):
        shape = Shape(modality, 0, n_features, nonzeros, modality == "atac")
        models[modality] = make_model(shape, np.random.default_rng(number))
    return models


def draw_counts(model: CellModel, shares: np.ndarray, rng: Rng) -> sp.csr_matrix:
    """Draw the counts of cells with some shares of programs.

    Args:
        model: how the bursts of each program are drawn.
        shares: (n_cells, PROGRAMS).
        rng: draws.

    Returns:
        (n_cells, features) float32.
    """
    n_cells, n_features = len(shares), model.cumulated.shape[1]
    depth = np.exp(rng.normal(0, DEPTH, n_cells))
    bursts = rng.poisson(depth[:, None] * shares * model.bursts)  # (n_cells, PROGRAMS)
    rows, columns, sizes = [], [], []
    for program, numbers in enumerate(bursts.T):
        # All bursts of a program are dealt to features at once, then to cells: as if each was
        # drawn by itself, and several times as fast.
        cells = np.repeat(np.arange(n_cells, dtype=np.int32), numbers)
        rng.shuffle(cells)
        chances = np.diff(model.cumulated[program], prepend=0)
        dealt = rng.multinomial(len(cells), chances / chances.sum())
        rows.append(cells)
        columns.append(np.repeat(np.arange(n_features, dtype=np.int32), dealt))
        if model.size is not None:
            sizes.append(rng.logseries(model.size[program, columns[-1]]).astype(np.float32))
    row, column = np.concatenate(rows), np.concatenate(columns)
    size = np.concatenate(sizes) if sizes else np.ones(len(row), np.float32)
    # By way of columns, as both conversions take linear time and leave indices in order.
    counts = sp.coo_matrix((size, (row, column)), shape=(n_cells, n_features)).tocsc().tocsr()
    if model.size is None:
        counts.data[:] = 1
    return counts


def write_lane(lane: Lane, n_cells: int, models: Mapping[str, CellModel], folder: Path) -> None:
    """Write the files of a lane, not compressed, as anndata does by default."""
    rng = np.random.default_rng([lane.source, 0])
    shares = rng.dirichlet(np.full(PROGRAMS, CONCENTRATION), n_cells)
    obs = pd.DataFrame(index=[f"cell-{i:06d}" for i in range(n_cells)])
    obs["cell_type"] = pd.Categorical([f"type-{i:02d}" for i in shares.argmax(1)])
    obs["donor"] = pd.Categorical([f"donor-{i}" for i in rng.integers(DONORS, size=n_cells)])
    obs[HELD_OUT] = pd.Categorical([TEST if lane.is_test else TRAIN] * n_cells)
    for number, (modality, model) in enumerate(models.items()):
        rng = np.random.default_rng([lane.source, number + 1])
        pieces = [
            draw_counts(model, shares[first : first + PIECE], rng)
            for first in range(0, n_cells, PIECE)
        ]
        counts = sp.vstack(pieces, format="csr")
        var = pd.DataFrame(index=[f"{modality}-{i:06d}" for i in range(counts.shape[1])])
        ad.AnnData(counts, obs=obs, var=var).write_h5ad(lane.find_file(folder, modality))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    for option in ("--cells", "--lane-cells", "--sources"):
        parser.add_argument(option, type=int, required=True)
    args = parser.parse_args()
    lanes = plan_lanes(args.cells, args.lane_cells, args.sources)
    models = make_models()
    for lane in {lane.source: lane for lane in lanes}.values():
        write_lane(lane, args.lane_cells, models, args.folder)


if __name__ == "__main__":
    main()
