"""What a projection sees of a modality: normalised, centred and scaled values, in NumPy alone.

`model.trunk.normalise` is the same on tensors. `model.initialise` takes the SVD of a sample of cells in this form,
`data_prep.svd` that of all cells of a store.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeAlias

import numpy as np
import scipy.sparse as sp

Rows: TypeAlias = "sp.csr_matrix | np.ndarray"  # (n, features)


def compute_inverse_frequency(n: int, detected: np.ndarray) -> np.ndarray:
    """Cells over cells with the feature, (features,); n: how many cells, detected: (features,)."""
    return n / np.maximum(detected, 1)


def normalise_rows(counts: Rows, how: str, idf: np.ndarray | None = None) -> Rows:
    """`model.trunk.normalise` in float64; see there for the formulas."""
    if isinstance(counts, np.ndarray):
        return _dense(counts.astype(np.float64), how, idf)
    x = counts.data.astype(np.float64)
    if how == "tfidf" and idf is not None:
        x *= idf[counts.indices]
    if how in ("log_cp10k", "tfidf"):
        row = np.repeat(np.arange(counts.shape[0]), np.diff(counts.indptr))
        x *= (1e4 / np.maximum(np.bincount(row, x, counts.shape[0]), 1e-9))[row]
    if how in ("log_cp10k", "tfidf", "log"):
        np.log1p(x, out=x)
    return sp.csr_matrix((x, counts.indices, counts.indptr), shape=counts.shape)


def _dense(x: np.ndarray, how: str, idf: np.ndarray | None) -> np.ndarray:
    if how in ("log", "clr"):
        x = np.log1p(x)
        return x - x.mean(1, keepdims=True) if how == "clr" else x
    if how == "tfidf" and idf is not None:
        x = x * idf
    if how in ("log_cp10k", "tfidf"):
        return np.log1p(1e4 * x / np.maximum(x.sum(1, keepdims=True), 1e-9))
    return x


def sum_columns(x: Rows, of: Callable[[np.ndarray], np.ndarray] = np.asarray) -> np.ndarray:
    """Sums over the cells of a function of the values with f(0) = 0: (n, features) -> (features,) float64."""
    if isinstance(x, np.ndarray):
        return of(x).sum(0, dtype=np.float64)
    return np.bincount(x.indices, weights=of(x.data), minlength=x.shape[1])


def compute_deviation(mean: np.ndarray, mean_square: np.ndarray) -> np.ndarray:
    """Standard deviation of each feature."""
    return np.sqrt(np.maximum(mean_square - mean**2, 1e-12))


def compute_standardisation(
    how: str, mean: np.ndarray, deviation: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """What to take off normalised values and what to divide them by before the SVD; all (features,).

    Any change here, or of `normalised`, wants another `store.svd.VERSION`.
    """
    if how == "tfidf":  # latent semantic indexing works on the values as they are
        return np.zeros_like(mean), np.ones_like(deviation)
    if (
        how == "log_cp10k"
    ):  # between covariance (abundant genes rule) and correlation (noise votes too)
        return mean, deviation**0.75
    return mean, deviation
