"""Held-out pairs scored by FOSCTTM: it picks the weights that are kept, and can end training."""

from __future__ import annotations

import math
import statistics
from dataclasses import replace
from itertools import combinations

import numpy as np
import torch
from torch import Tensor

from clue_dist.checkpoint.run_folder import RunState
from clue_dist.data.batch import Batch
from clue_dist.matching import compute_nearer_share
from clue_dist.model.noise import Noise
from clue_dist.train.sinks import Sinks
from clue_dist.train.trainer import Trainer


def validate_model(
    trainer: Trainer, held_out: Batch | None, state: RunState, sinks: Sinks
) -> RunState:
    """Score the held-out cells and decide whether the present weights are the best so far.

    Scores within a standard error of the lowest cannot be told apart. The latest of them wins, as
    the steps that led to it were smaller.

    Returns:
        The state with the validation counted; `best_step` is the present step if these weights are
        to be kept.
    """
    if held_out is None:  # the last weights are the best that can be had
        return replace(state, best_step=state.step)
    values = score_held_out_cells(trainer, held_out)
    # Rank 0 decides: rounding may differ between ranks.
    score, error = trainer.ranks.run_on_first(lambda: (values["score"], values["error"]))
    if not math.isfinite(score):
        sinks.write_event("validation not finite", state.step, {"best_step": state.best_step})
        return replace(state, bad=state.bad + 1)
    is_lower = state.best is None or score < state.best
    lowest = score if state.best is None else min(score, state.best)
    state = replace(state, best=lowest, bad=0 if is_lower else state.bad + 1)
    if score <= lowest + error:
        state = replace(state, best_step=state.step)
    values = values | {"best": lowest, "best_step": state.best_step}
    sinks.write_numbers("validation", state.step, values)
    return state


def score_held_out_cells(trainer: Trainer, held_out: Batch) -> dict[str, float]:
    """Score the held-out cells; the same on every rank, but for rounding.

    With pairs the score is FOSCTTM (eq. 18) on L2-normalised z, averaged over pairs of modalities.
    Without, it is the loss, which is taken as exact.

    Returns:
        "score", of which smaller is better, "error", its standard error, and the FOSCTTM of every
        pair of modalities.
    """
    engine = trainer.engine
    engine.eval()
    with torch.no_grad():
        if trainer.setup.has_paired_cells:
            _, latents = engine(held_out, None)
            shares = _compute_nearer_shares(held_out, latents)
            values = {name: float(share.mean()) for name, share in shares.items()}
            values["score"] = statistics.fmean(values.values())
            # The pairs of modalities share their cells, so their errors do not average out.
            values["error"] = statistics.fmean(
                float(share.std()) / len(share) ** 0.5 for share in shares.values()
            )
        else:
            loss, _ = engine(held_out, _make_noise(trainer, held_out))
            values = {"score": float(loss), "error": 0.0}
    engine.train()
    return values


def _make_noise(trainer: Trainer, held_out: Batch) -> Noise:
    """The noise of a validation, the same at every step and on every rank."""
    shares = {"held out": held_out.n_cells}
    return Noise(trainer.setup.config.seed, 0, shares, lanes=1, device=held_out.observed.device)


def _compute_nearer_shares(batch: Batch, latents: dict[str, Tensor]) -> dict[str, np.ndarray]:
    """What each cell with both of a pair of modalities adds to FOSCTTM, (n cells,)."""
    shares = {}
    for first, second in combinations(latents, 2):
        rows = {
            modality: {
                cell: row for row, cell in enumerate(batch.modalities[modality].rows.tolist())
            }
            for modality in (first, second)
        }
        cells = sorted(rows[first].keys() & rows[second].keys())
        if len(cells) > 1:  # a single cell is always its own nearest
            pair = (
                latents[modality][[rows[modality][cell] for cell in cells]]
                for modality in (first, second)
            )
            shares[f"foscttm {first}-{second}"] = compute_nearer_share(*pair)
    return shares
