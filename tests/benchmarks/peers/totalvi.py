"""totalVI (scvi-tools) on RNA and proteins, with its default settings and early stopping.

Cells without proteins are batches of their own, whose missing proteins it models; it has no place
for cells without RNA, so proteins alone are neither trained on nor embedded, and no modalities of
unseen cells can be matched. It gives a joint embedding, one from RNA alone, and imputed proteins.
"""

import time
import warnings

import joint
import mudata as md
import numpy as np
import peer
import scvi
from anndata import AnnData


def join_cells_with_rna(tables: joint.Tables) -> md.MuData:
    """The cells with RNA in both modalities; proteins are zeros where they were not measured."""
    rna = tables["rna"]
    obs = joint.list_cells(tables).loc[rna.obs_names]
    obs["pattern_and_batch"] = obs["pattern"] + "|" + obs["batch"]
    filled = {
        m: AnnData(joint.fill_counts(cells, rna.obs_names), obs=obs.copy(), var=cells.var[[]])
        for m, cells in tables.items()
    }
    filled["adt"].X = filled["adt"].X.toarray()  # its start of the background takes no sparse ones
    return md.MuData(filled)


def impute_proteins(model: "scvi.model.TOTALVI", cells: md.MuData) -> np.ndarray:
    """Expected counts of proteins as if they had been measured in each cell's batch."""
    batches = cells["rna"].obs["batch"]
    values = np.empty(cells["adt"].shape, np.float32)
    for batch in batches.unique():
        rows = np.flatnonzero(batches == batch)
        # As its tutorial on cells without proteins does; measured counts hold background, too.
        _, values[rows] = model.get_normalized_expression(
            cells,
            indices=rows,
            transform_batch=[f"rna+adt|{batch}"],
            n_samples=25,
            include_protein_background=True,
            return_numpy=True,
        )
    return values


def main() -> None:
    warnings.filterwarnings("ignore")
    args = peer.parse_arguments(__doc__)
    train, test = ({m: part[m] for m in args.mods} for part in peer.load_split(args))
    scvi.settings.seed = args.seed

    began = time.monotonic()
    cells = join_cells_with_rna(train)
    where = {"rna_layer": "rna", "protein_layer": "adt", "batch_key": "rna"}
    scvi.model.TOTALVI.setup_mudata(cells, modalities=where, batch_key="pattern_and_batch")
    model = scvi.model.TOTALVI(cells)
    length = {"max_epochs": args.epochs} if args.epochs else {}
    model.train(accelerator="cpu", enable_progress_bar=False, **length)
    fit_s = time.monotonic() - began
    print(f"{len(model.history['elbo_train'])} epochs")

    shown = {
        source: join_cells_with_rna(joint.hide_modalities(test, kept))
        for source, kept in {"joint": args.mods, "rna": ["rna"]}.items()
    }
    embedded = {source: model.get_latent_representation(x) for source, x in shown.items()}
    joint.save_imputed(args, {"rna-adt": impute_proteins(model, shown["rna"])})
    mosaic = model.get_latent_representation(cells)
    joint.save_views(args, fit_s, embedded, mosaic, cells["rna"].obs["pattern"].to_numpy())


if __name__ == "__main__":
    main()
