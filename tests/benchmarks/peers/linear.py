"""Linear baseline: canonical correlation analysis of the paired cells.

Each direction counts by its correlation, so that what only one modality tells hardly counts.
"""

import time
from collections.abc import Sequence

import anndata as ad
import numpy as np
import peer
import scipy.sparse as sp
from sklearn.decomposition import PCA

COMPONENTS = 40  # of each modality, of those that `peer.reduce_cells` finds; fewer of few pairs
PAIRS_OF_COMPONENT = 4
DIRECTIONS = 20
RIDGE = 0.1  # of the mean variance


def whiten(points: np.ndarray) -> np.ndarray:
    """The matrix (D, D) that makes the dimensions of centred points (n, D) uncorrelated."""
    covariance = np.cov(points.T).reshape(points.shape[1], -1)
    covariance += RIDGE * np.trace(covariance) / len(covariance) * np.eye(len(covariance))
    values, vectors = np.linalg.eigh(covariance)
    return vectors @ np.diag(values**-0.5) @ vectors.T


def correlate(seen: Sequence[np.ndarray], unseen: Sequence[np.ndarray]) -> np.ndarray:
    """Fit on pairs (n, D) twice; the unseen cells (N, D) in both modalities, (2, N, directions)."""
    n_used = max(1, min(COMPONENTS, len(seen[0]) // PAIRS_OF_COMPONENT))
    means = [x[:, :n_used].mean(0) for x in seen]
    pair = [x[:, :n_used] - mean for x, mean in zip(seen, means, strict=True)]
    first, second = map(whiten, pair)
    cross = first @ (pair[0].T @ pair[1] / len(pair[0])) @ second
    u, correlation, v = np.linalg.svd(cross, full_matrices=False)
    turns = [(turn * correlation)[:, :DIRECTIONS] for turn in (first @ u, second @ v.T)]
    cells = zip(unseen, means, turns, strict=True)
    return np.stack([(x[:, :n_used] - mean) @ turn for x, mean, turn in cells])


def reduce_values(modality: str, train: ad.AnnData, test: ad.AnnData) -> tuple[np.ndarray, ...]:
    """Components of counts as of other methods, or the standardised values of a dense modality."""
    if sp.issparse(train.X):
        return peer.reduce_cells(modality.partition("_")[0], train, test)
    mean, deviation = train.X.mean(0), train.X.std(0) + 1e-8
    values = [np.clip((x.X - mean) / deviation, -10, 10) for x in (train, test)]
    model = PCA(min(COMPONENTS, train.n_vars), random_state=0).fit(values[0])
    return tuple(map(model.transform, values))


def main() -> None:
    args = peer.parse_arguments(__doc__)
    train, test = peer.load_split(args)
    began = time.monotonic()
    seen, unseen = zip(*(reduce_values(m, train[m], test[m]) for m in args.mods), strict=True)
    names = [train[m].obs_names for m in args.mods]
    both = names[0][names[0].isin(names[1])]
    pairs = [x[table.get_indexer(both)] for x, table in zip(seen, names, strict=True)]
    u1, u2 = correlate(pairs, unseen)
    peer.save_embedding(args, u1, u2, time.monotonic() - began)


if __name__ == "__main__":
    main()
