"""Multigrate on a mosaic, with the losses and weights of its tutorial on three modalities.

RNA is decoded as counts, proteins after CLR and peaks after log CP10k by squared errors. Groups of
cells, by what was measured of them, are aligned by MMD of what each modality tells of them.
"""

import time
import warnings

import anndata as ad
import joint
import numpy as np
import peer
import scipy.sparse as sp
import scvi
import torch
from multigrate.model import MultiVAE

WEIGHTS = {"kl": 0.1, "integ": 3000}
COVARIATES = ["pattern", "batch"]
BATCH = 256


def normalise_values(modality: str, counts: sp.csr_matrix) -> sp.csr_matrix:
    """Counts of RNA, centred log ratios of proteins, log CP10k of peaks; zeros stay zeros."""
    if modality == "rna":
        return counts
    if modality == "atac":
        total = np.maximum(np.asarray(counts.sum(1)).ravel(), 1)
        return (sp.diags(1e4 / total) @ counts).log1p().tocsr()
    # Seurat's form of CLR, which is positive: a cell of no sum counts as not measured.
    mean = np.exp(np.asarray(counts.log1p().mean(1)).ravel())
    return (sp.diags(1 / mean) @ counts).log1p().tocsr()


def join_mosaic(tables: joint.Tables) -> ad.AnnData:
    """All cells, the features of both modalities side by side, RNA first."""
    obs = joint.list_cells(tables)
    counts = {m: joint.fill_counts(cells, obs.index) for m, cells in tables.items()}
    values = [normalise_values(m, x) for m, x in counts.items()]
    obs["size"] = np.asarray(counts["rna"].sum(1)).ravel()
    whole = ad.AnnData(sp.hstack(values, format="csr").astype(np.float32), obs=obs)
    whole.uns["modality_lengths"] = [x.shape[1] for x in values]
    return whole


@torch.inference_mode()
def embed_cells(model: MultiVAE, cells: ad.AnnData) -> np.ndarray:
    """Means of the joint posterior; its own command draws from it. (cells, dimensions)"""
    model.module.eval()
    loader = model._make_data_loader(adata=model._validate_anndata(cells), batch_size=BATCH)
    found = [model.module.inference(**model.module._get_inference_input(x))["mu"] for x in loader]
    return torch.cat(found).numpy()


def main() -> None:
    warnings.filterwarnings("ignore")
    args = peer.parse_arguments(__doc__)
    train, test = ({m: part[m] for m in args.mods} for part in peer.load_split(args))
    scvi.settings.seed = args.seed

    began = time.monotonic()
    cells = join_mosaic(train)
    MultiVAE.setup_anndata(cells, categorical_covariate_keys=COVARIATES, size_factor_key="size")
    model = MultiVAE(
        cells,
        losses=["nb", "mse"],
        loss_coefs=WEIGHTS,
        integrate_on="pattern",
        modality_alignment="MMD",
        alignment_type="marginal",
    )
    length = {"max_epochs": args.epochs} if args.epochs else {}
    model.train(accelerator="cpu", enable_progress_bar=False, **length)
    fit_s = time.monotonic() - began
    print(f"{len(model.history['elbo_train'])} epochs")

    views = {"joint": args.mods} | {m: [m] for m in args.mods}
    embedded = {
        source: embed_cells(model, join_mosaic(joint.hide_modalities(test, kept)))
        for source, kept in views.items()
    }
    mosaic = embed_cells(model, cells)
    joint.save_views(args, fit_s, embedded, mosaic, cells.obs["pattern"].to_numpy())


if __name__ == "__main__":
    main()
