"""Normalised counts in NumPy, as the SVD needs them.

`model.trunk` does the same on tensors. `model.initialise` takes the SVD of a sample of cells,
`data_prep.svd` that of all cells of a store. A change here that changes values must raise
`store.svd.VERSION`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeAlias

import numpy as np
import scipy.sparse as sp

Rows: TypeAlias = "sp.csr_matrix | np.ndarray"  # (n, features)


def compute_inverse_frequency(n_cells: int, detected: np.ndarray) -> np.ndarray:
    """Divide the number of cells by the number of cells that have each feature.

    Args:
        n_cells: number of cells.
        detected: how many of them have each feature, (features,).

    Returns:
        The inverse frequency of each feature, (features,) float64.
    """
    return n_cells / np.maximum(detected, 1)


def normalise_rows(counts: Rows, how: str, idf: np.ndarray | None = None) -> Rows:
    """Normalise counts in float64, by the formulas of `model.trunk`.

    Args:
        counts: counts, (n, features).
        how: log_cp10k, log, clr (dense rows only), tfidf or none.
        idf: inverse frequency of each feature, (features,), for tfidf.

    Returns:
        Normalised values, (n, features), sparse where the counts are.
    """
    if isinstance(counts, np.ndarray):
        return _normalise_dense(counts.astype(np.float64), how, idf)
    values = counts.data.astype(np.float64)
    if how == "tfidf" and idf is not None:
        values *= idf[counts.indices]
    if how in ("log_cp10k", "tfidf"):
        row = np.repeat(np.arange(counts.shape[0]), np.diff(counts.indptr))
        totals = np.bincount(row, values, counts.shape[0])
        values *= (1e4 / np.maximum(totals, 1e-9))[row]
    if how in ("log_cp10k", "tfidf", "log"):
        np.log1p(values, out=values)
    return sp.csr_matrix((values, counts.indices, counts.indptr), shape=counts.shape)


def _normalise_dense(counts: np.ndarray, how: str, idf: np.ndarray | None) -> np.ndarray:
    """Normalise dense counts, (n, features) float64."""
    if how in ("log", "clr"):
        values = np.log1p(counts)
        return values - values.mean(1, keepdims=True) if how == "clr" else values
    if how == "tfidf" and idf is not None:
        counts = counts * idf
    if how in ("log_cp10k", "tfidf"):
        return np.log1p(1e4 * counts / np.maximum(counts.sum(1, keepdims=True), 1e-9))
    return counts


def sum_columns(
    rows: Rows, function: Callable[[np.ndarray], np.ndarray] = np.asarray
) -> np.ndarray:
    """Sum a function of the values over the cells.

    Args:
        rows: values, (n, features).
        function: what to sum; it must be 0 at 0, as only stored values are looked at.

    Returns:
        Sums, (features,) float64.
    """
    if isinstance(rows, np.ndarray):
        return function(rows).sum(0, dtype=np.float64)
    return np.bincount(rows.indices, weights=function(rows.data), minlength=rows.shape[1])


def compute_deviation(mean: np.ndarray, mean_square: np.ndarray) -> np.ndarray:
    """Return the standard deviation of each feature, above zero. All (features,)."""
    return np.sqrt(np.maximum(mean_square - mean**2, 1e-12))


def compute_standardisation(
    how: str, mean: np.ndarray, deviation: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Choose the centre and the scale of normalised values for the SVD.

    Args:
        how: how the values were normalised.
        mean: mean of each feature, (features,).
        deviation: standard deviation of each feature, (features,).

    Returns:
        What to subtract from the values of each feature, and what to divide them by, (features,).
    """
    if how == "tfidf":  # latent semantic indexing works on the values as they are
        return np.zeros_like(mean), np.ones_like(deviation)
    if how == "log_cp10k":
        # Between covariance, where abundant genes rule, and correlation, where noise has a vote.
        return mean, deviation**0.75
    return mean, deviation
