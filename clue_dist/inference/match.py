"""Partners of cells across two modalities: a matrix of weights and a table of pairs."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pandas as pd
import scipy.sparse as sp

from clue_dist.errors import ConfigError, format_count, list_names, name_argument
from clue_dist.inference.cells import Cells, StoreCells
from clue_dist.inference.cells.memory_obs import NAME_BATCHES, name_values
from clue_dist.inference.cells.named_counts import warn_of_cells
from clue_dist.inference.load_model import TrainedModel
from clue_dist.inference.output_files import (
    TABLE_FORMATS,
    replace_output,
    require_output_format,
    write_table,
)
from clue_dist.inference.query import holds_training_cells
from clue_dist.inference.reference_cells import (
    ComparedCells,
    ReferenceCells,
    embed_for_comparison,
)
from clue_dist.neighbours.pair_confidence import FEWEST_PAIRS, PairConfidence, fit_pair_confidence
from clue_dist.neighbours.partner_settings import PartnerSettings
from clue_dist.neighbours.partners import find_partners
from clue_dist.store.batch_vocabulary import BATCH

PAIR_FORMATS = (".npz", *TABLE_FORMATS)


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
            else f"not calibrated, which takes {FEWEST_PAIRS} cells with both modalities that the "
            "model has not seen"
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
    batches: np.ndarray | None  # (n,), where they are asked for


def match_cells(
    trained_model: TrainedModel,
    cells: Cells,
    first: str,
    second: str,
    *,
    reference: ComparedCells | None = None,
    settings: PartnerSettings | None = None,
    within_batch: bool = False,
    calibrate_on: Cells | None = None,
    batch_size: int = 4096,
) -> MatchedCells:
    """Find for each cell with modality `first` its partners among reference cells with `second`.

    By default the cells are their own reference. A cell with both modalities then takes part on
    both sides, each time seen through one of them: held-out paired cells show how well the matching
    works.

    Args:
        trained_model: the model.
        cells: the cells.
        first: a modality; rows of the matrix are the cells that carry it.
        second: another one, whose cells are the columns.
        reference: where these columns come from; by default `cells`.
        settings: how partners are sought.
        within_batch: whether a partner must be of the same batch; a cell of an unknown batch gets
            none.
        calibrate_on: cells with both modalities that the model has not been trained on, which
            confidence is calibrated on. By default those of `cells`, if these are a store that the
            model was not trained on, with 50 of them or more.
        batch_size: cells embedded at once.

    Raises:
        ConfigError: no cell carries one of the modalities; batches are not known.
        DataError: too few pairs to calibrate on.
    """
    settings = settings or PartnerSettings()
    _require_modalities(first, second, cells, reference)
    asked = _drop_joint(embed_for_comparison(trained_model, cells, batch_size))
    known = asked
    if reference is not None:
        known = _drop_joint(embed_for_comparison(trained_model, reference, batch_size))
    one, other = sides = _select_sides(asked, known, first, second, within_batch)
    batches = None
    if one.batches is not None and other.batches is not None:
        batches = one.batches, other.batches
    weights = find_partners(one.profiles, other.profiles, settings, batches)
    if calibrate_on is None:
        confidence = _calibrate_on_cells(
            trained_model, cells, _select_pairs(asked, first, second), settings
        )
    else:
        _require_modalities(first, second, calibrate_on)
        paired = embed_for_comparison(trained_model, calibrate_on, batch_size)
        confidence = fit_pair_confidence(*_select_pairs(paired, first, second), settings)
    return MatchedCells(weights, _list_pairs(weights, sides, confidence), confidence)


def require_pairs_path(out: Path) -> None:
    """Require that a path has an ending that pairs or their matrix can be written to.

    Raises:
        ConfigError: it has not, or its folder is not there.
    """
    require_output_format(out, PAIR_FORMATS)


def write_matches(matched: MatchedCells, out: Path) -> None:
    """Write the matrix of weights, to .npz, or the table of pairs, to .csv, .csv.gz or .parquet."""
    require_pairs_path(out)
    if out.suffix != ".npz":
        write_table(matched.pairs, out)
        return
    with replace_output(out) as temporary:
        # Readers of the competition's files know sparse matrices, not arrays.
        sp.save_npz(temporary, sp.csr_matrix(matched.weights))


def _drop_joint(cells: ReferenceCells) -> ReferenceCells:
    """Cells without their joint z, which matching needs not: of a million cells it is 0.5 GB."""
    nothing = np.empty((len(cells.obs), 0), np.float32)
    return replace(cells, embedding=replace(cells.embedding, joint=nothing, variance=None))


def _require_modalities(
    first: str, second: str, cells: Cells, reference: ComparedCells | None = None
) -> None:
    """Require that cells carry one modality, and the reference another one."""
    known = cells.modalities if reference is None else reference.modalities
    if first == second or first not in cells.modalities or second not in known:
        raise ConfigError(
            "two different modalities of the cells are needed",
            where=" and ".join(map(name_argument, ("first", "second"))),
            got=list_names((first, second)),
            expected=f"two of {list_names(dict.fromkeys([*cells.modalities, *known]))}"
            if reference is None
            else f"one of {list_names(cells.modalities)}, and one of the reference's "
            f"{list_names(known)}",
            fix=f"name cells with the other modality: {name_argument('reference')}"
            if reference is None and len(known) == 1
            else None,
        )


def _select_sides(
    asked: ReferenceCells,
    known: ReferenceCells,
    first: str,
    second: str,
    within_batch: bool,
) -> tuple[_MatchedSide, _MatchedSide]:
    """The profiles of one modality of some cells, and those of another of the reference."""
    batches = _read_batches(asked.obs) if within_batch else None
    others = _read_batches(known.obs) if within_batch and known is not asked else batches
    return _select_side(asked, first, batches), _select_side(known, second, others)


def _select_side(cells: ReferenceCells, modality: str, batches: np.ndarray | None) -> _MatchedSide:
    """The profiles of one modality of the cells that carry it."""
    measured = cells.embedding.mark_measured(modality)
    return _MatchedSide(
        _select_rows(cells.embedding.alone[modality], measured),
        cells.obs.index.to_numpy()[measured],
        None if batches is None else batches[measured],
    )


def _select_rows(profiles: np.ndarray, chosen: np.ndarray) -> np.ndarray:
    """Rows of profiles; the profiles themselves, not a copy, where all rows are chosen."""
    return profiles if chosen.all() else profiles[chosen]


def _read_batches(obs: pd.DataFrame) -> np.ndarray:
    """The batch of each cell, (N,) names, "" where unknown; warns of these."""
    if BATCH not in obs:
        raise ConfigError(
            "the batches of the cells are not known, within which to match",
            got=f"columns of obs: {list_names(obs.columns) or 'none'}",
            fix=f"{NAME_BATCHES}; or match among all cells",
        )
    batches = name_values(obs[BATCH])
    if n_unknown := int((batches == "").sum()):
        warn_of_cells(f"no partner for {format_count(n_unknown, 'cell')} whose batch is not known")
    return batches


def _calibrate_on_cells(
    trained_model: TrainedModel,
    cells: Cells,
    profiles: tuple[np.ndarray, np.ndarray],
    settings: PartnerSettings,
) -> PairConfidence:
    """A calibration on the pairs of the cells to match, if the model has not seen these."""
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


def _select_pairs(cells: ReferenceCells, first: str, second: str) -> tuple[np.ndarray, np.ndarray]:
    """The profiles of the cells that carry both modalities, in one order."""
    alone = cells.embedding.alone
    if first not in alone or second not in alone:
        return np.empty((0, 0)), np.empty((0, 0))
    both = cells.embedding.mark_measured(first) & cells.embedding.mark_measured(second)
    return _select_rows(alone[first], both), _select_rows(alone[second], both)


def _list_pairs(
    weights: sp.csr_array, sides: tuple[_MatchedSide, _MatchedSide], confidence: PairConfidence
) -> pd.DataFrame:
    """The pairs with a weight, cell by cell, the partner of the largest weight first."""
    one, other = sides
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
    return pairs


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
