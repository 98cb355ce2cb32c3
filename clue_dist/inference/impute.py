"""Imputes a modality: what a model expects of its features, given other modalities of the cells."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import anndata as ad
import numpy as np
import pandas as pd
import scipy.sparse as sp
import torch
from torch import Tensor

from clue_dist.data.batch import Batch, compute_library_size
from clue_dist.errors import DataError, ResumeError, list_names, name_argument
from clue_dist.inference.answer_files import PROVENANCE_KEY, require_answer_path, write_tables
from clue_dist.inference.array_folder import arrange_rows
from clue_dist.inference.cells import Cells, CellSlice, MemoryCells
from clue_dist.inference.cells.memory_obs import require_writable_obs
from clue_dist.inference.cells.named_counts import warn_of_cells
from clue_dist.inference.imputation_question import (
    COUNTS,
    LOG_SHARES,
    LOWER,
    MEAN,
    SAMPLE,
    SHARES,
    UPPER,
    VALUES,
    ImputationChoices,
    ImputationQuestion,
    plan_interval,
    read_question,
)
from clue_dist.inference.load_model import OTHER_CHECKPOINT, TrainedModel
from clue_dist.inference.matrix_files import MatrixFolder
from clue_dist.inference.output_files import make_scratch_folder
from clue_dist.inference.stream import read_slices_ahead
from clue_dist.model.imputation import (
    PER_TEN_THOUSAND,
    TargetLatent,
    infer_target_latent,
    keep_sources,
)
from clue_dist.ranks import Ranks
from clue_dist.store.shuffle import derive_key

IMPUTATION_FORMATS = (".h5ad", ".zarr")
SOURCES_COLUMN = "clue_from"  # of obs: the modalities that a cell's values follow from
VALUES_AT_ONCE = 2**24  # decoded of a piece of cells, over its draws: 64 MB


def impute_cells(
    trained_model: TrainedModel,
    cells: Cells,
    choices: ImputationChoices,
    batch_size: int = 4096,
    run: Path | str = "",
) -> ad.AnnData:
    """Impute a modality of cells, in memory.

    Args:
        trained_model: the model.
        cells: the cells.
        choices: what is asked for.
        batch_size: cells encoded at once.
        run: the run's folder, to be named in the answer.

    Returns:
        One row for each cell: means in X; `lower`, `upper` and `sample-0`, ... in layers, where
        they are asked for. Cells without counts get NaN, and zeros where `threshold` makes the
        matrices sparse.

    Raises:
        ConfigError: a modality, feature or batch that the model does not know.
        DataError: a cell has none of the modalities in `from_`.
        ResumeError: the model gives NaN.
    """
    question = read_question(trained_model, choices)
    slices = cells.slice_cells(batch_size)
    obs = _describe_cells(cells, slices, question)
    is_sparse = choices.threshold is not None
    parts: dict[str, list[Any]] = {name: [] for name in question.matrices}
    rows = []
    for piece_rows, found in impute_slices(question, cells, slices, Ranks()):
        rows.append(piece_rows)
        for name, values in found.items():
            parts[name].append(sp.csr_matrix(values) if is_sparse else values)
    order = np.concatenate(rows)
    matrices = {name: arrange_rows(part, order, cells.n_cells) for name, part in parts.items()}
    return build_answer(question, obs, matrices, run)


def write_imputation(
    trained_model: TrainedModel,
    cells: Cells,
    out: Path,
    choices: ImputationChoices,
    *,
    run: Path | str = "",
    batch_size: int = 4096,
    ranks: Ranks | None = None,
) -> int:
    """Impute a modality of cells into a file. All ranks call this.

    Args:
        trained_model: the model.
        cells: the cells.
        out: an .h5ad or a .zarr, which is replaced.
        choices: what is asked for.
        run: the run's folder, to be named in the answer.
        batch_size: cells encoded at once.
        ranks: this process among the others; by default it is alone.

    Returns:
        The number of cells.

    Raises:
        ClueError: what `impute_cells` raises; an unknown ending, no such folder, or a full disk.
    """
    ranks = ranks or Ranks()
    require_answer_path(out, IMPUTATION_FORMATS)
    if isinstance(cells, MemoryCells):
        require_writable_obs(cells.read_obs(), out.suffix)
    question = read_question(trained_model, choices)
    slices = cells.slice_cells(batch_size)
    obs = _describe_cells(cells, slices, question)
    share = slices[ranks.slice_for_rank(len(slices))]
    with make_scratch_folder(out, ranks) as scratch:
        folder = MatrixFolder(
            scratch, question.matrices, len(question.features), choices.threshold is not None
        )
        pieces = (found for _, found in impute_slices(question, cells, share, ranks))
        ranks.run_on_all(lambda: folder.write_share(pieces, ranks.rank))

        def write_answer() -> None:
            folder.arrays.join_shares(ranks.world)
            order = np.concatenate([cell_slice.rows for cell_slice in slices])
            matrices = {
                name: arrange_rows([folder.map_matrix(name, len(order))], order, cells.n_cells)
                for name in question.matrices
            }
            answer = build_answer(question, obs, matrices, run)
            write_tables(out, scratch / f"out{out.suffix}", answer)

        ranks.run_on_first(write_answer)
    return cells.n_cells


def build_answer(
    question: ImputationQuestion, obs: pd.DataFrame, matrices: dict[str, Any], run: Path | str
) -> ad.AnnData:
    """Put matrices together; `uns["clue_dist"]` says what made them."""
    choices, unit = question.choices, VALUES
    if question.has_counts:
        unit = SHARES if choices.library_size is None else COUNTS
    uns = {
        "run": str(run),
        "checkpoint": question.trained_model.name,
        "modality": choices.modality,
        "from": list(question.sources),
        "batch": dict(choices.batch) if isinstance(choices.batch, Mapping) else choices.batch,
        "unit": LOG_SHARES if choices.log1p else unit,
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
        uns={PROVENANCE_KEY: uns},
    )


def impute_slices(
    question: ImputationQuestion, cells: Cells, slices: Sequence[CellSlice], ranks: Ranks
) -> Iterator[tuple[np.ndarray, dict[str, np.ndarray]]]:
    """Impute slices of cells, piece by piece.

    Yields:
        Rows of the answer, (n,), and what goes there: (n, F) float32 by name of the matrix.
    """
    device = ranks.choose_device()
    trained_model, choices = question.trained_model, question.choices
    model = trained_model.model.to(device)
    piece = max(1, VALUES_AT_ONCE // (len(question.features) * max(1, question.n_draws)))
    modalities = list(trained_model.modalities)
    title = f"imputing {choices.modality}"
    levels_of_batch = question.choose_levels(cells.batches).to(device)
    for cell_slice, batch in read_slices_ahead(cells, slices, title, ranks):
        # A cell's draws follow from the seed and the slice alone, on any number of ranks.
        generator = torch.Generator(device)
        generator.manual_seed(derive_key(int(choices.seed), int(cell_slice.rows[0])) >> 1)
        with torch.inference_mode():
            shown = keep_sources(batch, modalities, question.sources).to(device)
            latent = infer_target_latent(model, shown, choices.modality)
            library = _find_library(question, batch).to(device)
            levels = levels_of_batch[shown.batch_code]  # -1, unknown, is the last
            for start in range(0, cell_slice.n_cells, piece):
                part = slice(start, start + piece)
                target = latent.select_rows(part)
                found = _impute_piece(question, target, levels[part], library[part], generator)
                rows = cell_slice.rows[part]
                yield rows, {name: _finish(question, values, rows) for name, values in found}


def _find_library(question: ImputationQuestion, batch: Batch) -> Tensor:
    """Total counts of each cell's profile of the modality, (B, 1), as asked or as measured."""
    size = question.choices.library_size
    if size is not None and not isinstance(size, str):
        return torch.full((batch.n_cells, 1), float(size))
    library = torch.full((batch.n_cells, 1), question.typical_library)
    measured = batch.modalities.get(question.choices.modality)
    if measured is not None and question.has_counts:
        library[measured.rows] = compute_library_size(measured.counts)[:, None]
    return library


