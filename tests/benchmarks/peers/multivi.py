"""MultiVI (scvi-tools) on a mosaic of RNA and ATAC, with its default settings and early stopping.

As its documentation has it, every cell stands in both modalities, with zeros where one was not
measured; which were measured is the batch that its adversary mixes. The biological batch is a
covariate of the decoder.
"""

import time
import warnings

import anndata as ad
import mudata as md
import numpy as np
import pandas as pd
import peer
import scipy.sparse as sp
import scvi

KINDS = ("paired", "expression", "accessibility")


def fill_counts(cells: ad.AnnData, names: pd.Index) -> sp.csr_matrix:
    """Counts of the named cells; a row of zeros where a cell is not here. (len(names), features)"""
    rows = cells.obs_names.get_indexer(names)
    here = np.flatnonzero(rows >= 0)
    ones, shape = np.ones(len(here), np.float32), (len(names), cells.n_obs)
    picked = sp.csr_matrix((ones, (here, rows[here])), shape=shape) @ cells.X
    return picked.astype(np.float32).tocsr()


def join_mosaic(rna: ad.AnnData, atac: ad.AnnData) -> md.MuData:
    """All cells of either modality in both."""
    names = rna.obs_names.union(atac.obs_names, sort=False)
    has_rna, has_atac = names.isin(rna.obs_names), names.isin(atac.obs_names)
    batch = pd.concat([pd.Series(peer.list_batches(x), index=x.obs_names) for x in (rna, atac)])
    obs = pd.DataFrame(index=names)
    obs["modality"] = np.select([has_rna & has_atac, has_rna], KINDS[:2], KINDS[2])
    obs["batch"] = batch[~batch.index.duplicated()][names]
    tables = {
        name: ad.AnnData(fill_counts(cells, names), obs=obs.copy(), var=cells.var[[]])
        for name, cells in (("rna", rna), ("atac", atac))
    }
    whole = md.MuData(tables)
    # Its set-up adds this to the training cells, and wants it of others.
    whole.obs["_indices"] = np.arange(whole.n_obs)
    return whole


def main() -> None:
    warnings.filterwarnings("ignore")
    args = peer.parse_arguments(__doc__)
    train, test = peer.load_split(args)
    scvi.settings.seed = args.seed

    began = time.monotonic()
    cells = join_mosaic(*(train[m] for m in args.mods))
    where = {"rna_layer": "rna", "atac_layer": "atac", "batch_key": "rna"}
    where["categorical_covariate_keys"] = "rna"
    keys = {"batch_key": "modality", "categorical_covariate_keys": ["batch"]}
    scvi.model.MULTIVI.setup_mudata(cells, modalities=where, **keys)
    model = scvi.model.MULTIVI(cells)
    length = {"max_epochs": args.epochs} if args.epochs else {}
    model.train(accelerator="cpu", enable_progress_bar=False, **length)
    fit_s = time.monotonic() - began
    print(f"{len(model.history['elbo_train'])} epochs")

    # The test cells twice: once with their peaks taken away, once with their genes.
    rna, atac = (test[m] for m in args.mods)
    u1 = model.get_latent_representation(join_mosaic(rna, atac[:0]))
    u2 = model.get_latent_representation(join_mosaic(rna[:0], atac))
    peer.save_embedding(args, u1, u2, fit_s)


if __name__ == "__main__":
    main()
