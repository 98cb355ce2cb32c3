"""Imputes a modality: what a model expects of its features, given other modalities of the cells."""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import anndata as ad
import numpy as np
import pandas as pd
import scipy.sparse as sp
import torch
from torch import Tensor

from clue_dist.data.batch import Batch, compute_library_size
from clue_dist.errors import ConfigError, DataError, ResumeError, list_names
from clue_dist.inference.cells import Cells, CellSlice
from clue_dist.inference.load_model import TrainedModel
from clue_dist.inference.stream import read_slices_ahead
from clue_dist.kinds import KINDS
from clue_dist.model.imputation import (
    PER_TEN_THOUSAND,
    TargetLatent,
    ValueDecoder,
    infer_target_latent,
    keep_sources,
)
from clue_dist.ranks import Ranks

OWN, AVERAGE = "own", "average"  # choices of a batch, beside the names of batches
MEAN, LOWER, UPPER, SAMPLE = "X", "lower", "upper", "sample-"  # matrices of an answer
SOURCES_COLUMN = "clue_from"  # of obs: the modalities that a cell's values follow from
# Draws of a cell and feature from which the interval is taken. With 99 draws and the value itself
# the ranks of 90% lie exactly between two draws.
INTERVAL_DRAWS = 99
MOST_VALUES = 2**24  # of a piece of cells that is decoded at once, over its draws: 64 MB


@dataclass(frozen=True)
class ImputationChoices:
    """What is asked for; see docs/answers.md."""

    modality: str  # whose values are asked for
    from_: Sequence[str] | None = None  # modalities to infer them from; None: all that a cell has
    batch: str = OWN  # name of a batch, "own" (of each cell, "average" where unknown), "average"
    features: Sequence[str] | None = None  # None: all
    # Total counts of the profile that is expected, or "own", those of each cell; None: expected
    # shares, per 10,000 counts.
    library_size: float | str | None = None
    log1p: bool = False  # E ln(1 + counts per 10,000) instead, as scanpy's log1p of a profile
    samples: int = 0  # draws of a profile, with the noise of counts
    interval: float | None = None  # share of draws in the central interval, such as 0.9
    threshold: float | None = None  # smaller values become zero, and the matrices sparse
    seed: int = 0


@dataclass(frozen=True)
class _Question:
    """The choices as numbers of the model."""

    choices: ImputationChoices
    trained_model: TrainedModel
    decoder: ValueDecoder
    sources: tuple[str, ...]
    features: list[str]
    fixed_code: int | None  # the batch for all cells, -1: averaged; None: each cell's own
    typical_library: float  # of training cells, where a cell's own is not known

    @property
    def has_counts(self) -> bool:
        """Whether values are counts, which can be shares and logarithms."""
        return not KINDS[self.trained_model.modalities[self.choices.modality].kind].real_values

    @property
    def matrices(self) -> list[str]:
        """Names of the matrices of the answer."""
        bounds = [LOWER, UPPER] if self.choices.interval is not None else []
        return [MEAN, *bounds, *(f"{SAMPLE}{i}" for i in range(self.choices.samples))]

    @property
    def n_draws(self) -> int:
        """Draws of each cell."""
        return max(
            self.choices.samples, INTERVAL_DRAWS if self.choices.interval is not None else 0
        )


def impute_cells(
    trained_model: TrainedModel,
    cells: Cells,
    choices: ImputationChoices,
    batch_size: int = 4096,
) -> ad.AnnData:
    """Impute a modality of cells, in memory.

    Args:
        trained_model: the model.
        cells: the cells.
        choices: what is asked for.
        batch_size: cells encoded at once.

    Returns:
        One row for each cell: means in X; `lower`, `upper` and `sample-0`, ... in layers, where
        they are asked for; NaN for cells without counts.

    Raises:
        ConfigError: a modality, feature or batch that the model does not know.
        DataError: a cell has none of the modalities in `from_`.
        ResumeError: the model gives NaN.
    """
    question = _read_question(trained_model, choices)
    slices = cells.slice_cells(batch_size)
    obs = _describe_cells(cells, slices, question)
    shape = cells.n_cells, len(question.features)
    is_sparse = choices.threshold is not None
    parts: dict[str, list[Any]] = {name: [] for name in question.matrices}
    rows = []
    for piece_rows, found in impute_slices(question, cells, slices, Ranks()):
        rows.append(piece_rows)
        for name, values in found.items():
            parts[name].append(sp.csr_matrix(values) if is_sparse else values)
    order = np.concatenate(rows)
    matrices = {name: _order_rows(part, order, shape) for name, part in parts.items()}
    return build_answer(question, obs, matrices)


