"""Embeds a store with a trained model, block by block, over any number of ranks.

Every rank writes its rows into files of its own beside the output; rank 0 puts them together. The store is always
cut into the same batches, however many ranks there are, so that the result is the same to the last bit.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import anndata as ad
import mudata as md
import numpy as np
import pandas as pd

from clue_dist.errors import ConfigError
from clue_dist.inference.stream import (
    Embedding,
    LoadedModel,
    StratumSlice,
    check_output_folder,
    compute_embedding,
    make_scratch_folder,
    require_known_features,
    slice_strata,
)
from clue_dist.ranks import Ranks
from clue_dist.store.reader import Store

FORMATS = (".h5mu", ".h5ad", ".zarr")
KEY = "X_clue"


def embed_store(
    loaded: LoadedModel,
    store: Store,
    out: Path,
    *,
    run: Path | str,
    per_modality: bool = False,
    batch_size: int = 4096,
    ranks: Ranks | None = None,
) -> None:
    """Embed every cell of `store` into `out`; all ranks call this. Overwrites an embedding that is there.

    `.h5mu`: one AnnData per modality with the cells that carry it, X left out; obsm["X_clue"] of all cells and, with
    `per_modality`, of each modality. `.h5ad`, `.zarr`: one AnnData of all cells, obsm["X_clue"] and "X_clue_<m>".
    uns["clue_dist"] says what made it.

    Raises:
        ConfigError: an ending that is not known, no such folder, or one that is not an embedding in the way.
        StoreError: the store's modalities or features are not the model's; a damaged store.
        ResumeError: the model gives NaN.
    """
    ranks = ranks or Ranks()
    check_embedding_path(out)
    require_known_features(store, loaded.modalities)
    with make_scratch_folder(out, ranks) as scratch:
        done = compute_embedding(
            loaded,
            store,
            scratch,
            slice_strata(store, batch_size),
            per_modality=per_modality,
            ranks=ranks,
        )
        if ranks.is_first:
            with (
                md.set_options(pull_on_update=False),
                ad.settings.override(zarr_write_format=3, auto_shard_zarr_v3=False),
            ):
                _write(
                    out,
                    scratch / f"out{out.suffix}",
                    _assemble(out.suffix, store, done, describe_embedding(loaded, store, run)),
                )


def describe_embedding(loaded: LoadedModel, store: Store, run: Path | str) -> dict[str, Any]:
    """What made a result, to be kept in it."""
    return {
        "run": str(run),
        "checkpoint": loaded.name,
        "store": str(store.root),
        "fingerprint": store.fingerprint,
        "latent": dict.fromkeys(loaded.modalities, loaded.latent),
        "private": dict.fromkeys(loaded.modalities, loaded.private),
        "private_scale": loaded.private_scale,
    }


def check_embedding_path(out: Path) -> None:
    """An output is one of FORMATS and takes the place of nothing but a file or an earlier embedding."""
    if out.suffix not in FORMATS:
        raise ConfigError(
            "the output's ending says its format",
            where=f"--out {out}",
            got=out.suffix,
            expected=" or ".join(FORMATS),
        )
    check_output_folder(out)
    if out.is_dir() and not (out / "uns" / "clue_dist").is_dir():
        raise ConfigError(
            "a folder that is not an embedding is in the way",
            where=f"--out {out}",
            fix="choose another name",
        )
    if out.suffix == ".zarr" and out.is_file():
        raise ConfigError("a file is in the way", where=f"--out {out}", fix="choose another name")


def _assemble(
    suffix: str, store: Store, done: Embedding, about: dict[str, Any]
) -> ad.AnnData | md.MuData:
    obs = _obs(store, done.pieces)
    if suffix != ".h5mu":
        obsm = {KEY: done.joint, **{f"{KEY}_{m}": z for m, z in done.alone.items()}}
        return ad.AnnData(
            obs=obs, obsm={k: np.asarray(z) for k, z in obsm.items()}, uns={"clue_dist": about}
        )
    parts: dict[str, ad.AnnData] = {}
    for name, modality in store.manifest.modalities.items():
        has = _carry(store, done.pieces, name)
        alone = {KEY: np.asarray(done.alone[name][has])} if name in done.alone else None
        parts[name] = ad.AnnData(
            obs=obs[has], var=pd.DataFrame(index=modality.features), obsm=alone
        )
    mdata = md.MuData(parts)
    order = obs.index.get_indexer(mdata.obs_names)  # MuData puts the cells in its own order
    for column in obs:
        mdata.obs[column] = obs[column].array[order]
    mdata.obsm[KEY] = np.asarray(done.joint[order])
    mdata.uns["clue_dist"] = about
    return mdata


def _obs(store: Store, pieces: list[StratumSlice]) -> pd.DataFrame:
    """Barcodes as the index, `batch` and `cell_type` where they are known; in the order of the embedding."""
    seen = [store.segments[p.stratum].read_metadata(p.positions) for p in pieces]
    barcodes = pd.Index(np.concatenate([o.barcodes for o in seen]).astype(object))
    frame = pd.DataFrame(
        index=ad.utils.make_index_unique(barcodes) if barcodes.has_duplicates else barcodes
    )
    if (
        barcodes.has_duplicates
    ):  # data sets may share barcodes; MuData would take such cells for one
        frame["barcode"] = barcodes.to_numpy()
    columns = {
        "batch": ([o.batch for o in seen], store.manifest.batches),
        "cell_type": ([o.label for o in seen], store.manifest.labels),
    }
    for column, (codes, names) in columns.items():
        code = np.concatenate(codes)
        if (code >= 0).any():
            frame[column] = pd.Categorical.from_codes(code, categories=pd.Index(names))
    return frame


def _carry(store: Store, pieces: list[StratumSlice], modality: str) -> np.ndarray:
    """Which cells carry a modality, (N,) bool."""
    strata = store.manifest.strata
    return np.concatenate(
        [np.full(p.stop - p.start, modality in strata[p.stratum].modalities) for p in pieces]
    )


def _write(out: Path, temporary: Path, data: ad.AnnData | md.MuData) -> None:
    """Write under a temporary name, then rename: `out` is whole or is not there."""
    if out.suffix == ".zarr":
        data.write_zarr(temporary)
        if out.exists():
            out.rename(temporary.with_name("replaced"))  # goes with the scratch folder
    else:
        (data.write if out.suffix == ".h5mu" else data.write_h5ad)(temporary)
    temporary.replace(out)
