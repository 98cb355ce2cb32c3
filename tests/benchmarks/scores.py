"""What an embedding of unseen cells is worth, read from the `z.npz` that its run keeps."""

from __future__ import annotations

from pathlib import Path

import mudata as md
import numpy as np

from clue_dist import matching
from tests.benchmarks import common
from tests.benchmarks.common import Result
from tests.benchmarks.labels import score
from tests.benchmarks.mosaic import JOINT, Split, quiet
from tests.distributed.command import ROOT


def code() -> str:
    """Digest of what these scores follow from, embedding and cells aside."""
    files = (
        Path(__file__),
        Path(score.__file__),
        ROOT / "clue_dist/matching.py",
        ROOT / "clue_dist/ranks.py",
    )
    return common.digest(*files)


def of(npz: Path, split: Split) -> Result:
    """scores: how the modalities match, of the best candidate by FOSCTTM; candidates: of each, where there are
    several; joint, alone: how well the joint z tells labels, and the better of both modalities' own, where the file
    holds a joint z and the cells have labels.

    In the file: u1, u2, (N, D), or (C, N, D) for C candidates; test_joint, (N, D). Rows as in test.h5mu.
    """
    arrays = np.load(npz)
    u1, u2 = (arrays[name].reshape(-1, *arrays[name].shape[-2:]) for name in ("u1", "u2"))
    with quiet():
        obs = md.read(split.test)[split.mods[0]].obs
    batch = obs["batch"].astype(str).to_numpy() if "batch" in obs else np.zeros(len(obs))
    candidates = [matching.compute_scores(a, b, batch) for a, b in zip(u1, u2, strict=True)]
    out: Result = {"scores": min(candidates, key=lambda scores: scores["global"]["foscttm"])}
    if len(candidates) > 1:
        out["candidates"] = candidates
    if f"test_{JOINT}" in arrays and score.LABEL in obs:
        keep, label = score.typed(obs)
        joint, *alone = (
            score.accuracy(z[keep], label[keep]) for z in (arrays[f"test_{JOINT}"], u1[0], u2[0])
        )
        out |= {"joint": joint, "alone": max(alone)}
    return out