def _order_rows(parts: list[Any], order: np.ndarray, shape: tuple[int, int]) -> Any:
    """Put the rows of pieces where they belong; NaN, or zeros if sparse, elsewhere."""
    if sp.issparse(parts[0]):
        stacked = sp.vstack(parts, format="csr")
        place = sp.csr_matrix(
            (np.ones(len(order), np.float32), (order, np.arange(len(order)))),
            shape=(shape[0], len(order)),
        )
        return (place @ stacked).tocsr()
    ordered = np.full(shape, np.nan, np.float32)
    first = 0
    for part in parts:
        ordered[order[first : first + len(part)]] = part
        first += len(part)
    return ordered


def build_answer(question: _Question, obs: pd.DataFrame, matrices: dict[str, Any]) -> ad.AnnData:
    """Put matrices together; `uns["clue_dist"]` says what made them."""
    choices = question.choices
    unit = "values"
    if question.has_counts:
        unit = "counts per 10,000" if choices.library_size is None else "counts"
    uns = {
        "checkpoint": question.trained_model.name,
        "modality": choices.modality,
        "from": list(question.sources),
        "batch": choices.batch,
        "unit": "ln(1 + counts per 10,000)" if choices.log1p else unit,
        "library_size": "" if choices.library_size is None else choices.library_size,
        "interval": 0.0 if choices.interval is None else choices.interval,
        "threshold": 0.0 if choices.threshold is None else choices.threshold,
        "seed": choices.seed,
    }
    return ad.AnnData(
        X=matrices[MEAN],
        obs=obs,
        var=pd.DataFrame(index=question.features),
        layers={name: values for name, values in matrices.items() if name != MEAN},
        uns={"clue_dist": uns},
    )


