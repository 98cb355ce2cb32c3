"""What sets biological batches apart becomes shorter in the input of the encoders.

An encoder that sees the batch of a cell has a reason to keep it: partners are of one batch, and
InfoNCE finds them sooner. So the directions in which batches lie apart are made shorter, by how far
apart batches lie next to the cells of a batch, as a linear discriminant analysis (Fisher, 1936)
measures it. That is a linear map, and holds for cells of a batch that was never seen, too.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch

from clue_dist.model.batch_means import compute_batch_means

# Of few cells some direction always sets batches apart. A ridge, as a multiple of the mean
# variance, hides it: 1 where there are this many cells for each component.
CELLS_PER_COMPONENT = 8.0


class BatchShrinkage(NamedTuple):
    """The map that makes the directions between batches shorter, and how much there was to do."""

    matrix: np.ndarray  # (C, C), to be multiplied with columns (C, n) of cells
    # How far a modality sets batches apart: the variance of batches' means, where the cells of a
    # batch vary by 1 in every direction, summed over directions.
    batch_separation: float


def find_batch_shrinkage(
    components: np.ndarray, batch: np.ndarray, weight: float
) -> BatchShrinkage:
    """Find the map that makes the directions between batches shorter.

    Args:
        components: (n, C), cells, of mean 0.
        batch: (n,) codes of biological batches, all known.
        weight: of the variance between batches. At 10, a direction in which batches vary as much as
            the cells of a batch do is left a third of its length; one in which they vary a tenth of
            that, as batches of the same cell types do, 0.7.
    """
    _, code = np.unique(batch, return_inverse=True)
    n_cells = np.bincount(code)
    n, width = components.shape
    cells, everywhere = torch.from_numpy(components), torch.ones(n, 1, dtype=torch.bool)
    means = compute_batch_means(cells, torch.from_numpy(code), everywhere).numpy()
    within = components - means[code]
    variance = within.T @ within / n
    ridge = CELLS_PER_COMPONENT * width / n * np.trace(variance) / width
    root = np.linalg.cholesky(variance + (ridge + 1e-12) * np.eye(width))
    # The batches' means, where the cells of a batch vary by 1 in every direction.
    white = np.linalg.solve(root, (means * np.sqrt(n_cells / n)[:, None]).T)
    ratios, directions = np.linalg.eigh(white @ white.T)
    lengths = (1 + weight * ratios.clip(0)) ** -0.5
    matrix = root @ (directions * lengths) @ directions.T @ np.linalg.inv(root)
    return BatchShrinkage(matrix, float(ratios.clip(0).sum()))
