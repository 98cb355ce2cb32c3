"""What a modality alone shows: components of its normalised counts, fitted on training cells."""

import numpy as np
import scipy.sparse as sp
from sklearn.decomposition import PCA, TruncatedSVD


def reduce_view(
    kind: str, train: sp.csr_matrix, test: sp.csr_matrix, n: int
) -> tuple[np.ndarray, np.ndarray]:
    """PCA of log1p CP10k (rna) or CLR (adt), LSI of TF-IDF (atac): (cells, n or less) of both."""
    n = min(n, train.shape[1] - 1)
    if kind == "atac":
        return _reduce_peaks(train, test, n)
    if kind == "adt":
        logs = (np.log1p(x.toarray().astype(np.float32)) for x in (train, test))
        values = [x - x.mean(1, keepdims=True) for x in logs]
    else:
        values = [
            np.log1p(_scale_cells(x.astype(np.float32), 1e4)).toarray() for x in (train, test)
        ]
    mean, std = values[0].mean(0), values[0].std(0) + 1e-8
    a, b = (np.clip((v - mean) / std, -10, 10) for v in values)
    fit = PCA(n, svd_solver="randomized", random_state=0).fit(a)
    return fit.transform(a), fit.transform(b)


def _reduce_peaks(
    train: sp.csr_matrix, test: sp.csr_matrix, n: int
) -> tuple[np.ndarray, np.ndarray]:
    idf = sp.diags(train.shape[0] / np.maximum(np.asarray(train.sum(0)).ravel(), 1))
    a, b = (np.log1p(_scale_cells(x.astype(np.float32) @ idf, 1e4)).tocsr() for x in (train, test))
    fit = TruncatedSVD(n, random_state=0).fit(a)
    z, z_test = (
        (z - z.mean(1, keepdims=True)) / z.std(1, keepdims=True) for z in map(fit.transform, (a, b))
    )
    return z, z_test


def _scale_cells(x: sp.csr_matrix, total: float) -> sp.csr_matrix:
    return sp.diags(total / np.maximum(np.asarray(x.sum(1)).ravel(), 1e-9)) @ x
