"""MultiVI (scvi-tools) on a mosaic of RNA and ATAC, with its default settings and its own early stopping.

As its documentation has it, every cell stands in both modalities, with zeros where one was not measured; which were
measured is the model's batch, that its adversary mixes. The biological batch is a covariate of the decoder.
"""

from __future__ import annotations

import time
import warnings

import anndata as ad
import mudata as md
import numpy as np
import pandas as pd
import peer
import scipy.sparse as sp
import scvi

PAIRED, EXPRESSION, ACCESSIBILITY = "paired", "expression", "accessibility"


def filled(cells: ad.AnnData, names: pd.Index) -> sp.csr_matrix:
    """Counts of the named cells; a row of zeros where a cell is not here. (len(names), features)"""
    rows = cells.obs_names.get_indexer(names)
    here = np.flatnonzero(rows >= 0)
    shape = (len(names), cells.n_obs)
    picked = (
        sp.csr_matrix((np.ones(len(here), np.float32), (here, rows[here])), shape=shape) @ cells.X
    )
    return picked.astype(np.float32).tocsr()


def mosaic(rna: ad.AnnData, atac: ad.AnnData) -> md.MuData:
    """All cells of either modality in both."""
    names = rna.obs_names.union(atac.obs_names, sort=False)
    has_rna, has_atac = names.isin(rna.obs_names), names.isin(atac.obs_names)
    batch = pd.concat([pd.Series(peer.batch_of(x), index=x.obs_names) for x in (rna, atac)])
    obs = pd.DataFrame(index=names)
    obs["modality"] = np.select([has_rna & has_atac, has_rna], [PAIRED, EXPRESSION], ACCESSIBILITY)
    obs["batch"] = batch[~batch.index.duplicated()][names]
    parts = {
        m: ad.AnnData(filled(x, names), obs=obs.copy(), var=x.var[[]])
        for m, x in (("rna", rna), ("atac", atac))
    }
    whole = md.MuData(parts)
    whole.obs["_indices"] = np.arange(
        whole.n_obs
    )  # its set-up adds this to the training cells, and wants it of others
    return whole


def main() -> None:
    warnings.filterwarnings("ignore")
    args = peer.arguments(__doc__)
    train, test = peer.load(args)
    scvi.settings.seed = args.seed

    began = time.monotonic()
    rna, atac = (train[m] for m in args.mods)
    cells = mosaic(rna, atac)
    where = {
        "rna_layer": "rna",
        "atac_layer": "atac",
        "batch_key": "rna",
        "categorical_covariate_keys": "rna",
    }
    scvi.model.MULTIVI.setup_mudata(
        cells, modalities=where, batch_key="modality", categorical_covariate_keys=["batch"]
    )
    model = scvi.model.MULTIVI(cells)
    length = {"max_epochs": args.epochs} if args.epochs else {}
    model.train(accelerator="cpu", enable_progress_bar=False, **length)
    fit_s = time.monotonic() - began
    print(f"{len(model.history['elbo_train'])} epochs")

    # The test cells twice: once with their peaks taken away, once with their genes.
    rna, atac = (test[m] for m in args.mods)
    u1 = model.get_latent_representation(mosaic(rna, atac[:0]))
    u2 = model.get_latent_representation(mosaic(rna[:0], atac))
    peer.save(args, u1, u2, fit_s)


if __name__ == "__main__":
    main()
