"""Teaches a trained model batches that it does not know, and changes nothing else of it.

The batch enters the decoders alone, each level of a covariate by a row of an embedding. With
encoders frozen, z of a cell is a constant, so that the rows of new levels are quickly found by
gradient steps on ln p(x_k | z_k, batch) (eq. 8) of the new cells. A new combination of levels that
are known needs no row, and is no new batch. As in scArches, all other weights stay bit for bit,
and the embedding of any cell does not move at all.
"""

from __future__ import annotations

import copy
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn

from clue_dist.checkpoint.model_card import read_model_card
from clue_dist.data.batch import Batch
from clue_dist.errors import ConfigError, DataError, format_count, list_names
from clue_dist.inference.cells import Cells, CellSlice
from clue_dist.inference.cells.memory_obs import NAME_BATCHES
from clue_dist.inference.export import CardTexts, require_new_folder, write_model_folder
from clue_dist.inference.load_model import TrainedModel, require_weights
from clue_dist.inference.reference_cells import REFERENCE_FILE, collect_reference
from clue_dist.model.clue import CLUE
from clue_dist.model.decoders import Decoder
from clue_dist.process import print_line
from clue_dist.progress import show_progress
from clue_dist.ranks import Ranks
from clue_dist.store.batch_vocabulary import UNKNOWN, BatchVocabulary

LEARNING_RATE = 0.05
STEP_CELLS = 512  # of a gradient step
STEPS = 300  # about so many, however many cells there are
TEACHING_CELLS = 20_000  # of new batches, about so many: a row has few numbers to be found


@dataclass(frozen=True)
class TunedBatches:
    """What came of new batches."""

    names: list[str]  # of the new batches
    n_cells: int  # cells that taught them
    gain: float  # nats that a cell's profiles became likelier, on average


def tune_batches(run: Path, trained_model: TrainedModel, cells: Cells, out: Path) -> TunedBatches:
    """Teach a model the new batches of some cells, write it into a folder, and say so.

    Args:
        run: folder of the model, a run or a shared one.
        trained_model: the model.
        cells: cells of new batches, and perhaps of others, which are left aside.
        out: the folder to make, as `export_run` makes it.

    Raises:
        DataError: no cell is of a new batch.
        ConfigError: the decoders do not ask for the batch; something is at `out`; a launcher
            started several processes.
        StoreError: the disk is full, or refuses to be written.
    """
    Ranks.from_environment().require_alone("new batches are learnt by one process")
    require_new_folder(out)
    tuned, report = learn_batches(trained_model, cells)
    vocabulary = tuned.batch_vocabulary
    batches = {"batches": vocabulary.names, "batch_covariates": vocabulary.list_covariates()}
    card = read_model_card(run).model_copy(update=batches)
    weights_folder = require_weights(run, trained_model.name)
    texts = CardTexts(data=f"Batches that were learnt later: {list_names(report.names, 20)}.")
    weights = tuned.model.state_dict()
    reference = None
    if (run / REFERENCE_FILE).is_file():  # their z is what it was
        reference = collect_reference(run / REFERENCE_FILE, trained_model)
    write_model_folder(
        out,
        run,
        weights_folder,
        weights,
        tuned.config,
        card,
        texts=texts,
        reference=reference,
    )
    print_line(
        f"{format_count(len(report.names), 'new batch', 'new batches')} of "
        f"{format_count(report.n_cells, 'cell')}: profiles became "
        f"{report.gain:.4g} nats likelier, z of every cell is what it was"
    )
    return report


def learn_batches(trained_model: TrainedModel, cells: Cells) -> tuple[TrainedModel, TunedBatches]:
    """Teach a copy of a model the new batches of some cells.

    Args:
        trained_model: the model, which stays as it is.
        cells: the cells; `batch` of their obs names their batches.

    Raises:
        DataError: no cell is of a new batch.
        ConfigError: the decoders do not ask for the batch.
    """
    obs, known = cells.read_obs(), trained_model.batch_vocabulary
    batches = obs["batch"].astype(object) if "batch" in obs else pd.Series("", index=obs.index)
    slices = cells.slice_cells(STEP_CELLS)
    # Cells without counts are in no slice, and teach nothing.
    shown = batches.iloc[np.concatenate([s.rows for s in slices])] if slices else batches[:0]
    names = _list_new_batches(cells.batches, known, set(shown.dropna()))
    if not names:
        raise DataError(
            "no cell is of a batch that the model does not know",
            got=list_names(dict.fromkeys(batches.dropna()), 5) or "no batch at all",
            expected=f"batches other than {list_names(known.names, 5)}",
            fix=NAME_BATCHES,
        )
    model = copy.deepcopy(trained_model.model)
    vocabulary, added = known.add_batches(cells.batches.choose_batches(names))
    rows = [_add_rows(decoder, known, vocabulary) for decoder in _list_decoders(model)]
    codes = batches.map(dict(zip(names, added, strict=True)))
    new_codes = codes.fillna(-1).to_numpy(np.int64)
    examples = _read_new_cells(model, cells, _choose_slices(slices, new_codes), new_codes)
    before = _score_cells(model, examples)
    _train_rows(model, rows, examples, len(known.number_levels()))
    gain = _score_cells(model, examples) - before
    n_cells = sum(int((batch.batch_code >= 0).sum()) for batch, _ in examples)
    tuned = replace(trained_model, model=model.eval(), batch_vocabulary=vocabulary)
    return tuned, TunedBatches(vocabulary.names[len(known.names) :], n_cells, gain)


