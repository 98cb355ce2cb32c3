"""FOSCTTM and recall of sets too large to compare all pairs: random cells against everyone.

A random part of the cells is asked, and each is compared with all cells of the other modality, a
slice of them at a time. So every score is a mean over independent cells, and its standard error is
known. Profiles may lie on the disk, as memory maps; work is in float32.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from clue_dist.errors import DataError
from clue_dist.neighbours import scale_to_length_one

_KEYS_AT_ONCE = 2**16
_RECALLS = (1, 10)


@dataclass(frozen=True)
class EstimatedScore:
    """A score with its uncertainty."""

    value: float
    standard_error: float  # of the draw of cells

    def __str__(self) -> str:
        return f"{self.value:.4f} +- {self.standard_error:.4f}"


def estimate_matching(
    first: np.ndarray, second: np.ndarray, n_queries: int = 2_000, seed: int = 0
) -> dict[str, EstimatedScore]:
    """Estimate how well two embeddings of the same cells find each other among all N of them.

    Args:
        first: (N, D), cells seen through one modality.
        second: (N, D), row i is of the same cell as row i of `first`.
        n_queries: cells that are drawn, and ask in both directions; all where there are fewer.
        seed: of the draw.

    Returns:
        "foscttm" (eq. 18), "recall1", the share of cells whose nearest profile is their own, and
        "recall10", each the mean of both directions.

    Raises:
        DataError: the shapes do not fit, or values are not finite.
    """
    if first.ndim != 2 or first.shape != second.shape or not first.size:
        raise DataError(
            "two embeddings of the same cells are needed",
            got=(first.shape, second.shape),
            expected="(N, D) twice",
        )
    n_cells = len(first)
    rows = np.sort(np.random.default_rng(seed).permutation(n_cells)[:n_queries])
    # Of each direction how many keys lie nearer to a query than its partner does.
    nearer = np.stack(
        [_count_nearer(queries, keys, rows) for queries, keys in ((first, second), (second, first))]
    )
    per_cell = {"foscttm": (nearer / n_cells).mean(0)} | {
        f"recall{count}": (nearer < count).mean(0) for count in _RECALLS
    }
    # Cells are drawn without replacement: of all cells nothing is left to chance.
    unseen = 1 - len(rows) / n_cells
    return {
        name: EstimatedScore(
            float(values.mean()),
            float(values.std(ddof=1) * np.sqrt(unseen / len(rows))) if len(rows) > 1 else np.nan,
        )
        for name, values in per_cell.items()
    }


def _count_nearer(queries: np.ndarray, keys: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """How many keys are strictly nearer to each of some queries than its partner, (n,)."""
    points, partners = _read_profiles(queries, rows), _read_profiles(keys, rows)
    # Rounding sets profiles apart that are equal: what is so little nearer does not count.
    least = (points * partners).sum(1, keepdim=True) + 1e-6
    counts = torch.zeros(len(rows), dtype=torch.int64)
    for start in range(0, len(keys), _KEYS_AT_ONCE):
        part = np.arange(start, min(start + _KEYS_AT_ONCE, len(keys)))
        counts += (points @ _read_profiles(keys, part).T > least).sum(1)
    return counts.numpy()


def _read_profiles(points: np.ndarray, rows: np.ndarray) -> torch.Tensor:
    """Some rows, of length 1, as float32."""
    profiles = torch.from_numpy(np.asarray(points[rows], np.float32))
    n_wrong = int((~profiles.isfinite()).any(1).sum())
    if n_wrong:
        raise DataError("the embedding is not finite", got=f"{n_wrong} cells with NaN or Inf")
    return scale_to_length_one(profiles)
