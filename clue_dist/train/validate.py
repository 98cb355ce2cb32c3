"""Held-out pairs, scored by FOSCTTM: the number that picks the weights, and can stop training early."""

from __future__ import annotations

import statistics
from itertools import combinations
from typing import Any

import numpy as np
import torch
from torch import Tensor

from clue_dist.data.batch import Batch
from clue_dist.matching import compute_nearer_share
from clue_dist.model.noise import Noise


def score_held_out_cells(engine: Any, batch: Batch, paired: bool, noise: Noise) -> dict[str, float]:
    """{"score": smaller is better, "error": its standard error, ...} of the held-out cells, the same on every rank.

    With pairs: FOSCTTM (eq. 18) on L2-normalised z, averaged over pairs of modalities. Without: the loss, which is
    taken as exact.
    """
    engine.eval()
    with torch.no_grad():
        if paired:
            _, alone = engine(batch, None)
            nearer = _nearer(batch, alone)
            values = {name: float(each.mean()) for name, each in nearer.items()}
            values["score"] = statistics.fmean(values.values())
            # The pairs of modalities share their cells, so their errors do not average out.
            values["error"] = statistics.fmean(
                float(each.std()) / len(each) ** 0.5 for each in nearer.values()
            )
        else:
            loss, _ = engine(batch, noise)
            values = {"score": float(loss), "error": 0.0}
    engine.train()
    return values


def _nearer(batch: Batch, alone: dict[str, Tensor]) -> dict[str, np.ndarray]:
    """What each cell with both of a pair of modalities adds to its FOSCTTM, (n,)."""
    out = {}
    for a, b in combinations(alone, 2):
        place = {m: {r: i for i, r in enumerate(batch.modalities[m].rows.tolist())} for m in (a, b)}
        both = sorted(place[a].keys() & place[b].keys())
        if len(both) > 1:
            u, v = (alone[m][[place[m][r] for r in both]] for m in (a, b))
            out[f"foscttm {a}-{b}"] = compute_nearer_share(u, v)
    return out
