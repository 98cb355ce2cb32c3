"""Weighted nearest neighbours (Seurat v4's, as muon has them) of components of two modalities.

usage: wnn.py COMPONENTS.npz OUT.npy: of test_MODALITY, (N, D) each, the nearest cells, (N, k)

muon searches neighbours by NN-descent, whose distance it compiles anew for every modality with all
cells as constants in the code: of 2,000 cells that did not end in 15 minutes. They are searched
exactly instead.
"""

import sys
from typing import Any

import anndata as ad
import mudata as md
import muon
import numpy as np
import scanpy as sc
import scipy.sparse as sp
from sklearn.metrics import pairwise_distances
from sklearn.neighbors import NearestNeighbors

LISTED = 100  # so that enough are left where some must not vote
CANDIDATES = 200  # among which they are found: the default
JOINT = "test_joint"  # components of both side by side, of which there is no use here


def find_nearest(
    points: np.ndarray, n_neighbors: int, metric: Any, metric_kwds: dict[str, Any], **options: Any
) -> tuple[np.ndarray, np.ndarray, None]:
    """What muon asks umap for: the nearest (N, n_neighbors), nearest first, and their distances.

    metric: a name, for which a cell comes first of its own nearest; or muon's function by which
    the width of a cell's kernel is found, of points that are numbers of cells.
    """
    if isinstance(metric, str):
        search = NearestNeighbors(n_neighbors=n_neighbors, metric=metric).fit(points)
        distances, near = search.kneighbors(points)
        return near, distances, None
    shared = compare_neighbours(metric_kwds["neighbors_indices"], metric_kwds["neighbors_indptr"])
    place = metric_kwds["X"]
    apart = pairwise_distances(place)
    # Fewest shared neighbours first, but some; of as many, the farthest first.
    distances = shared * len(place) + 1 - apart / metric_kwds["bbox_norm"]
    distances[(shared == 0) | np.eye(len(place), dtype=bool)] = len(place) + 1
    near = distances.argsort(1, kind="stable")[:, :n_neighbors]
    return near, np.take_along_axis(distances, near, 1), None


def compare_neighbours(indices: np.ndarray, indptr: np.ndarray) -> np.ndarray:
    """Jaccard's index of the stored neighbours of each two cells, (N, N)."""
    n_cells = len(indptr) - 1
    stored = sp.csr_matrix((np.ones(len(indices)), indices, indptr), (n_cells, n_cells))
    both = (stored @ stored.T).toarray()
    counts = np.diff(indptr)
    return both / (counts[:, None] + counts - both)


def list_neighbours(distances: sp.csr_matrix, n_listed: int) -> np.ndarray:
    """The nearest of each cell by the stored distances (N, N), the nearest first, (N, n_listed)."""
    near = np.empty((distances.shape[0], n_listed), int)
    for row, stored in enumerate(map(distances.getrow, range(len(near)))):
        values = np.where(stored.indices == row, np.inf, stored.data)
        near[row] = stored.indices[np.argsort(values, kind="stable")][:n_listed]
    return near


def main() -> None:
    arrays = {name: x for name, x in np.load(sys.argv[1]).items() if name != JOINT}
    # Scaled to length 1, as Seurat does.
    scaled = {name: x / np.linalg.norm(x, axis=1, keepdims=True) for name, x in arrays.items()}
    cells = md.MuData({m: ad.AnnData(obsm={"X_pca": x}) for m, x in scaled.items()})
    for table in cells.mod.values():
        sc.pp.neighbors(table, n_neighbors=20, use_rep="X_pca", random_state=0)  # 20: the default
    n_listed, n_candidates = min(LISTED, cells.n_obs // 2), min(CANDIDATES, cells.n_obs - 1)
    muon._core.preproc.nearest_neighbors = find_nearest
    options = {"n_neighbors": n_listed, "n_multineighbors": n_candidates}
    muon.pp.neighbors(cells, **options, random_state=0)
    # The smaller, the larger the affinity.
    np.save(sys.argv[2], list_neighbours(sp.csr_matrix(cells.obsp["distances"]), n_listed))


if __name__ == "__main__":
    main()
