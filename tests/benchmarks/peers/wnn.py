"""Weighted nearest neighbours (Seurat v4's, as muon has them) of components of two modalities."""

import argparse
from pathlib import Path

import anndata as ad
import mudata as md
import muon
import numpy as np
import scanpy as sc
import scipy.sparse as sp

NEIGHBOURS = 20  # in each modality, by which a cell's weights are found: the default
LISTED = 100  # of the joint graph, so that enough are left where some must not vote
CANDIDATES = 200  # from which those are chosen: the default
JOINT = "joint"  # components of both side by side, of which there is no use here


def list_neighbours(distances: sp.csr_matrix, n_listed: int) -> np.ndarray:
    """The nearest of each cell, the nearest first, (N, n_listed).

    distances: (N, N), of which what is not stored is farther than all else.
    """
    near = np.empty((distances.shape[0], n_listed), int)
    for row, (first, last) in enumerate(zip(distances.indptr, distances.indptr[1:], strict=False)):
        others, values = distances.indices[first:last], distances.data[first:last]
        order = np.argsort(np.where(others == row, np.inf, values), kind="stable")
        near[row] = others[order][:n_listed]
    return near


def join_modalities(components: dict[str, np.ndarray], n_listed: int) -> sp.csr_matrix:
    """Distances of the joint graph, (N, N): the smaller, the larger the affinity."""
    # Scaled to length 1, as Seurat does.
    scaled = {m: x / np.linalg.norm(x, axis=1, keepdims=True) for m, x in components.items()}
    cells = md.MuData({m: ad.AnnData(obsm={"X_pca": x}) for m, x in scaled.items()})
    n_cells = cells.n_obs
    for table in cells.mod.values():
        n_neighbours = min(NEIGHBOURS, n_cells - 1)
        sc.pp.neighbors(table, n_neighbors=n_neighbours, use_rep="X_pca", random_state=0)
    n_candidates = min(CANDIDATES, n_cells - 1)
    options = {"n_neighbors": n_listed, "n_multineighbors": n_candidates}
    muon.pp.neighbors(cells, **options, random_state=0)
    return sp.csr_matrix(cells.obsp["distances"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("components", type=Path, help=".npz with test_MODALITY, (N, D) each")
    parser.add_argument("--out", type=Path, required=True, help=".npy of neighbours, (N, k)")
    args = parser.parse_args()
    arrays = dict(np.load(args.components))
    names = [name for name in arrays if name.startswith("test_") and name != f"test_{JOINT}"]
    components = {name.removeprefix("test_"): arrays[name].astype(np.float32) for name in names}
    n_listed = min(LISTED, len(arrays[names[0]]) // 2)
    np.save(args.out, list_neighbours(join_modalities(components, n_listed), n_listed))


if __name__ == "__main__":
    main()
