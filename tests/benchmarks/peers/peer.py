"""What the other methods' scripts share. They run in environments of their own, so nothing of clue_dist is here."""

from __future__ import annotations

import argparse
from pathlib import Path

import anndata as ad
import mudata as md
import numpy as np
import scipy.sparse as sp
from sklearn.decomposition import PCA, TruncatedSVD

COMPONENTS = 100


def arguments(description: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("split", type=Path, help="folder with train.h5mu and test.h5mu")
    parser.add_argument("mods", nargs=2)
    parser.add_argument(
        "--out", type=Path, required=True, help="u1, u2 of the test cells and fit_s, as .npz"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--epochs", type=int, help="fewer than usual, for a quick look")
    return parser.parse_args()


def load(args: argparse.Namespace) -> tuple[md.MuData, md.MuData]:
    md.set_options(pull_on_update=False)
    return md.read(args.split / "train.h5mu"), md.read(args.split / "test.h5mu")


def batch_of(cells: ad.AnnData) -> np.ndarray:
    """The batch of each cell; one for all where none is known."""
    return (
        cells.obs["batch"].astype(str).to_numpy()
        if "batch" in cells.obs
        else np.full(cells.n_obs, "one")
    )


def save(args: argparse.Namespace, u1: np.ndarray, u2: np.ndarray, fit_s: float) -> None:
    np.savez(args.out, u1=u1, u2=u2, fit_s=fit_s)


def reduced(modality: str, train: ad.AnnData, test: ad.AnnData) -> tuple[np.ndarray, np.ndarray]:
    """100 dimensions fitted on the training cells: LSI of ATAC, PCA of all else. (cells, 100) of both."""
    return (_lsi if modality == "atac" else _pca)(train.X, test.X)


def _pca(train: sp.csr_matrix, test: sp.csr_matrix) -> tuple[np.ndarray, np.ndarray]:
    """Of log1p of counts per 10,000, features standardised and cut off at ±10; scaled to a total variance of 100."""
    a, b = (np.log1p(_per_cell(x) * 1e4).toarray() for x in (train, test))
    mean, deviation = a.mean(0), a.std(0) + 1e-8
    a, b = (np.clip((x - mean) / deviation, -10, 10) for x in (a, b))
    model = PCA(min(COMPONENTS, a.shape[1] - 1), random_state=0)
    a = model.fit(a).transform(a)
    scale = 10 * np.sqrt(model.explained_variance_ratio_) / a.std(0)
    return a * scale, model.transform(b) * scale


def _lsi(train: sp.csr_matrix, test: sp.csr_matrix) -> tuple[np.ndarray, np.ndarray]:
    """Truncated SVD of log1p of TF-IDF per 10,000; each cell then has mean 0 and deviation 1."""
    seen = np.asarray(train.sum(0)).ravel()
    idf = sp.diags(train.shape[0] / np.maximum(seen, 1))
    a, b = (
        np.log1p(_per_cell(_per_cell(x) @ idf, least=1e-9) * 1e4).tocsr() for x in (train, test)
    )
    model = TruncatedSVD(min(COMPONENTS, a.shape[1] - 1), random_state=0).fit(a)
    a, b = model.transform(a), model.transform(b)
    return tuple((x - x.mean(1, keepdims=True)) / x.std(1, keepdims=True) for x in (a, b))


def _per_cell(x: sp.csr_matrix, least: float = 1) -> sp.csr_matrix:
    """Rows divided by their sums."""
    x = x.astype(np.float32)
    return sp.diags(1 / np.maximum(np.asarray(x.sum(1)).ravel(), least)) @ x
