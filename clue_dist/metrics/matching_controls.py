"""How much of FOSCTTM do cell types and sequencing depth explain?

FOSCTTM over all cells (eq. 18; Liu et al., 2019) is small where types are told apart, though the
cells of a type may not be, and where both modalities tell how deep a cell was sequenced.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from clue_dist.metrics.matching import compute_foscttm
from clue_dist.neighbours.nearest import scale_to_length_one
from clue_dist.ranks import Ranks

FEWEST_OF_TYPE = 20  # cells that a type must have to be scored by itself


def score_within_types(
    u1: np.ndarray | Tensor,
    u2: np.ndarray | Tensor,
    labels: np.ndarray,
    ranks: Ranks | None = None,
) -> dict[str, float]:
    """Score how cells are found among the cells of their own type.

    Args:
        u1: (N, D), on any device; every rank passes the same.
        u2: (N, D).
        labels: (N,) names.
        ranks: processes that share the queries. All must call, and all get the result.

    Returns:
        `foscttm`, the mean over types of FEWEST_OF_TYPE cells or more, and how many `types` and
        `cells` these are. Nothing where there is no such type.

    Raises:
        DataError: the shapes do not fit, or values are not finite.
    """
    names, counts = np.unique(labels, return_counts=True)
    groups = [np.flatnonzero(labels == name) for name in names[counts >= FEWEST_OF_TYPE]]
    if not groups:
        return {}
    shares = [compute_foscttm(u1[cells], u2[cells], ranks) for cells in groups]
    n_cells = sum(len(cells) for cells in groups)
    return {"cells": n_cells, "types": len(groups), "foscttm": float(np.mean(shares))}


def score_without_depth(
    u1: np.ndarray | Tensor,
    u2: np.ndarray | Tensor,
    log_depth: np.ndarray,
    ranks: Ranks | None = None,
) -> dict[str, float]:
    """Score how cells are found where sequencing depth cannot help.

    How deep a cell was sequenced is alike in its modalities, and mostly technical. Both embeddings,
    scaled to length 1, lose what a linear regression on the depths of both modalities explains, as
    by `regress_out` of scanpy (Wolf et al., 2018).

    Args:
        u1: (N, D), on any device; every rank passes the same.
        u2: (N, D).
        log_depth: (N, 2), ln of the total counts of both modalities.
        ranks: processes that share the queries. All must call, and all get the result.

    Returns:
        `foscttm` over all `cells`.

    Raises:
        DataError: the shapes do not fit, or values are not finite.
    """
    depth = torch.as_tensor(log_depth, dtype=torch.float64)
    residuals = [
        regress_out_depth(scale_to_length_one(points), depth.to(points.device))
        for points in (torch.as_tensor(u).to(torch.float64) for u in (u1, u2))
    ]
    first, second = residuals
    return {"cells": len(first), "foscttm": compute_foscttm(first, second, ranks)}


def regress_out_depth(points: Tensor, depth: Tensor) -> Tensor:
    """Subtract from points what a linear regression on depths explains; their mean stays.

    Args:
        points: (N, D) float64.
        depth: (N, C) float64.
    """
    centred = depth - depth.mean(0)
    # The pseudo-inverse, as depth may be the same in all cells, or in both modalities.
    return points - centred @ (torch.linalg.pinv(centred) @ points)
