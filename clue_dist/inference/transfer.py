"""Labels carried from labelled cells to others, within a modality or across modalities."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
import torch

from clue_dist.errors import DataError, format_count
from clue_dist.inference.cells import Cells
from clue_dist.inference.cells.memory_obs import read_named_column
from clue_dist.inference.cells.named_counts import warn_of_cells
from clue_dist.inference.load_model import TrainedModel
from clue_dist.inference.output_files import require_table_path, write_table
from clue_dist.inference.reference_cells import (
    ComparedCells,
    ReferenceCells,
    embed_for_comparison,
)
from clue_dist.inference.stream import Embedding, embed_in_memory
from clue_dist.metrics.integration import mark_labelled_cells
from clue_dist.neighbours.label_transfer import UNKNOWN_LABEL, TransferSettings, fit_label_transfer


def label_cells(
    trained_model: TrainedModel,
    reference: ComparedCells,
    query: Cells,
    label_key: str,
    *,
    settings: TransferSettings | None = None,
    batch_size: int = 4096,
) -> pd.DataFrame:
    """Label cells by the labelled cells that lie nearest to them.

    Both are compared by z from everything observed in a cell. Queries that carry the same
    modalities are labelled together, and their confidence is calibrated on reference cells seen
    through just these modalities.

    Args:
        trained_model: the model.
        reference: cells, of which some are labelled.
        query: the cells to label.
        label_key: column of the reference's obs with the labels.
        settings: how labels are carried over.
        batch_size: cells embedded at once.

    Returns:
        A row for each query, in their order: what `LabelTransfer.assign_labels` gives, and
        `is_calibrated`, whether reference cells could be asked through the query's modalities.
        Cells without counts are "unknown".

    Raises:
        ConfigError: the reference has no such column.
        DataError: it has fewer than two labelled cells.
    """
    labels = _read_labels(reference, label_key)
    known = embed_for_comparison(trained_model, reference, batch_size).embedding
    asked = embed_in_memory(
        trained_model, query, batch_size, per_modality=False, with_variance=False
    )
    # Cells without counts are not in the embedding.
    rows = np.flatnonzero(mark_labelled_cells(labels) & np.isfinite(known.joint).all(1))
    patterns = asked.name_patterns()
    frame = _make_unknown_labels(query.read_obs().index, np.unique(labels[rows]))
    for pattern in np.unique(patterns[patterns != ""]):
        cells = np.flatnonzero(patterns == pattern)
        views = _view_reference(trained_model, reference, known, pattern, batch_size)
        fitted = fit_label_transfer(known.joint[rows], labels[rows], views[rows], settings)
        found = fitted.assign_labels(asked.joint[cells])
        found["is_calibrated"] = fitted.is_calibrated
        for place, column in enumerate(frame.columns):
            frame.iloc[cells, place] = found[column].to_numpy()
        if not fitted.is_calibrated:
            # What is embedded shows a cell by all that it carries, or by one modality alone.
            is_exact = isinstance(reference, ReferenceCells) and pattern not in known.alone
            alone = " and nothing else" if is_exact else ""
            warn_of_cells(
                f"too few labelled cells carry {pattern}{alone}: the confidence of "
                f"{format_count(len(cells), 'cell')} is that of the reference's own modalities"
            )
    return frame


def write_labels(labels: pd.DataFrame, out: Path) -> None:
    """Write labels, with the names of the cells as the first column."""
    require_table_path(out)
    write_table(labels, out, index_label="cell")


def _read_labels(reference: ComparedCells, label_key: str) -> np.ndarray:
    """The labels of the reference cells, (R,) names, "" where there is none, or "unknown"."""
    labels = read_named_column(reference.read_obs(), "label_key", label_key, "obs of the reference")
    labels[labels == UNKNOWN_LABEL] = ""
    if mark_labelled_cells(labels).sum() < 2:
        raise DataError(
            "the reference needs two labelled cells", where=f"column {label_key!r} of its obs"
        )
    return labels


def _make_unknown_labels(cells: pd.Index, names: np.ndarray) -> pd.DataFrame:
    """The answer of `label_cells` for cells of which nothing is told; `names`: of the labels."""
    frame = pd.DataFrame(index=cells)
    frame["label"] = pd.Categorical(
        [UNKNOWN_LABEL] * len(frame), categories=[*names, UNKNOWN_LABEL]
    )
    frame["nearest_label"] = pd.Categorical([None] * len(frame), categories=names)
    frame["confidence"], frame["novelty"], frame["is_calibrated"] = 0.0, np.nan, False
    return frame


def _view_reference(
    trained_model: TrainedModel,
    reference: ComparedCells,
    known: Embedding,
    pattern: str,
    batch_size: int,
) -> np.ndarray:
    """z of the reference cells as if each had the modalities of a pattern, NaN where it lacks one.

    Of cells that are embedded already, those that carry more have no such z: it needs their counts.
    """
    if pattern in known.alone:
        alone = torch.from_numpy(known.alone[pattern])
        return trained_model.model.reweigh_as_joint(alone).numpy()
    sources = set(pattern.split("+"))
    carry_more = any(sources < set(cells.modalities) for cells in known.slices)
    if isinstance(reference, ReferenceCells) or not carry_more:
        same = known.name_patterns() == pattern
        return np.where(same[:, None], known.joint, np.nan)
    return embed_in_memory(
        trained_model,
        reference,
        batch_size,
        per_modality=False,
        with_variance=False,
        sources=sources,
    ).joint
