"""totalVI (scvi-tools) on RNA and proteins, with its default settings and early stopping.

Cells without proteins are batches of their own, whose missing proteins it models; it has no place
for cells without RNA, so proteins alone are neither trained on nor embedded, and no modalities of
unseen cells can be matched. It gives a joint embedding, and one from RNA alone.
"""

import time
import warnings

import joint
import mudata as md
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

    views = {"joint": args.mods, "rna": ["rna"]}
    embedded = {
        source: model.get_latent_representation(
            join_cells_with_rna(joint.hide_modalities(test, kept))
        )
        for source, kept in views.items()
    }
    mosaic = model.get_latent_representation(cells)
    joint.save_views(args, fit_s, embedded, mosaic, cells["rna"].obs["pattern"].to_numpy())


if __name__ == "__main__":
    main()
