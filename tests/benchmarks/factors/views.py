"""What a modality alone shows: components of its normalised counts, fitted on training cells."""

from __future__ import annotations

import numpy as np
import scipy.sparse as sp
from sklearn.decomposition import PCA, TruncatedSVD


def components(
    kind: str, train: sp.csr_matrix, test: sp.csr_matrix, n: int
) -> tuple[np.ndarray, np.ndarray]:
    """PCA of log1p CP10k (rna) or CLR (adt), LSI of TF-IDF (atac): (cells, n or less) of training and test cells."""
    n = min(n, train.shape[1] - 1)
    if kind == "atac":
        return _lsi(train, test, n)
    values = [(_clr if kind == "adt" else _log_cp10k)(x) for x in (train, test)]
    mean, std = values[0].mean(0), values[0].std(0) + 1e-8
    a, b = (np.clip((v - mean) / std, -10, 10) for v in values)
    fit = PCA(n, svd_solver="randomized", random_state=0).fit(a)
    return fit.transform(a), fit.transform(b)


def _log_cp10k(x: sp.csr_matrix) -> np.ndarray:
    return np.log1p(_per_cell(x.astype(np.float32), 1e4)).toarray()


def _clr(x: sp.csr_matrix) -> np.ndarray:
    logs = np.log1p(x.toarray().astype(np.float32))
    return logs - logs.mean(1, keepdims=True)


def _lsi(train: sp.csr_matrix, test: sp.csr_matrix, n: int) -> tuple[np.ndarray, np.ndarray]:
    idf = sp.diags(train.shape[0] / np.maximum(np.asarray(train.sum(0)).ravel(), 1))
    a, b = (np.log1p(_per_cell(x.astype(np.float32) @ idf, 1e4)).tocsr() for x in (train, test))
    fit = TruncatedSVD(n, random_state=0).fit(a)
    z, z_test = (
        (z - z.mean(1, keepdims=True)) / z.std(1, keepdims=True) for z in map(fit.transform, (a, b))
    )
    return z, z_test


def _per_cell(x: sp.csr_matrix, total: float) -> sp.csr_matrix:
    return sp.diags(total / np.maximum(np.asarray(x.sum(1)).ravel(), 1e-9)) @ x
