"""MIDAS (scmidas) on a mosaic, with the batch size and rates of its quick start.

Each pattern of measured modalities in each biological batch is a batch to it; the test cells stand
in the batches of cells that have everything. It has no early stopping, and its paper's 2,000 epochs
take most of a day on a core: here it gets the 65 of its quick start, but no fewer than STEPS steps.
"""

import math
import re
import time
import warnings
from collections.abc import Sequence
from typing import Any

import joint
import mudata as md
import numpy as np
import pandas as pd
import peer
import scmidas
from scmidas.data import MultiModalDataset
from scmidas.model import MIDAS

EPOCHS, STEPS, BATCH, RATE = 65, 2000, 128, 3e-4
BATCH_KEY = "batch"


def order_peaks(names: Sequence[str]) -> tuple[np.ndarray, list[int]]:
    """The order that brings peaks of a chromosome together, and how many each chromosome has.

    Peaks are encoded by chromosome; all are one where names do not tell them.
    """
    found = [re.match(r"(chr\w+?)[:_-]\d+[_-]\d+$", name) for name in names]
    chromosomes = pd.Series([match[1] if match else "" for match in found])
    codes = pd.factorize(chromosomes)[0]
    return np.argsort(codes, kind="stable"), np.bincount(codes).tolist()


def join_mosaic(tables: joint.Tables) -> md.MuData:
    """The cells of each modality, with the batch that they are to the model; peaks in order."""
    obs = joint.list_cells(tables)
    batch = obs["pattern"] + "|" + obs["batch"]
    parts = {}
    for m, table in tables.items():
        order = order_peaks(table.var_names)[0] if m == "atac" else np.arange(table.n_vars)
        parts[m] = table[:, order].copy()
        parts[m].obs = batch[table.obs_names].to_frame(BATCH_KEY)
    return md.MuData(parts)


def choose_settings(tables: joint.Tables) -> tuple[dict[str, Any], dict[str, list[int]] | None]:
    """Its settings for one process, and the peaks of each chromosome."""
    settings = scmidas.load_config() | {"lr_net": RATE, "lr_dsc": RATE}
    settings |= {"num_workers": 0, "pin_memory": False, "persistent_workers": False}
    if "atac" not in tables:
        return settings, None
    sizes = order_peaks(tables["atac"].var_names)[1]
    if len(sizes) == 1:  # it refuses layers of each chromosome where there is one
        del settings["dims_before_enc_atac"], settings["dims_after_dec_atac"]
    return settings, {"atac": sizes}


def count_epochs(model: MIDAS) -> int:
    """Epochs of the quick start, or as many as STEPS ask for."""
    steps = math.ceil(max(map(len, model.datalist)) / BATCH) * len(model.datalist)
    return max(EPOCHS, math.ceil(STEPS / steps))


def embed_cells(model: MIDAS, cells: md.MuData, each: bool = False) -> dict[str, pd.DataFrame]:
    """Means of what is biological in z, by "joint" and, if asked for, by modality; by barcode."""
    tables, masks, names = model.get_info_from_mdata(cells, BATCH_KEY)
    known = dict(zip(model.batch_names, model.s_joint, strict=True))
    trained = model.datalist, model.batch_names, model.combs
    binarize = {"atac": "binarize"} if "atac" in cells.mod else None
    model.datalist = [
        MultiModalDataset(x, known[name], dict.fromkeys(x, "anndata"), mask, binarize)
        for x, mask, name in zip(tables, masks, names, strict=True)
    ]
    model.batch_names, model.combs = list(names), [list(x) for x in tables]
    found = model.predict(mod_latent=each, verbose=False)
    model.datalist, model.batch_names, model.combs = trained
    parts: dict[str, list[pd.DataFrame]] = {}
    for name, table in zip(names, tables, strict=True):
        barcodes = next(iter(table.values())).obs_names
        for source, latent in found[name]["z_c"].items():
            parts.setdefault(source, []).append(pd.DataFrame(latent, barcodes))
    return {source: pd.concat(frames) for source, frames in parts.items()}


def main() -> None:
    warnings.filterwarnings("ignore")
    args = peer.parse_arguments(__doc__)
    train, test = ({m: part[m] for m in args.mods} for part in peer.load_split(args))
    scmidas.model.L.seed_everything(args.seed, verbose=False)

    began = time.monotonic()
    cells = join_mosaic(train)
    settings, sizes = choose_settings(train)
    MIDAS.setup_mudata(cells, batch_key=BATCH_KEY, dims_x=sizes)
    folder = str(args.out.parent / "scmidas")
    model = MIDAS(cells, configs=settings, batch_size=BATCH, save_model_path=folder)
    epochs = args.epochs or count_epochs(model)
    quiet = {"enable_progress_bar": False, "logger": False, "enable_checkpointing": False}
    model.train(max_epochs=epochs, accelerator="cpu", devices=1, **quiet)
    fit_s = time.monotonic() - began
    print(f"{epochs} epochs")

    views = embed_cells(model, join_mosaic(test), each=True)
    barcodes = test[args.mods[0]].obs_names
    embedded = {source: frame.loc[barcodes].to_numpy() for source, frame in views.items()}
    obs = joint.list_cells(train)
    mosaic = embed_cells(model, cells)["joint"].loc[obs.index].to_numpy()
    joint.save_views(args, fit_s, embedded, mosaic, obs["pattern"].to_numpy())


if __name__ == "__main__":
    main()
