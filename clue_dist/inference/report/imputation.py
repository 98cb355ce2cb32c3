"""Imputed values against what was measured in the same cells, as a section of the page."""

from __future__ import annotations

import warnings
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import anndata as ad
import numpy as np
import pandas as pd
import scipy.sparse as sp
from anndata.utils import make_index_unique

from clue_dist.errors import ConfigError, name_argument, shorten_error
from clue_dist.inference.answer_files import PROVENANCE_KEY
from clue_dist.inference.imputation_question import COUNTS, LOG_SHARES, LOWER, UPPER, VALUES
from clue_dist.inference.query import holds_training_cells
from clue_dist.inference.report.profiles import UNREADABLE
from clue_dist.model.imputation import PER_TEN_THOUSAND
from clue_dist.store.reader import Store

MOST_COMPARED_CELLS = 3_000  # drawn at random
MOST_FEATURES = 2_000  # the ones with the most counts
_SHOWN_FEATURES, _SHOWN_CELLS = 30, 400  # of which the page has the values


@dataclass(frozen=True)
class FeatureComparison:
    """One feature, over cells."""

    name: str
    correlation: float
    truth: list[float]
    imputed: list[float]


@dataclass(frozen=True)
class _Matched:
    """Imputed and measured values of the same cells and features, (n, F) each."""

    imputed: ad.AnnData
    truth: np.ndarray  # in the unit of the imputed values


def compare_imputation(path: Path, truth: str, seen_cells: frozenset[str]) -> dict[str, Any]:
    """Compare imputed values with the counts of a store.

    Counts are compared as their ln(1 + x), other values as they are.

    Args:
        path: an output of `clue impute`.
        truth: the store that holds the counts of the same cells, found by their barcodes.
        seen_cells: what identifies the cells that the run was trained on.

    Returns:
        The section, as JSON.

    Raises:
        ConfigError: no imputed values there, or the store does not have these cells.
        StoreError: no such store.
    """
    answer = _read_answer(path)
    about = dict(answer.uns[PROVENANCE_KEY])
    store = Store(truth)
    matched = _match_values(path, answer, store, about)
    if answer.isbacked:
        answer.file.close()
    facts, shown = _compare_values(matched, about)
    return {
        "file": path.name,
        "truth": truth,
        "cells": len(matched.truth),
        "features": matched.truth.shape[1],
        "modality": str(about["modality"]),
        "from": [str(name) for name in about.get("from", [])],
        "scale": _name_scale(about["unit"]),
        "seen": holds_training_cells(store, seen_cells),
        "about": {"checkpoint": str(about.get("checkpoint", ""))},
        "facts": facts,
        "shown": [asdict(feature) for feature in shown],
    }


def _compare_values(
    matched: _Matched, about: dict[str, Any]
) -> tuple[list[tuple[str, str]], list[FeatureComparison]]:
    """Scores over all features and cells, and features with their values."""
    logs = about["unit"] not in (LOG_SHARES, VALUES)
    imputed, measured = (
        np.log1p(np.maximum(values, 0)) if logs else values
        for values in (_to_dense(matched.imputed.X), matched.truth)
    )
    per_feature = correlate_rows(imputed.T, measured.T)
    per_cell = correlate_rows(imputed, measured)
    facts = [
        ("correlation per feature, median", _format_median(per_feature)),
        ("correlation per cell, median", _format_median(per_cell)),
        ("RMSE", f"{np.sqrt(np.mean((imputed - measured) ** 2)):.4f}"),
    ]
    layers = matched.imputed.layers
    if {LOWER, UPPER} <= set(layers):
        low, high = (_to_dense(layers[name]) for name in (LOWER, UPPER))
        inside = (matched.truth >= low) & (matched.truth <= high)
        title = f"inside the {100 * float(about.get('interval', 0)):g}% intervals"
        facts.append((title, f"{inside.mean():.4f}"))
    names = matched.imputed.var_names
    return facts, _select_features(names, per_feature, imputed, measured)


