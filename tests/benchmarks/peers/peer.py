"""What the scripts of other methods share, which run in environments without clue_dist."""

import argparse
from pathlib import Path

import anndata as ad
import mudata as md
import numpy as np
import scipy.sparse as sp
from sklearn.decomposition import PCA, TruncatedSVD

COMPONENTS = 100


def parse_arguments(description: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("split", type=Path, help="folder with train.h5mu and test.h5mu")
    parser.add_argument("mods", nargs=2)
    parser.add_argument("--out", type=Path, required=True, help=".npz of u1, u2 and fit_s")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--epochs", type=int, help="fewer than usual, for a quick look")
    return parser.parse_args()


def load_split(args: argparse.Namespace) -> tuple[md.MuData, md.MuData]:
    md.set_options(pull_on_update=False)
    return md.read(args.split / "train.h5mu"), md.read(args.split / "test.h5mu")


def list_batches(cells: ad.AnnData) -> np.ndarray:
    """The batch of each cell; one for all where none is known."""
    known = "batch" in cells.obs
    return cells.obs["batch"].astype(str).to_numpy() if known else np.full(cells.n_obs, "one")


def save_embedding(args: argparse.Namespace, u1: np.ndarray, u2: np.ndarray, fit_s: float) -> None:
    np.savez(args.out, u1=u1, u2=u2, fit_s=fit_s)


def reduce_cells(modality: str, train: ad.AnnData, test: ad.AnnData) -> tuple[np.ndarray, ...]:
    """100 dimensions fitted on the training cells: LSI of ATAC, PCA of all else. (cells, 100)"""
    return (_reduce_peaks if modality == "atac" else _reduce_counts)(train.X, test.X)


def _reduce_counts(train: sp.csr_matrix, test: sp.csr_matrix) -> tuple[np.ndarray, ...]:
    """log1p of counts per 10,000, standardised, cut at ±10; scaled to a total variance of 100."""
    a, b = (np.log1p(_scale_cells(x) * 1e4).toarray() for x in (train, test))
    mean, deviation = a.mean(0), a.std(0) + 1e-8
    a, b = (np.clip((x - mean) / deviation, -10, 10) for x in (a, b))
    model = PCA(min(COMPONENTS, a.shape[1] - 1), random_state=0)
    a = model.fit(a).transform(a)
    scale = 10 * np.sqrt(model.explained_variance_ratio_) / a.std(0)
    return a * scale, model.transform(b) * scale


def _reduce_peaks(train: sp.csr_matrix, test: sp.csr_matrix) -> tuple[np.ndarray, ...]:
    """Truncated SVD of log1p of TF-IDF per 10,000; each cell then has mean 0 and deviation 1."""
    idf = sp.diags(train.shape[0] / np.maximum(np.asarray(train.sum(0)).ravel(), 1))
    weighted = (_scale_cells(_scale_cells(x) @ idf, least=1e-9) for x in (train, test))
    a, b = (np.log1p(x * 1e4).tocsr() for x in weighted)
    model = TruncatedSVD(min(COMPONENTS, a.shape[1] - 1), random_state=0).fit(a)
    a, b = model.transform(a), model.transform(b)
    return tuple((x - x.mean(1, keepdims=True)) / x.std(1, keepdims=True) for x in (a, b))


def _scale_cells(x: sp.csr_matrix, least: float = 1) -> sp.csr_matrix:
    """Rows divided by their sums."""
    x = x.astype(np.float32)
    return sp.diags(1 / np.maximum(np.asarray(x.sum(1)).ravel(), least)) @ x
