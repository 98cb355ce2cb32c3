"""What an embedding is worth: matching, mixing, cell types; of cells that were not trained on."""

from collections.abc import Mapping
from pathlib import Path

import mudata as md
import numpy as np
import pandas as pd
from sklearn.model_selection import KFold, cross_val_score
from sklearn.neighbors import KNeighborsClassifier
from sklearn.preprocessing import normalize

from clue_dist import integration, matching
from clue_dist.neighbours import find_neighbours
from tests.benchmarks.mosaic import JOINT, Embedded, Split, ignore_warnings, list_pairs
from tests.benchmarks.report import Result
from tests.distributed.command import ROOT

CODE = ("matching.py", "integration.py", "neighbours.py", "ranks/ranks.py")
SOURCES = (Path(__file__), *(ROOT / "clue_dist" / name for name in CODE))
LABEL = "cell_type"
NO_TYPES = ("Mouse", "Multiplets", "T/Mono doublets", "Mis")  # labels that name no cell type
NEIGHBOURS = 15


def score_embedding(npz: Path, split: Split) -> Result:
    """Score the embedding of a split's test cells, rows as in test.h5mu.

    npz: with u1, u2, (N, D), or (C, N, D) for C candidates, whose best by FOSCTTM counts; and, by
    source of z, perhaps test_SOURCE and train_SOURCE, of test and of paired training cells. joint,
    alone: the accuracy of the joint z and of the better modality's own. Of the joint z of the
    training mosaic, mosaic (M, D), with the pattern of each cell (M,): islands, the worst of them.
    """
    arrays, (first, _), found = dict(np.load(npz)), split.mods, {}
    with ignore_warnings():
        obs = md.read(split.test)[first].obs
    z, known = (select_part(arrays, part) for part in ("test", "train"))
    if "u1" in arrays:
        u1, u2 = (arrays[name].reshape(-1, *arrays[name].shape[-2:]) for name in ("u1", "u2"))
        batch = obs["batch"].astype(str).to_numpy() if "batch" in obs else np.zeros(len(obs))
        candidates = [matching.compute_scores(a, b, batch) for a, b in zip(u1, u2, strict=True)]
        best = int(np.argmin([scores["global"]["foscttm"] for scores in candidates]))
        found["scores"] = candidates[best]
        found |= integration.score_mixing(u1[best], u2[best])
        if LABEL in obs:
            labels = np.where(*find_typed(obs), "")
            found["transfer"] = integration.transfer_labels(u1[best], u2[best], labels)
        if len(candidates) > 1:
            return found | {"candidates": candidates}
        z = z or join_alone(split, u1[0], u2[0])
    if "mosaic" in arrays:
        near = find_neighbours(arrays["mosaic"], integration.MIXING_NEIGHBOURS)
        found["islands"] = max(integration.measure_islands(near, arrays["pattern"]).values())
    if LABEL not in obs:
        return found
    known_obs = obs
    if known:
        with ignore_warnings():
            known_obs = md.read(split.train)[first].obs.loc[list_pairs(split, "train")]
    found |= score_labels(z, known, obs, known_obs)
    accuracy = dict(found["accuracy"])
    return found | {"joint": accuracy.pop(JOINT), "alone": max(accuracy.values())}


def select_part(arrays: Mapping[str, np.ndarray], part: str) -> Embedded:
    """z of "train" or "test", by source."""
    names = [name for name in arrays if name.startswith(f"{part}_")]
    return {name.removeprefix(f"{part}_"): arrays[name] for name in names}


def join_alone(split: Split, *alone: np.ndarray) -> Embedded:
    """The joint z of who has none: the mean of its two; all are scaled to length 1."""
    scaled = [normalize(u) for u in alone]
    return {JOINT: normalize(sum(scaled))} | dict(zip(split.mods, scaled, strict=True))


def score_labels(
    z: Embedded, known: Embedded, obs: pd.DataFrame, known_obs: pd.DataFrame
) -> Result:
    """By source of z: accuracy of types, the same from training cells, mixing of batches.

    z, obs: of the test cells; known, known_obs: of the paired training cells.
    """
    (keep, label), (known_keep, known_label) = map(find_typed, (obs, known_obs))
    batch = obs["batch"].astype(str).to_numpy()[keep] if "batch" in obs else None
    found: Result = {"accuracy": {}, "transferred": {}, "ilisi": {}}
    for source, x in z.items():
        found["accuracy"][source] = measure_accuracy(x[keep], label[keep])
        if source in known:
            cells = known[source][known_keep], known_label[known_keep]
            found["transferred"][source] = measure_transfer(*cells, x[keep], label[keep])
        if batch is not None and len(set(batch)) > 1:
            near = find_neighbours(x[keep], integration.LISI_NEIGHBOURS)
            found["ilisi"][source] = integration.measure_ilisi(near, batch)
    return found


def find_typed(obs: pd.DataFrame) -> tuple[np.ndarray, np.ndarray]:
    """Which cells have a label that names a cell type, and the labels of all, (N,) each."""
    return ~obs[LABEL].isin(NO_TYPES).to_numpy(), obs[LABEL].astype(str).to_numpy()


def measure_accuracy(z: np.ndarray, labels: np.ndarray) -> float:
    """Share of cells whose label is their neighbours' majority, by 5-fold cross-validation."""
    folds = KFold(5, shuffle=True, random_state=0)
    return float(cross_val_score(KNeighborsClassifier(NEIGHBOURS), z, labels, cv=folds).mean())


def measure_transfer(
    known: np.ndarray, known_labels: np.ndarray, z: np.ndarray, labels: np.ndarray
) -> float:
    """The same, with neighbours among other cells whose labels are known."""
    return float(KNeighborsClassifier(NEIGHBOURS).fit(known, known_labels).score(z, labels))