def _impute_piece(
    question: ImputationQuestion,
    latent: TargetLatent,
    levels: Tensor,
    library: Tensor,
    generator: torch.Generator,
) -> Iterator[tuple[str, Tensor]]:
    """The matrices of some cells, (n, F), by name."""
    choices, decoder = question.choices, question.decoder
    # From counts of a profile to what is asked for.
    scale = torch.ones_like(library)
    if choices.library_size is None and question.has_counts:
        scale = PER_TEN_THOUSAND / library
    mean = decoder.compute_mean(latent.place_points(), levels, library, choices.log1p)
    yield MEAN, mean if choices.log1p else mean * scale
    if not question.n_draws:
        return
    # What is expected hardly depends on theta, and is told best by that which training found.
    decoder = replace(decoder, theta_shift=latent.theta_shift)
    draws = torch.empty(question.n_draws, len(levels), decoder.width, device=levels.device)
    for i in range(question.n_draws):
        z = latent.draw_sample(generator)
        draws[i] = decoder.draw_values(z, levels, library, generator)
    if choices.log1p:
        draws = torch.log1p(draws * (PER_TEN_THOUSAND / library))
    else:
        draws *= scale
    for i in range(choices.samples):
        yield f"{SAMPLE}{i}", draws[i].clone()
    if choices.interval is not None:
        n_draws, rank = plan_interval(choices.interval)
        draws = draws[:n_draws].sort(0).values
        yield LOWER, draws[rank - 1]
        yield UPPER, draws[n_draws - rank]


