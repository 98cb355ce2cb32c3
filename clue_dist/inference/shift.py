"""By how much the embedding of cells moves when a model is trained on."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from clue_dist.errors import DataError
from clue_dist.inference.cells import Cells
from clue_dist.inference.load_model import TrainedModel
from clue_dist.inference.stream import embed_in_memory
from clue_dist.neighbours.nearest import find_neighbours

NEIGHBOURS = 15


@dataclass(frozen=True)
class EmbeddingShift:
    """How far z of the same cells differs between two models."""

    # Root mean square of the way that z moves, relative to its distance from the mean of all cells;
    # NaN where z has other dimensions, as with another modality. Trained on, z may turn as a whole.
    moved: float
    # Share of the 15 nearest cells that remain so, mean over cells; z may turn as it likes.
    neighbours_kept: float
    by_chance: float  # that share, of embeddings that know nothing of each other


def measure_shift(
    before: TrainedModel, after: TrainedModel, cells: Cells, same_cells: Cells
) -> EmbeddingShift:
    """Compare the joint z of cells between two models.

    Args:
        before: a model.
        after: another one.
        cells: the cells, opened for the first model.
        same_cells: the same cells, opened for the second model.

    Raises:
        DataError: too few cells to have neighbours; cells that differ, as where one model does not
            know all modalities.
    """
    names = [opened.read_obs().index for opened in (cells, same_cells)]
    if not names[0].equals(names[1]):
        n_same = len(names[0].intersection(names[1]))
        raise DataError(
            "each model knows other cells of these",
            got=f"{cells.n_cells:,} and {same_cells.n_cells:,}, of which {n_same:,} are the same",
            fix="name modalities that both know: `modalities=`",
        )
    first, second = (
        embed_in_memory(model, opened, per_modality=False, with_variance=False).joint
        for model, opened in ((before, cells), (after, same_cells))
    )
    embedded = np.isfinite(first).all(1) & np.isfinite(second).all(1)
    first, second = first[embedded], second[embedded]
    if len(first) <= NEIGHBOURS + 1:  # everybody is everybody's neighbour
        raise DataError("too few cells to compare", got=len(first), expected=NEIGHBOURS + 2)
    moved = float("nan")
    if first.shape == second.shape:
        spread = np.square(first - first.mean(0)).sum()
        moved = float(np.sqrt(np.square(second - first).sum() / spread))
    nearest = [find_neighbours(z, NEIGHBOURS).indices for z in (first, second)]
    shared = [len(np.intersect1d(*pair)) for pair in zip(*nearest, strict=True)]
    return EmbeddingShift(moved, float(np.mean(shared)) / NEIGHBOURS, NEIGHBOURS / (len(first) - 1))
