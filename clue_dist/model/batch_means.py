"""The means of biological batches, drawn towards 0 where few cells tell them."""

from __future__ import annotations

from torch import Tensor

CELLS_OF_BATCH = 10.0  # with so many cells the mean of a batch is taken half


def compute_batch_means(values: Tensor, code: Tensor, counted: Tensor) -> Tensor:
    """Compute the mean of each batch, sum / (n + CELLS_OF_BATCH).

    Args:
        values: (N, ...), of mean 0.
        code: (N,) int64, numbers of batches from 0 on; cells of an unknown batch are not among
            these, as they may be of any.
        counted: (N, ...) bool, which values count; dimensions of length 1 stand for any.

    Returns:
        (batches, ...).
    """
    counted, n_batches = counted.to(values.dtype), int(code.max()) + 1
    sums = values.new_zeros(n_batches, *values.shape[1:]).index_add(0, code, values * counted)
    n_cells = counted.new_zeros(n_batches, *counted.shape[1:]).index_add(0, code, counted)
    return sums / (n_cells + CELLS_OF_BATCH)