def _finish(question: ImputationQuestion, values: Tensor, rows: np.ndarray) -> np.ndarray:
    """Values as they are kept: on the CPU, finite, those below the threshold zero."""
    found = values.float().cpu().numpy()
    if not np.isfinite(found).all():
        raise ResumeError(
            "the model gives NaN or Inf",
            where=f"values of {question.choices.modality}, cells {rows[0]} to {rows[-1]}",
            fix=OTHER_CHECKPOINT,
        )
    threshold = question.choices.threshold
    if threshold is not None:
        found[np.abs(found) < threshold] = 0
    return np.asarray(found)


def _describe_cells(
    cells: Cells, slices: Sequence[CellSlice], question: ImputationQuestion
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
                where=name_argument("from_", list_names(question.sources)),
                got=f"{sum(s.n_cells for s in lacking):,} of {cells.n_cells:,} cells, such as "
                f"{list_names(obs.index[lacking[0].rows], 3)}, which have "
                f"{list_names(lacking[0].modalities)}",
                fix="leave it out, which takes whatever a cell has, or ask about the others: "
                f'`mdata[mdata.obsm["{question.sources[0]}"]]` of a MuData, '
                f"`clue impute --modalities {' '.join(question.sources)}` of a store",
            )
        names[cell_slice.rows] = "+".join(used)
    obs[SOURCES_COLUMN] = pd.Categorical(names)
    _warn_of_batches(obs, cells, question)
    return obs


def _warn_of_batches(obs: pd.DataFrame, cells: Cells, question: ImputationQuestion) -> None:
    """Warn where each cell's own batch is asked for, and the model knows that of no cell."""
    known = question.trained_model.batch_vocabulary
    found = set(obs["batch"].dropna()) if "batch" in obs else set()
    present = [name for name in cells.batches.names if name in found]
    shown = known.encode_levels(cells.batches.choose_batches(present))
    for number, covariate in enumerate(known.covariates):
        levels = known.list_levels(covariate)
        is_known = (shown[:, number] >= 0).any()
        if question.fixed_levels[number] is None and len(levels) > 1 and not is_known:
            what, many = (covariate, "levels") if known.has_several else ("batch", "batches")
            warn_of_cells(
                f"the model knows the {what} of no cell: values are averaged over its "
                f"{len(levels)} {many}; --batch-key at conversion, `batch_key=` in Python, names "
                f"the column of obs that holds the {what}"
            )
