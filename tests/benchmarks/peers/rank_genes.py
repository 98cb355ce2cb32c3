"""The features that mark groups of cells, by scanpy's `rank_genes_groups` as it comes.

usage: rank_genes.py CELLS.h5ad COLUMN OUT.json GROUP...: of each group all features, the first mark
most; counts are raw
"""

import json
import sys
from pathlib import Path

import anndata as ad
import scanpy as sc


def main() -> None:
    cells_path, column, out, *groups = sys.argv[1:]
    cells = ad.read_h5ad(cells_path)
    sc.pp.normalize_total(cells, target_sum=1e4)
    sc.pp.log1p(cells)
    cells.obs[column] = cells.obs[column].astype("category")
    # The default of rank_genes_groups, which it warns of where it is not named.
    sc.tl.rank_genes_groups(cells, column, groups=groups, method="t-test")
    names = cells.uns["rank_genes_groups"]["names"]
    Path(out).write_text(json.dumps({group: list(names[group]) for group in groups}))


if __name__ == "__main__":
    main()