def impute_slices(
    question: _Question, cells: Cells, slices: Sequence[CellSlice], ranks: Ranks
) -> Iterator[tuple[np.ndarray, dict[str, np.ndarray]]]:
    """Impute slices of cells, piece by piece.

    Yields:
        Rows of the answer, (n,), and what goes there: (n, F) float32 by name of the matrix.
    """
    device = ranks.choose_device()
    trained_model, choices = question.trained_model, question.choices
    model = trained_model.model.to(device)
    piece = max(1, MOST_VALUES // (len(question.features) * max(1, question.n_draws)))
    modalities = list(trained_model.modalities)
    for cell_slice, batch in read_slices_ahead(cells, slices):
        # A cell's draws follow from the seed and the slice alone, on any number of ranks.
        generator = torch.Generator(device)
        generator.manual_seed(hash((choices.seed, int(cell_slice.rows[0]))) % 2**63)
        with torch.inference_mode():
            shown = keep_sources(batch, modalities, question.sources).to(device)
            latent = infer_target_latent(model, shown, choices.modality)
            library = _find_library(question, batch).to(device)
            code = shown.batch_code
            if question.fixed_code is not None:
                code = torch.full_like(code, question.fixed_code)
            for start in range(0, cell_slice.n_cells, piece):
                part = slice(start, start + piece)
                target = latent.select_rows(part)
                found = _impute_piece(question, target, code[part], library[part], generator)
                rows = cell_slice.rows[part]
                yield rows, {name: _finish(question, values, rows) for name, values in found}


def _find_library(question: _Question, batch: Batch) -> Tensor:
    """Total counts of each cell's profile of the modality, (B, 1), as asked or as measured."""
    size = question.choices.library_size
    if isinstance(size, (int, float)):
        return torch.full((batch.n_cells, 1), float(size))
    library = torch.full((batch.n_cells, 1), question.typical_library)
    measured = batch.modalities.get(question.choices.modality)
    if measured is not None and question.has_counts:
        library[measured.rows] = compute_library_size(measured.counts)[:, None]
    return library


def _impute_piece(
    question: _Question,
    latent: TargetLatent,
    code: Tensor,
    library: Tensor,
    generator: torch.Generator,
) -> Iterator[tuple[str, Tensor]]:
    """The matrices of some cells, (n, F), by name."""
    choices, decoder = question.choices, question.decoder
    # From counts of a profile to what is asked for.
    scale = torch.ones_like(library)
    if choices.library_size is None and question.has_counts:
        scale = PER_TEN_THOUSAND / library
    mean = decoder.compute_mean(latent.mean, code, library, choices.log1p)
    yield MEAN, mean if choices.log1p else mean * scale
    if not question.n_draws:
        return
    draws = torch.empty(question.n_draws, len(code), decoder.width, device=code.device)
    for i in range(question.n_draws):
        z = latent.draw_sample(generator)
        draws[i] = decoder.draw_values(z, code, library, generator)
    if choices.log1p:
        draws = torch.log1p(draws * (PER_TEN_THOUSAND / library))
    else:
        draws *= scale
    for i in range(choices.samples):
        yield f"{SAMPLE}{i}", draws[i].clone()
    if choices.interval is not None:
        draws = draws[:INTERVAL_DRAWS].sort(0).values
        below = round((INTERVAL_DRAWS + 1) * (1 - choices.interval) / 2) - 1
        yield LOWER, draws[max(below, 0)]
        yield UPPER, draws[INTERVAL_DRAWS - 1 - max(below, 0)]


def _finish(question: _Question, values: Tensor, rows: np.ndarray) -> np.ndarray:
    """Values as they are kept: on the CPU, finite, those below the threshold zero."""
    found = values.float().cpu().numpy()
    if not np.isfinite(found).all():
        raise ResumeError(
            "the model gives NaN or Inf",
            where=f"values of {question.choices.modality}, cells {rows[0]} to {rows[-1]}",
            fix="use another checkpoint (--checkpoint)",
        )
    threshold = question.choices.threshold
    if threshold is not None:
        found[np.abs(found) < threshold] = 0
    return np.asarray(found)


# --- what is asked for --------------------------------------------------------------------------


def _read_question(trained_model: TrainedModel, choices: ImputationChoices) -> _Question:
    """Check the choices, and look up what they name.

    Raises:
        ConfigError: the model does not know a modality, a feature or the batch; a share or a size
            out of range; shares or logarithms of real values.
    """
    known = trained_model.modalities
    for name in (choices.modality, *(choices.from_ or [])):
        _require_known(name, list(known), "modality")
    modality = known[choices.modality]
    features = list(choices.features) if choices.features is not None else modality.features
    places = {name: place for place, name in enumerate(modality.features)}
    for name in features:
        _require_known(name, modality.features, f"feature of {choices.modality}")
    if not features:
        raise ConfigError("no feature is asked for", where="features", got="an empty list")
    code = None if choices.batch == OWN else -1
    if choices.batch not in (OWN, AVERAGE):
        _require_known(choices.batch, trained_model.batches, "batch", f"{OWN}, {AVERAGE}")
        code = trained_model.batches.index(choices.batch)
    _check_numbers(choices, KINDS[modality.kind].real_values)
    numbers = torch.tensor([places[name] for name in features])
    decoder = ValueDecoder(
        trained_model.model,
        choices.modality,
        None if choices.features is None else numbers,
    )
    sources = tuple(name for name in known if choices.from_ is None or name in choices.from_)
    typical = trained_model.model.get_trunk(choices.modality).typical_library
    return _Question(choices, trained_model, decoder, sources, features, code, typical)


def _require_known(name: str, known: Sequence[str], what: str, others: str = "") -> None:
    """Require that the model knows a name; else name the nearest ones."""
    if name in known:
        return
    near = difflib.get_close_matches(name, known, n=3, cutoff=0.5)
    listed = list_names(known) or "none"
    raise ConfigError(
        f"the model knows no such {what}",
        got=name,
        expected=f"{others}, or one of {listed}" if others else listed,
        fix=f"did you mean {' or '.join(near)}?" if near else None,
    )


def _check_numbers(choices: ImputationChoices, real_values: bool) -> None:
    """Require numbers that mean something."""
    size, interval = choices.library_size, choices.interval
    is_size = size is None or size == OWN or (isinstance(size, (int, float)) and size > 0)
    if not is_size:
        raise ConfigError("no library size", got=size, expected=f"a number above 0, or {OWN!r}")
    if interval is not None and not 0 < interval < 1:
        raise ConfigError(
            "no share of an interval", got=interval, expected="a number between 0 and 1"
        )
    if choices.samples < 0:
        raise ConfigError("no number of samples", got=choices.samples, expected="0 or more")
    if real_values and (choices.log1p or size is not None):
        raise ConfigError(
            "real values have no library size",
            where=f"modality {choices.modality}",
            fix="leave library_size and log1p out",
        )


def _describe_cells(
    cells: Cells, slices: Sequence[CellSlice], question: _Question
) -> pd.DataFrame:
    """obs of the cells, with what each cell's values follow from.

    Raises:
        DataError: a cell has none of the sources.
    """
    obs = cells.read_obs()
    names = np.full(cells.n_cells, "", object)
    for cell_slice in slices:
        used = [name for name in question.sources if name in cell_slice.modalities]
        if not used:
            lacking = [s for s in slices if not set(s.modalities) & set(question.sources)]
            raise DataError(
                "cells have none of the modalities to impute from",
                where=f"from_={list(question.sources)}",
                got=f"{sum(s.n_cells for s in lacking):,} of {cells.n_cells:,} cells, such as "
                f"{list_names(obs.index[lacking[0].rows], 3)}, which have "
                f"{list_names(lacking[0].modalities)}",
                fix="leave `from_` out, which takes whatever a cell has, or ask about the others",
            )
        names[cell_slice.rows] = "+".join(used)
    obs[SOURCES_COLUMN] = pd.Categorical(names)
    return obs