def _list_new_batches(
    batches: BatchVocabulary, known: BatchVocabulary, present: Collection[str]
) -> list[str]:
    """List the batches, of those present, of which the model lacks a level that is known."""
    levels, matched = known.encode_levels(batches), known.match_covariates(batches)
    is_new = np.zeros(len(batches.names), bool)
    for column, covariate in enumerate(known.covariates):
        if covariate in matched:
            named = np.array(batches.covariates[matched[covariate]], object) != UNKNOWN
            is_new |= named & (levels[:, column] < 0)
    return sorted(
        name for name, new in zip(batches.names, is_new, strict=True) if new and name in present
    )


def _list_decoders(model: CLUE) -> list[Decoder]:
    """List the decoders, in the order of the modalities."""
    return [model.get_decoder(name) for name in model.modalities]


def _add_rows(
    decoder: Decoder, known: BatchVocabulary, vocabulary: BatchVocabulary
) -> nn.Parameter:
    """Add rows for new levels, which begin as the mean of those of the covariate that are known.

    Args:
        decoder: to be changed.
        known: the batches that it knows.
        vocabulary: those that it is to know, the known ones first.

    Returns:
        All rows, (levels, width).

    Raises:
        ConfigError: the decoder was trained on one batch, and does not ask for it.
    """
    if decoder.batch is None:
        raise ConfigError(
            "the model was trained on a single batch: its decoders have no place for others",
            fix="train all weights on old and new cells together: clue fine-tune --train all",
        )
    before, numbers = decoder.batch.weight.detach(), known.number_levels()
    means = {
        covariate: before[[numbers[covariate, level] for level in known.list_levels(covariate)]]
        for covariate in known.covariates
    }
    added = [
        means[covariate].mean(0)
        for covariate, level in vocabulary.number_levels()
        if (covariate, level) not in numbers
    ]
    rows = nn.Parameter(torch.stack([*before, *added]))
    decoder.set_levels(torch.from_numpy(vocabulary.encode_levels(vocabulary)))
    decoder.batch = nn.Embedding(*rows.shape)
    decoder.batch.weight = rows
    return rows


def _choose_slices(slices: Sequence[CellSlice], new_codes: np.ndarray) -> list[CellSlice]:
    """Choose slices with TEACHING_CELLS or so of new batches, and with some cells of each batch."""
    codes = np.unique(new_codes[new_codes >= 0])
    most, chosen = max(1, TEACHING_CELLS // len(codes)), set()
    for code in codes:
        shares = [int((new_codes[s.rows] == code).sum()) for s in slices]
        holding = np.flatnonzero(shares)
        chosen.update(holding[:: max(1, sum(shares) // most)].tolist())
    return [slices[number] for number in sorted(chosen)]


@torch.no_grad()
def _read_new_cells(
    model: CLUE, cells: Cells, slices: Sequence[CellSlice], new_codes: np.ndarray
) -> list[tuple[Batch, Tensor]]:
    """Read slices that hold cells of new batches, and infer the z of their cells.

    Args:
        model: the model.
        cells: the cells.
        slices: those to read.
        new_codes: (N,), the code of each new batch, -1 of cells that are left aside.

    Returns:
        Slices of cells, and the posterior mean of z of each, (n, K, d).
    """
    read = []
    for cell_slice in slices:
        batch = cells.read_slice(cell_slice)
        batch = replace(batch, batch_code=torch.from_numpy(new_codes[cell_slice.rows]))
        read.append((batch, model.infer_batch(batch).joint_mean))
    return read


def _compute_likelihood(model: CLUE, batch: Batch, z: Tensor) -> Tensor:
    """Sum ln p(x_k | z_k) of the cells of new batches over their modalities, (), in nats."""
    total = z.new_zeros(())
    for k, name in enumerate(model.modalities):
        if name in batch.modalities:
            observed = batch.modalities[name]
            codes = batch.batch_code[observed.rows]
            ln_p = model.get_decoder(name)(z[observed.rows, k], codes, observed.counts)
            total = total + ln_p[codes >= 0].sum()
    return total


@torch.no_grad()
def _score_cells(model: CLUE, slices: list[tuple[Batch, Tensor]]) -> float:
    """Compute the mean over cells of ln p of their profiles, in nats."""
    n_cells = sum(int((batch.batch_code >= 0).sum()) for batch, _ in slices)
    total = sum(float(_compute_likelihood(model, batch, z)) for batch, z in slices)
    return total / max(n_cells, 1)


def _train_rows(
    model: CLUE,
    rows: list[nn.Parameter],
    slices: list[tuple[Batch, Tensor]],
    n_known: int,
) -> None:
    """Find the rows of new batches; those of known ones get no gradient and stay bit for bit."""
    optimizer = torch.optim.Adam(rows, lr=LEARNING_RATE)
    order, n_rounds = np.random.default_rng(0), -(-STEPS // len(slices))
    steps = np.concatenate([order.permutation(len(slices)) for _ in range(n_rounds)])
    with show_progress("learning batches", len(steps), unit="step") as progress:
        for number in steps:
            batch, z = slices[number]
            loss = -_compute_likelihood(model, batch, z) / batch.n_cells
            gradients = torch.autograd.grad(loss, rows, allow_unused=True)
            for row, gradient in zip(rows, gradients, strict=True):
                row.grad = torch.zeros_like(row) if gradient is None else gradient
                row.grad[:n_known] = 0
            optimizer.step()
            progress.mark_done()
