"""Embeds cells with a trained model, over any number of ranks, into .h5mu, .h5ad or .zarr."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import anndata as ad
import mudata as md
import numpy as np
import pandas as pd

from clue_dist.errors import DataError
from clue_dist.inference.answer_files import PROVENANCE_KEY, require_answer_path, write_tables
from clue_dist.inference.cells import Cells, MemoryCells
from clue_dist.inference.cells.memory_obs import require_writable_obs
from clue_dist.inference.file_order import restore_file_order
from clue_dist.inference.load_model import TrainedModel
from clue_dist.inference.output_files import make_scratch_folder
from clue_dist.inference.stream import Embedding, compute_embedding, embed_in_memory
from clue_dist.model.common_space import JOINT_FORMULA
from clue_dist.process import silence_mudata
from clue_dist.ranks import Ranks
from clue_dist.store.batch_vocabulary import name_level_column

EMBEDDING_FORMATS = (".h5mu", ".h5ad", ".zarr")
KEY = "X_clue"  # key in obsm
VARIANCE_KEY = "X_clue_var"  # key in obsm of the variance of each dimension
OBSERVED_COLUMN = "clue_modalities"  # of obs: what was observed of a cell, as "rna+adt"


def embed_cells(
    trained_model: TrainedModel,
    cells: Cells,
    out: Path,
    *,
    run: Path | str,
    per_modality: bool = False,
    batch_size: int = 4096,
    like: str | None = None,
    ranks: Ranks | None = None,
) -> None:
    """Embed cells into a file. All ranks call this. An embedding that is at `out` is replaced.

    `.h5mu` holds one AnnData per modality with the cells that carry it, X left out: `X_clue` is in
    obsm of all cells and, with `per_modality`, of each modality. `.h5ad` and `.zarr` hold one
    AnnData of all cells, with `X_clue` and `X_clue_<modality>` in obsm. All have `X_clue_var`, the
    variance of each dimension of `X_clue`, and `clue_modalities` in obs, what was observed.
    `uns["clue_dist"]` says what made it.

    Args:
        trained_model: the model.
        cells: the cells.
        out: where to; its ending chooses the format.
        run: the run's folder, to be named in the output.
        per_modality: whether z from each modality alone is wanted, too.
        batch_size: cells embedded at once.
        like: `[DATASET:]FILE` whose barcodes and order the embedding gets; see
            `restore_file_order`.
        ranks: this process among the others; by default it is alone.

    Raises:
        ConfigError: an unknown ending, no such folder, or no embedding but something else at `out`;
            another job is writing it.
        StoreError: a damaged store; a full disk.
        DataError: values in memory that are no counts; columns of obs that no file takes.
        ResumeError: the model gives NaN.
    """
    ranks = ranks or Ranks()
    require_answer_path(out, EMBEDDING_FORMATS)
    if isinstance(cells, MemoryCells):
        require_writable_obs(cells.read_obs(), out.suffix)
    slices = cells.slice_cells(batch_size)
    with make_scratch_folder(out, ranks) as scratch:
        embedding = compute_embedding(
            trained_model,
            cells,
            scratch,
            slices,
            per_modality=per_modality,
            with_variance=True,
            ranks=ranks,
        )
        provenance = describe_embedding(trained_model, cells, run)

        def write_embedding() -> None:
            with silence_mudata(), md.set_options(pull_on_update=False):
                tables = _build_tables(out.suffix, trained_model, cells, embedding, provenance)
                if like is not None:
                    assert isinstance(tables, ad.AnnData)
                    tables = restore_file_order(tables, like)
                write_tables(out, scratch / f"out{out.suffix}", tables)

        ranks.run_on_first(write_embedding)


def collect_embedding(
    trained_model: TrainedModel,
    cells: Cells,
    run: Path | str,
    *,
    per_modality: bool = True,
    batch_size: int = 4096,
) -> ad.AnnData:
    """Embed cells into an AnnData in memory, which has no X; see `embed_cells`."""
    embedding = embed_in_memory(trained_model, cells, batch_size, per_modality=per_modality)
    provenance = describe_embedding(trained_model, cells, run)
    table = _build_tables(".h5ad", trained_model, cells, embedding, provenance)
    assert isinstance(table, ad.AnnData)
    return table


def embed_anndata(
    trained_model: TrainedModel,
    source: ad.AnnData | md.MuData,
    cells: MemoryCells,
    *,
    per_modality: bool = True,
    batch_size: int = 4096,
) -> np.ndarray:
    """Embed cells in memory, and write into their AnnData or MuData what was found.

    `X_clue` and `X_clue_var` go into obsm, `clue_modalities` into obs. z from each modality alone
    goes into `X_clue` of obsm of that modality of a MuData, and into `X_clue_<modality>` of an
    AnnData that holds several.

    Args:
        trained_model: the model.
        source: where they are written.
        cells: its cells, as `open_cells` opens them.
        per_modality: whether z from each modality alone is wanted, too.
        batch_size: cells embedded at once.

    Returns:
        The joint z, (N, K * d) float32; NaN for cells without counts.

    Raises:
        DataError: nothing can be written into the cells, which are a view of a file.
    """
    if source.isbacked and source.is_view:
        raise DataError(
            "a view of a file does not take the embedding",
            where=source.filename,
            got=f"{source.n_obs:,} of its cells",
            fix="read the file into memory, without `backed=`, or name another one, `out=`",
        )
    embedding = embed_in_memory(trained_model, cells, batch_size, per_modality=per_modality)
    source.obsm[KEY] = embedding.joint
    source.obsm[VARIANCE_KEY] = embedding.variance
    source.obs[OBSERVED_COLUMN] = pd.Categorical(embedding.name_patterns())
    for name, table in cells.tables.items() if per_modality else ():
        if table is source:
            if len(cells.tables) > 1:
                source.obsm[f"{KEY}_{name}"] = embedding.alone[name]
        else:
            rows = source.obs_names.get_indexer(table.obs_names)
            table.obsm[KEY] = embedding.alone[name][rows]
    return embedding.joint


def describe_embedding(
    trained_model: TrainedModel, cells: Cells, run: Path | str
) -> dict[str, Any]:
    """Say what made a result, to be kept in it."""
    columns = [name_level_column(name) for name in cells.batches.covariates]
    return {
        "run": str(run),
        "checkpoint": trained_model.name,
        **cells.describe_source(),
        **({"covariates": columns} if cells.batches.has_several else {}),
        "latent": dict.fromkeys(trained_model.modalities, trained_model.latent),
        "private": dict.fromkeys(trained_model.modalities, trained_model.private),
        "private_scale": trained_model.private_scale,
        "joint_formula": JOINT_FORMULA,
    }


def _build_tables(
    suffix: str,
    trained_model: TrainedModel,
    cells: Cells,
    embedding: Embedding,
    provenance: dict[str, Any],
) -> ad.AnnData | md.MuData:
    """The embedding as the object that the format of `suffix` holds."""
    obs = cells.read_obs()
    obs[OBSERVED_COLUMN] = pd.Categorical(embedding.name_patterns())
    uns = {PROVENANCE_KEY: provenance}
    joint = {KEY: embedding.joint, VARIANCE_KEY: embedding.variance}
    if suffix != ".h5mu":
        alone = {f"{KEY}_{name}": latent for name, latent in embedding.alone.items()}
        obsm = {key: np.asarray(z) for key, z in (joint | alone).items()}
        return ad.AnnData(obs=obs, obsm=obsm, uns=uns)
    tables: dict[str, ad.AnnData] = {}
    for name in provenance["modalities"]:
        measured = embedding.mark_measured(name)
        latent = embedding.alone.get(name)
        tables[name] = ad.AnnData(
            obs=obs[measured],
            var=pd.DataFrame(index=trained_model.modalities[name].features),
            obsm=None if latent is None else {KEY: np.asarray(latent[measured])},
        )
    mdata = md.MuData(tables)
    order = obs.index.get_indexer(mdata.obs_names)  # MuData puts the cells in an order of its own
    for column in obs:
        mdata.obs[column] = obs[column].array[order]
    for key, z in joint.items():
        mdata.obsm[key] = np.asarray(z)[order]
    mdata.uns.update(uns)
    return mdata
