"""Partners of cells across two modalities: a matrix of weights and a table of pairs."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import scipy.sparse as sp

from clue_dist.errors import ConfigError, list_names
from clue_dist.inference.cells import Cells, StoreCells
from clue_dist.inference.load_model import LoadedModel
from clue_dist.inference.named_counts import warn_of_cells
from clue_dist.inference.output_files import check_output_format, replace_output
from clue_dist.inference.query import holds_training_cells
from clue_dist.inference.stream import embed_in_memory
from clue_dist.pair_confidence import FEWEST_PAIRS, PairConfidence, fit_pair_confidence
from clue_dist.partner_settings import PartnerSettings
from clue_dist.partners import find_partners

PAIR_FORMATS = (".npz", ".csv", ".csv.gz", ".parquet")
_BATCH = "batch"  # column of obs


@dataclass(frozen=True, eq=False)
class MatchedCells:
    """Cells of one modality with their partners in another."""

    weights: sp.csr_array  # (N, M), rows sum to 1; a row without candidates is empty
    pairs: pd.DataFrame  # cell, partner, weight, confidence; a row for each weight
    confidence: PairConfidence

    def __repr__(self) -> str:
        n_matched = int((np.diff(self.weights.indptr) > 0).sum())
        state = (
            f"calibrated on {self.confidence.n_pairs:,} pairs"
            if self.confidence.is_calibrated
            else "not calibrated"
        )
        return (
            f"{n_matched:,} of {self.weights.shape[0]:,} cells matched to "
            f"{self.weights.shape[1]:,}; confidence {state}"
        )


@dataclass(frozen=True, eq=False)
class _MatchedSide:
    """The cells of one modality."""

    profiles: np.ndarray  # (n, K * d)
    names: np.ndarray  # (n,)
    rows: np.ndarray  # (n,), of all cells
    batches: np.ndarray | None  # (n,), where they are asked for


def match_cells(
    trained_model: LoadedModel,
    cells: Cells,
    first: str,
    second: str,
    *,
    settings: PartnerSettings | None = None,
    within_batch: bool = False,
    calibrate_on: Cells | PairConfidence | None = None,
    batch_size: int = 4096,
) -> MatchedCells:
    """Find for each cell with modality `first` its partners among the cells with `second`.

    A cell with both takes part on both sides, each time seen through one modality. So held-out
    paired cells show how well the matching works.

    Args:
        trained_model: the model.
        cells: the cells.
        first: a modality; rows of the matrix are the cells that carry it.
        second: another one, whose cells are the columns.
        settings: how partners are sought.
        within_batch: whether a partner must be of the same batch; a cell of an unknown batch gets
            none.
        calibrate_on: what confidence is calibrated on: cells with both modalities that the model
            has not been trained on, or an earlier calibration. By default those of `cells`, if
            these are a store that the model was not trained on, with 50 of them or more.
        batch_size: cells embedded at once.

    Raises:
        ConfigError: no cell carries one of the modalities; batches are not known.
        DataError: too few pairs to calibrate on.
    """
    settings = settings or PartnerSettings()
    sides = _embed_sides(trained_model, cells, (first, second), within_batch, batch_size)
    one, other = sides
    batches = None
    if one.batches is not None and other.batches is not None:
        batches = one.batches, other.batches
    weights = find_partners(one.profiles, other.profiles, settings, batches)
    confidence = _choose_confidence(
        trained_model, cells, sides, (first, second), settings, calibrate_on, batch_size
    )
    found = weights.tocoo()
    pairs = pd.DataFrame(
        {
            "cell": one.names[found.row],
            "partner": other.names[found.col],
            "weight": found.data,
            "confidence": _compute_confidences(confidence, sides, found),
        }
    )
    order = np.lexsort((-found.data, found.row))
    pairs = pairs.iloc[order].reset_index(drop=True)
    pairs.attrs["is_calibrated"] = confidence.is_calibrated
    return MatchedCells(weights, pairs, confidence)


def check_pairs_path(out: Path) -> None:
    """Check that a path has an ending that pairs or their matrix can be written to.

    Raises:
        ConfigError: it has not, or its folder is not there.
    """
    check_output_format(out, PAIR_FORMATS)


def write_matches(matched: MatchedCells, out: Path) -> None:
    """Write the matrix of weights, to .npz, or the table of pairs, to .csv, .csv.gz or .parquet."""
    check_pairs_path(out)
    with replace_output(out) as temporary:
        if out.suffix == ".npz":
            # Readers of the competition's files know sparse matrices, not arrays.
            sp.save_npz(temporary, sp.csr_matrix(matched.weights))
        elif out.suffix == ".parquet":
            matched.pairs.to_parquet(temporary, index=False)
        else:
            matched.pairs.to_csv(temporary, index=False)


def _embed_sides(
    trained_model: LoadedModel,
    cells: Cells,
    modalities: tuple[str, str],
    within_batch: bool,
    batch_size: int,
) -> tuple[_MatchedSide, _MatchedSide]:
    """The profiles of both modalities."""
    first, second = modalities
    if first == second or not {first, second} <= set(cells.modalities):
        raise ConfigError(
            "two different modalities of the cells are needed",
            got=list_names(modalities),
            expected=f"two of {list_names(cells.modalities)}",
        )
    obs = cells.read_obs()
    if within_batch and _BATCH not in obs:
        raise ConfigError(
            "the batches of the cells are not known, within which to match",
            got=f"columns of obs: {list_names(obs.columns) or 'none'}",
            fix="name the column with the batch (batch_key), or match among all cells",
        )
    batches = _read_batches(obs) if within_batch else None
    embedding = embed_in_memory(trained_model, cells, batch_size, with_variance=False)
    names = obs.index.to_numpy()

    def select_side(modality: str) -> _MatchedSide:
        rows = np.flatnonzero(embedding.mark_measured(modality))
        named = None if batches is None else batches[rows]
        return _MatchedSide(embedding.alone[modality][rows], names[rows], rows, named)

    return select_side(first), select_side(second)


def _read_batches(obs: pd.DataFrame) -> np.ndarray:
    """The batch of each cell, (N,) names, "" where unknown; warns of these."""
    batches = obs[_BATCH].astype(object)
    batches = batches.where(batches.notna(), "").astype(str)
    if n_unknown := int((batches == "").sum()):
        warn_of_cells(f"the batch of {n_unknown:,} cells is not known: they get no partner")
    return batches.to_numpy()


def _choose_confidence(
    trained_model: LoadedModel,
    cells: Cells,
    sides: tuple[_MatchedSide, _MatchedSide],
    modalities: tuple[str, str],
    settings: PartnerSettings,
    calibrate_on: Cells | PairConfidence | None,
    batch_size: int,
) -> PairConfidence:
    """The calibration that is given, or one on pairs that are given or among the cells."""
    if isinstance(calibrate_on, PairConfidence):
        return calibrate_on
    if calibrate_on is not None:
        paired = _embed_sides(trained_model, calibrate_on, modalities, False, batch_size)
        return fit_pair_confidence(*_select_pairs(paired), settings)
    profiles = _select_pairs(sides)
    if len(profiles[0]) < FEWEST_PAIRS:
        return PairConfidence()
    if not isinstance(cells, StoreCells):
        # Pairs of training match better than new ones, and confidence would be too high.
        warn_of_cells(
            "nothing says whether the model was trained on these cells, so confidence is not "
            "calibrated on them: `calibrate_on=` names cells with both modalities that it has not "
            "seen"
        )
        return PairConfidence()
    if holds_training_cells(cells.store, trained_model.seen_cells):
        return PairConfidence()
    return fit_pair_confidence(*profiles, settings)


def _select_pairs(sides: tuple[_MatchedSide, _MatchedSide]) -> tuple[np.ndarray, np.ndarray]:
    """The profiles of the cells that carry both modalities, in one order."""
    one, other = sides
    _, rows, columns = np.intersect1d(one.rows, other.rows, return_indices=True)
    return one.profiles[rows], other.profiles[columns]


def _compute_confidences(
    confidence: PairConfidence, sides: tuple[_MatchedSide, _MatchedSide], found: sp.coo_array
) -> np.ndarray:
    """The confidence of each pair, against the candidates of its batch where batches count."""
    one, other = sides
    if one.batches is None or other.batches is None:
        return confidence.compute_confidence(one.profiles, other.profiles, found.row, found.col)
    result = np.empty(len(found.data))
    for name in np.unique(one.batches[found.row]):
        rows, columns = (np.flatnonzero(side.batches == name) for side in sides)
        chosen = np.flatnonzero(one.batches[found.row] == name)
        result[chosen] = confidence.compute_confidence(
            one.profiles[rows],
            other.profiles[columns],
            np.searchsorted(rows, found.row[chosen]),
            np.searchsorted(columns, found.col[chosen]),
        )
    return result
