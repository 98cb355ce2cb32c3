"""MultiVI (scvi-tools) on a mosaic of RNA and ATAC, with its default settings and early stopping.

As its documentation has it, every cell stands in both modalities, with zeros where one was not
measured; which were measured is the batch that its adversary mixes. The biological batch is a
covariate of the decoder. It embeds and imputes cells of either modality alone.
"""

import time
import warnings
from collections.abc import Mapping

import joint
import mudata as md
import numpy as np
import peer
import scvi
from anndata import AnnData


def join_mosaic(tables: joint.Tables) -> md.MuData:
    """All cells of either modality in both."""
    obs = joint.list_cells(tables)
    filled = {
        m: AnnData(joint.fill_counts(cells, obs.index), obs=obs.copy(), var=cells.var[[]])
        for m, cells in tables.items()
    }
    whole = md.MuData(filled)
    # Its set-up adds this to the training cells, and wants it of others.
    whole.obs["_indices"] = np.arange(whole.n_obs)
    return whole


def impute_modalities(
    model: "scvi.model.MULTIVI", shown: Mapping[str, md.MuData]
) -> dict[str, np.ndarray]:
    """Each modality told from the other alone, as if both had been measured."""
    paired = {"transform_batch": "rna+atac", "return_numpy": True}
    return {
        # Regions are open more or less often: its estimates leave that out unless asked.
        "rna-atac": model.get_normalized_accessibility(
            shown["rna"], normalize_regions=True, **paired
        ),
        "atac-rna": model.get_normalized_expression(shown["atac"], **paired),
    }


def main() -> None:
    warnings.filterwarnings("ignore")
    args = peer.parse_arguments(__doc__)
    train, test = ({m: part[m] for m in args.mods} for part in peer.load_split(args))
    scvi.settings.seed = args.seed

    began = time.monotonic()
    cells = join_mosaic(train)
    where = {"rna_layer": "rna", "atac_layer": "atac", "batch_key": "rna"}
    where["categorical_covariate_keys"] = "rna"
    keys = {"batch_key": "pattern", "categorical_covariate_keys": ["batch"]}
    scvi.model.MULTIVI.setup_mudata(cells, modalities=where, **keys)
    model = scvi.model.MULTIVI(cells)
    length = {"max_epochs": args.epochs} if args.epochs else {}
    model.train(accelerator="cpu", enable_progress_bar=False, **length)
    fit_s = time.monotonic() - began
    print(f"{len(model.history['elbo_train'])} epochs")

    views = {"joint": args.mods} | {m: [m] for m in args.mods}
    shown = {m: join_mosaic(joint.hide_modalities(test, kept)) for m, kept in views.items()}
    embedded = {source: model.get_latent_representation(x) for source, x in shown.items()}
    joint.save_imputed(args, impute_modalities(model, shown))
    mosaic = model.get_latent_representation(cells)
    pattern = cells["rna"].obs["pattern"].to_numpy()
    joint.save_views(args, fit_s, embedded, mosaic, pattern)


if __name__ == "__main__":
    main()
