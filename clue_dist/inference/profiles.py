"""What a report reads: the metrics of a run, and profiles out of an embedding."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from pathlib import Path

import anndata as ad
import mudata as md
import numpy as np
import pandas as pd

from clue_dist.checkpoint.metrics_lines import read_metrics_lines
from clue_dist.errors import ConfigError
from clue_dist.inference.embed import KEY

MOST_PROFILES = 10_000
UNKNOWN = "unknown"
ALL_OBSERVED = "all observed"  # in place of a modality: z from everything observed in a cell
# What readers of HDF5 and Zarr raise for files that hold something else.
_UNREADABLE = (
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
    """Cells, each seen through one modality."""

    z: np.ndarray  # (n, D) of length 1
    modality: np.ndarray  # (n,) names, as are the others
    batch: np.ndarray  # UNKNOWN where it is not known
    cell_type: np.ndarray  # UNKNOWN where it is not known


def read_metrics(path: Path) -> tuple[pd.DataFrame, int]:
    """Read metrics.jsonl.

    A run that was resumed has some steps twice, of which the later line counts. A run that was
    killed may end in half a line.

    Returns:
        The metrics, a row for each step and split; and how many lines could not be read.
    """
    lines = read_metrics_lines(path)
    found = [{"split": "train", **line.row} for line in lines if line.row is not None]
    rows = {(str(row["split"]), row["step"]): row for row in found}
    frame = pd.DataFrame(rows.values(), columns=None if rows else ["split", "step"])
    return frame.sort_values("step", kind="stable"), len(lines) - len(found)


def read_profiles(path: Path, most: int = MOST_PROFILES, seed: int = 0) -> Profiles:
    """Read each modality's own embedding, or the joint one where a file has no other.

    Args:
        path: an output of `launch/embed.py`.
        most: so many profiles at most, drawn at random.
        seed: seed of the draw.

    Raises:
        ConfigError: no such file, or no embedding in it.
    """
    where = f"--embedding {path}"
    if not path.exists():
        raise ConfigError("no embedding here", where=where, fix="make one with launch/embed.py")
    try:
        with warnings.catch_warnings():
            # mudata announces a default that changes nothing here.
            warnings.simplefilter("ignore", FutureWarning)
            tables = _read_tables(path)
    except _UNREADABLE as error:
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        raise ConfigError("the embedding cannot be read", where=where, got=reason) from error
    if not tables:
        raise ConfigError("no embedding in this file", where=where, expected=f"obsm[{KEY!r}]")
    latent = np.concatenate([z for _, z, _ in tables])
    kept = np.sort(np.random.default_rng(seed).permutation(len(latent))[:most])
    latent = latent[kept].astype(np.float64)
    length = np.linalg.norm(latent, axis=1, keepdims=True)
    return Profiles(
        latent / np.maximum(length, 1e-12),
        np.repeat([name for name, _, _ in tables], [len(z) for _, z, _ in tables])[kept],
        np.concatenate([_read_column(obs, "batch") for *_, obs in tables])[kept],
        np.concatenate([_read_column(obs, "cell_type") for *_, obs in tables])[kept],
    )


def _read_tables(path: Path) -> list[tuple[str, np.ndarray, pd.DataFrame]]:
    """(modality, z, obs) of every embedding in a file."""
    if path.suffix == ".h5mu":
        mdata = md.read_h5mu(path)
        alone = [(name, a.obsm[KEY], a.obs) for name, a in mdata.mod.items() if KEY in a.obsm]
        joint = [(ALL_OBSERVED, mdata.obsm[KEY], mdata.obs)] if KEY in mdata.obsm else []
        return alone or joint
    adata = ad.read_zarr(path) if path.suffix == ".zarr" else ad.read_h5ad(path)
    joint = [(ALL_OBSERVED, adata.obsm[KEY], adata.obs)] if KEY in adata.obsm else []
    alone = []
    for key in [key for key in adata.obsm if key.startswith(f"{KEY}_")]:
        measured = ~np.isnan(adata.obsm[key]).any(axis=1)
        name = key.removeprefix(f"{KEY}_")
        alone.append((name, adata.obsm[key][measured], adata.obs[measured]))
    return alone or joint


def _read_column(obs: pd.DataFrame, column: str) -> np.ndarray:
    """A column of obs as names, (n,), UNKNOWN where it says nothing."""
    if column not in obs:
        return np.full(len(obs), UNKNOWN, dtype=object)
    values = obs[column].astype(object).where(obs[column].notna(), UNKNOWN)
    return values.astype(str).to_numpy(dtype=object)
