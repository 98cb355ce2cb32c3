"""Weighted nearest neighbours (Seurat v4's, as muon has them) of components of two modalities.

usage: wnn.py COMPONENTS.npz OUT.npy: of test_MODALITY, (N, D) each, the nearest cells, (N, k)
"""

import sys

import anndata as ad
import mudata as md
import muon
import numpy as np
import scanpy as sc
import scipy.sparse as sp

LISTED = 100  # so that enough are left where some must not vote
CANDIDATES = 200  # among which they are found: the default
JOINT = "test_joint"  # components of both side by side, of which there is no use here


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
    options = {"n_neighbors": n_listed, "n_multineighbors": n_candidates}
    muon.pp.neighbors(cells, **options, random_state=0)
    # The smaller, the larger the affinity.
    np.save(sys.argv[2], list_neighbours(sp.csr_matrix(cells.obsp["distances"]), n_listed))


if __name__ == "__main__":
    main()