def correlate_rows(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """Pearson's correlation of each row with the same row, (n,); NaN where one is constant.

    Args:
        first: (n, F).
        second: (n, F).
    """
    left, right = (
        values - values.mean(1, keepdims=True) for values in (first.astype(float), second)
    )
    scale = np.sqrt((left**2).sum(1) * (right**2).sum(1))
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.where(scale > 0, (left * right).sum(1) / scale, np.nan)


def _read_answer(path: Path) -> ad.AnnData:
    """The imputed values; those of an .h5ad stay on the disk."""
    where = name_argument("imputed", path)
    if not path.exists():
        raise ConfigError("no imputed values here", where=where, fix="make them with `clue impute`")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            is_zarr = path.suffix == ".zarr"
            answer = ad.read_zarr(path) if is_zarr else ad.read_h5ad(path, backed="r")
        if not {"modality", "unit"} <= set(answer.uns[PROVENANCE_KEY]):
            raise KeyError(f"no modality in uns[{PROVENANCE_KEY!r}]")
    except UNREADABLE as error:
        raise ConfigError(
            "the imputed values cannot be read",
            where=where,
            got=shorten_error(error),
            fix="make them with `clue impute`",
        ) from error
    return answer


def _match_values(
    path: Path,
    answer: ad.AnnData,
    store: Store,
    about: dict[str, Any],
) -> _Matched:
    """The cells that both have, MOST_COMPARED_CELLS at most, and the features of most counts."""
    modality = str(about["modality"])
    places = _list_places(store, modality)
    found = places.index.intersection(answer.obs_names, sort=False)
    if len(found) < 2:
        raise ConfigError(
            "the store has too few of the cells that were imputed",
            where=name_argument("truth", store.root),
            got=f"{len(found)} of {answer.n_obs:,} barcodes of {path.name} with {modality}",
            expected="2 or more",
            fix="name the store whose cells were imputed, with the modality measured",
        )
    draws = np.random.default_rng(0)
    cells = found[np.sort(draws.permutation(len(found))[:MOST_COMPARED_CELLS])]
    counts = _read_counts(store, modality, places.loc[cells])
    known = pd.Index(store.manifest.modalities[modality].features)
    columns = known.get_indexer(answer.var_names)
    features = np.flatnonzero(columns >= 0)
    # Of features without counts nothing can be said, and of chromatin there are a hundred thousand.
    totals = np.asarray(counts.sum(0)).reshape(-1)[columns[features]]
    features = np.sort(features[np.argsort(-totals, kind="stable")[:MOST_FEATURES]])
    library = np.asarray(counts.sum(1)).reshape(-1, 1)
    measured = counts[:, columns[features]].toarray().astype(np.float64)
    view = answer[answer.obs_names.get_indexer(cells), features]
    chosen = view.to_memory() if answer.isbacked else view.copy()
    # A cell without anything to impute from has NaN.
    is_imputed = np.isfinite(_to_dense(chosen.X)).all(axis=1)
    return _Matched(chosen[is_imputed], _scale_counts(measured, library, about)[is_imputed])


def _list_places(store: Store, modality: str) -> pd.DataFrame:
    """Segment and position of every cell with a modality, by barcode as an embedding names it."""
    parts = []
    for name, reader in store.segments.items():
        positions = np.arange(reader.segment.n_cells)
        barcodes = reader.read_metadata(positions).barcodes
        has = modality in reader.modalities
        parts.append(pd.DataFrame({"segment": name, "position": positions, "has": has}, barcodes))
    places = pd.concat(parts)
    places.index = pd.Index(places.index.astype(object))
    # Data sets may share barcodes: an answer names such cells apart in the same way.
    if places.index.has_duplicates:
        places.index = make_index_unique(places.index)
    return places[places["has"]]


def _read_counts(store: Store, modality: str, places: pd.DataFrame) -> sp.csr_matrix:
    """The counts of some cells, (n, features of the store), in the order of `places`."""
    parts, order = [], []
    for name, group in places.reset_index(drop=True).groupby("segment", sort=False):
        rows = store.segments[str(name)].read_rows(modality, group["position"].to_numpy())
        parts.append(sp.csr_matrix(rows if isinstance(rows, np.ndarray) else rows.to_scipy()))
        order.append(group.index.to_numpy())
    stacked = sp.vstack(parts, format="csr")
    return stacked[np.argsort(np.concatenate(order))]


def _scale_counts(counts: np.ndarray, library: np.ndarray, about: dict[str, Any]) -> np.ndarray:
    """Counts in the unit of the imputed values."""
    unit, size = about["unit"], about.get("library_size", "")
    # A word instead of a size, "own", leaves each cell its own.
    if unit == VALUES or (unit == COUNTS and isinstance(size, str)):
        return counts
    scale = float(size) if unit == COUNTS else PER_TEN_THOUSAND
    shares = counts * (scale / np.maximum(library, 1))
    return np.log1p(shares) if unit == LOG_SHARES else shares


def _select_features(
    names: pd.Index, correlations: np.ndarray, imputed: np.ndarray, measured: np.ndarray
) -> list[FeatureComparison]:
    """The features that vary most, with the values of some cells; the best first."""
    varied = np.argsort(-measured.var(0), kind="stable")[:_SHOWN_FEATURES]
    varied = varied[np.isfinite(correlations[varied])]
    return [
        FeatureComparison(
            str(names[k]),
            round(float(correlations[k]), 4),
            *(
                [round(float(value), 3) for value in values[:_SHOWN_CELLS, k]]
                for values in (measured, imputed)
            ),
        )
        for k in varied[np.argsort(-correlations[varied])]
    ]


def _name_scale(unit: str) -> str:
    return unit if unit in (LOG_SHARES, VALUES) else f"ln(1 + {unit})"


def _format_median(values: np.ndarray) -> str:
    return f"{np.nanmedian(values):.4f}" if np.isfinite(values).any() else "unknown"


def _to_dense(values: Any) -> np.ndarray:
    dense = values.toarray() if sp.issparse(values) else values
    return np.asarray(dense, np.float64)
