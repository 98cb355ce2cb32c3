"""Held-out pairs, scored by FOSCTTM: the number that stops training early and picks the best weights."""

from __future__ import annotations

from itertools import combinations
from typing import Any

import torch
from torch import Tensor

from clue_dist.data.batch import Batch
from clue_dist.matching import foscttm
from clue_dist.model.noise import Noise


def score(engine: Any, batch: Batch, paired: bool, noise: Noise) -> dict[str, float]:
    """{"score": smaller is better, ...} of the held-out cells, the same on every rank.

    With pairs: FOSCTTM (eq. 18) on L2-normalised z, averaged over pairs of modalities. Without: the loss.
    """
    engine.eval()
    with torch.no_grad():
        if paired:
            _, alone = engine(batch, None)
            values = _foscttms(batch, alone)
            values["score"] = sum(values.values()) / len(values)
        else:
            loss, _ = engine(batch, noise)
            values = {"score": float(loss)}
    engine.train()
    return values


def _foscttms(batch: Batch, alone: dict[str, Tensor]) -> dict[str, float]:
    out = {}
    for a, b in combinations(alone, 2):
        place = {m: {r: i for i, r in enumerate(batch.modalities[m].rows.tolist())} for m in (a, b)}
        both = sorted(place[a].keys() & place[b].keys())
        if len(both) > 1:
            u, v = (alone[m][[place[m][r] for r in both]] for m in (a, b))
            out[f"foscttm {a}-{b}"] = float(foscttm(u, v))
    return out
