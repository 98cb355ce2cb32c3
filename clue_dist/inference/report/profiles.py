"""What a report reads out of an embedding: z of cells, and what is known of each."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import anndata as ad
import mudata as md
import numpy as np
import pandas as pd

from clue_dist.errors import ConfigError, name_argument, shorten_error
from clue_dist.inference.answer_files import PROVENANCE_KEY
from clue_dist.inference.cells.memory_obs import name_values
from clue_dist.inference.embed import KEY, OBSERVED_COLUMN
from clue_dist.process import silence_mudata

MOST_PROFILES = 10_000
UNKNOWN = "unknown"
ALL_OBSERVED = "all observed"  # in place of a modality: z from everything observed in a cell
# What readers of HDF5 and Zarr raise for files that hold something else.
UNREADABLE = (
    OSError,
    KeyError,
    ValueError,
    TypeError,
    AttributeError,
    AssertionError,
    RuntimeError,
)


@dataclass(frozen=True)
class Profiles:
    """Cells, each seen through one modality or through everything observed in it."""

    z: np.ndarray  # (n, D) of length 1
    cell: np.ndarray  # (n,) number of the cell in the file
    modality: np.ndarray  # (n,) names, as are the others; ALL_OBSERVED of the joint z
    batch: np.ndarray  # UNKNOWN where it is not known
    cell_type: np.ndarray  # UNKNOWN where it is not known
    pattern: np.ndarray  # what was observed in the cell, such as "rna+adt"
    # By covariate the levels of the cells' batches, where there are several covariates.
    levels: dict[str, np.ndarray] = field(default_factory=dict)

    def select_rows(self, rows: np.ndarray) -> Profiles:
        """Some of the profiles; rows: numbers or a mask."""
        levels = {name: values[rows] for name, values in self.levels.items()}
        chosen = {name: values[rows] for name, values in vars(self).items() if name != "levels"}
        return Profiles(**chosen, levels=levels)


@dataclass(frozen=True)
class EmbeddedFile:
    """What a file of `clue embed` holds; of many cells a random part."""

    joint: Profiles | None  # z from everything observed
    alone: Profiles | None  # z from each modality
    n_cells: int  # in the file
    about: dict[str, Any]  # what made it: run, checkpoint and store


class _Latent(NamedTuple):
    """Every z of one kind. It may be large, and is not copied: profiles are some of its rows."""

    z: np.ndarray  # (m, D)
    rows: np.ndarray  # (n,) rows of z that were inferred
    cells: np.ndarray  # (n,) numbers in the file of the cells of these rows


@dataclass(frozen=True)
class _Table:
    """The cells of a file, with what each z was inferred from."""

    obs: pd.DataFrame
    latents: dict[str, _Latent]  # by modality; ALL_OBSERVED of the joint z
    pattern: np.ndarray  # (N,)
    about: dict[str, Any]


def read_profiles(path: Path, most: int = MOST_PROFILES, seed: int = 0) -> EmbeddedFile:
    """Read the embeddings of a file.

    Args:
        path: an output of `clue embed`.
        most: so many profiles at most of either kind, drawn at random.
        seed: seed of the draws.

    Raises:
        ConfigError: no such file, or no embedding in it.
    """
    where = name_argument("embedding", path)
    if not path.exists():
        raise ConfigError("no embedding here", where=where, fix="make one with `clue embed`")
    try:
        with silence_mudata():
            table = _read_mudata(path) if path.suffix == ".h5mu" else _read_anndata(path)
    except UNREADABLE as error:
        reason = shorten_error(error)
        raise ConfigError("the embedding cannot be read", where=where, got=reason) from error
    if not table.latents:
        raise ConfigError("no embedding in this file", where=where, expected=f"obsm[{KEY!r}]")
    draws = np.random.default_rng(seed)
    modalities = [name for name in table.latents if name != ALL_OBSERVED]
    joint = [name for name in table.latents if name == ALL_OBSERVED]
    return EmbeddedFile(
        joint=_take_profiles(table, joint, most, draws),
        alone=_take_profiles(table, modalities, most, draws),
        n_cells=len(table.obs),
        about=table.about,
    )


def _take_profiles(
    table: _Table, kinds: list[str], most: int, draws: np.random.Generator
) -> Profiles | None:
    """A random part of what was embedded, scaled to length 1; None where nothing was."""
    if not kinds:
        return None
    latents = [table.latents[kind] for kind in kinds]
    kept = np.sort(draws.permutation(sum(len(latent.rows) for latent in latents))[:most])
    starts = np.cumsum([0, *(len(latent.rows) for latent in latents)])
    parts = [
        kept[(kept >= start) & (kept < start + len(latent.rows))] - start
        for start, latent in zip(starts, latents, strict=False)
    ]
    pieces = list(zip(latents, parts, strict=True))
    cell = np.concatenate([latent.cells[part] for latent, part in pieces])
    z = np.concatenate([latent.z[latent.rows[part]] for latent, part in pieces]).astype(np.float64)
    length = np.linalg.norm(z, axis=1, keepdims=True)
    return Profiles(
        z=z / np.maximum(length, 1e-12),
        cell=cell,
        modality=np.repeat(np.array(kinds, dtype=object), [len(part) for part in parts]),
        batch=_read_names(table.obs, "batch", cell),
        cell_type=_read_names(table.obs, "cell_type", cell),
        pattern=table.pattern[cell],
        levels={name: _read_names(table.obs, name, cell) for name in table.about["covariates"]},
    )


def _read_mudata(path: Path) -> _Table:
    mdata = md.read_h5mu(path)
    cells = {name: mdata.obs_names.get_indexer(a.obs_names) for name, a in mdata.mod.items()}
    latents = {
        name: _Latent(np.asarray(a.obsm[KEY]), np.arange(a.n_obs), cells[name])
        for name, a in mdata.mod.items()
        if KEY in a.obsm
    }
    if KEY in mdata.obsm:
        every_cell = np.arange(mdata.n_obs)
        latents[ALL_OBSERVED] = _Latent(np.asarray(mdata.obsm[KEY]), every_cell, every_cell)
    obs = mdata.obs.copy()
    for column in ("batch", "cell_type"):  # of a file whose modalities alone have them
        for name, a in mdata.mod.items() if column not in obs else ():
            if column in a.obs:
                names = obs.get(column, pd.Series(None, obs.index, dtype=object)).to_numpy()
                names[cells[name]] = a.obs[column].astype(object)
                obs[column] = names
    is_observed = {name: np.isin(np.arange(len(obs)), rows) for name, rows in cells.items()}
    return _Table(obs, latents, _name_patterns(is_observed), _read_about(mdata.uns))


def _read_anndata(path: Path) -> _Table:
    adata = ad.read_zarr(path) if path.suffix == ".zarr" else ad.read_h5ad(path)
    about = _read_about(adata.uns)
    # Other keys of obsm may begin alike, such as that of the variances.
    known = [str(name) for name in about.get("modalities", [])]
    found = [key.removeprefix(f"{KEY}_") for key in adata.obsm if key.startswith(f"{KEY}_")]
    latents, is_observed = {}, {}
    for name in [name for name in known or found if name in found]:
        z = np.asarray(adata.obsm[f"{KEY}_{name}"])
        is_observed[name] = ~np.isnan(z[:, 0])
        rows = np.flatnonzero(is_observed[name])
        latents[name] = _Latent(z, rows, rows)
    every_cell = np.arange(adata.n_obs)
    if KEY in adata.obsm:
        latents[ALL_OBSERVED] = _Latent(np.asarray(adata.obsm[KEY]), every_cell, every_cell)
    pattern = _read_names(adata.obs, OBSERVED_COLUMN, every_cell)
    if is_observed:
        pattern = _name_patterns(is_observed)
    return _Table(adata.obs, latents, pattern, about)


def _read_about(uns: Any) -> dict[str, Any]:
    """What made the file, as text; nothing of a file that does not say so."""
    about = uns.get(PROVENANCE_KEY, {})
    facts: dict[str, Any] = {
        key: str(about[key]) for key in ("run", "checkpoint", "store") if key in about
    }
    facts["covariates"] = [str(name) for name in about.get("covariates", [])]
    return facts | {"modalities": list(about["modalities"])} if "modalities" in about else facts


def _name_patterns(is_observed: dict[str, np.ndarray]) -> np.ndarray:
    """Join the names of what was observed in each cell, (N,)."""
    columns = np.stack(list(is_observed.values()), axis=1)
    patterns, codes = np.unique(columns, axis=0, return_inverse=True)
    names = [
        "+".join(name for name, has in zip(is_observed, pattern, strict=True) if has) or UNKNOWN
        for pattern in patterns
    ]
    return np.array(names, dtype=object)[codes.reshape(-1)]


def _read_names(obs: pd.DataFrame, column: str, cells: np.ndarray) -> np.ndarray:
    """A column of obs as names of some cells, (n,), UNKNOWN where it says nothing."""
    if column not in obs:
        return np.full(len(cells), UNKNOWN, dtype=object)
    names = name_values(obs[column].iloc[cells])
    names[names == ""] = UNKNOWN
    return names
