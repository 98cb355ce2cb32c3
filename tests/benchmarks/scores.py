"""What an embedding is worth: matching, mixing, cell types; of cells that were not trained on."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path

import mudata as md
import numpy as np
import pandas as pd
import scipy.sparse as sp
from sklearn.model_selection import KFold, cross_val_score
from sklearn.neighbors import KNeighborsClassifier
from sklearn.preprocessing import normalize

from clue_dist.metrics import integration, matching, matching_controls
from clue_dist.neighbours.nearest import find_neighbours
from tests.benchmarks.mosaic import JOINT, Embedded, Split, ignore_warnings
from tests.benchmarks.report import Result
from tests.distributed.command import ROOT

CODE = (
    *(f"metrics/{name}.py" for name in ("matching", "matching_controls", "integration")),
    *("neighbours/nearest.py", "ranks/ranks.py"),
)
SOURCES = (Path(__file__), *(ROOT / "clue_dist" / name for name in CODE))
LABEL = "cell_type"
NO_TYPES = ("Mouse", "Multiplets", "T/Mono doublets", "Mis")  # labels that name no cell type
NEIGHBOURS, FIVE_PARTS = 15, KFold(5, shuffle=True, random_state=0)


def score_embedding(npz: Path, split: Split) -> Result:
    """Score the embedding of a split's test cells, rows as in test.h5mu.

    npz: with u1, u2, ..., (N, D) of each modality, or as `score_pairs` says; by source of z,
    perhaps test_SOURCE; and of the joint z of the training mosaic, mosaic (M, D), with the pattern
    of each cell (M,): islands, the worst of them. joint, alone: the accuracy of the joint z and of
    the better modality's own.
    """
    arrays, cells = dict(np.load(npz)), HeldOutCells.read_from(split)
    z = select_part(arrays, "test")
    found = {} if z and "u1" not in arrays else score_pairs(arrays, cells, split.mods)
    if "candidates" in found:
        return found
    if "u1" in arrays and not z:
        z = join_alone(split, arrays["u1"], arrays["u2"])
    if "mosaic" in arrays:
        near = find_neighbours(arrays["mosaic"], integration.MIXING_NEIGHBOURS)
        found["islands"] = max(integration.measure_islands(near, arrays["pattern"]).values())
    if LABEL not in cells.obs or not z:
        return found
    found |= score_labels(z, cells.obs)
    accuracy = dict(found["accuracy"])
    return found | {"joint": accuracy.pop(JOINT), "alone": max(accuracy.values())}


@dataclass(frozen=True)
class HeldOutCells:
    """What is known of the N test cells of a split."""

    obs: pd.DataFrame
    log_depth: dict[str, np.ndarray]  # by modality of counts, ln of the sum of counts, (N,)

    @classmethod
    def read_from(cls, split: Split) -> "HeldOutCells":
        """Read test.h5mu, in which all modalities have the cells in one order."""
        with ignore_warnings():
            table = md.read(split.test)
        counts = {m: table[m].X for m in split.mods if sp.issparse(table[m].X)}
        log_depth = {m: np.log(np.asarray(x.sum(1), float).ravel()) for m, x in counts.items()}
        return cls(table[split.mods[0]].obs, log_depth)


def score_pairs(
    arrays: Mapping[str, np.ndarray], cells: HeldOutCells, mods: Sequence[str]
) -> Result:
    """Score every ordered pair of modalities: means, and of more than two the worst pair.

    arrays: with u1, u2, ... of each modality; or, of a method that knows two, "rna-adt" and its
    like, both stacked.
    """
    pairs, table = list(combinations(mods, 2)), {}
    for first, second in pairs:
        u1, u2 = arrays.get(f"{first}-{second}", [None, None])
        u1 = arrays[f"u{mods.index(first) + 1}"] if u1 is None else u1
        u2 = arrays[f"u{mods.index(second) + 1}"] if u2 is None else u2
        found = score_profiles(u1, u2, cells, (first, second))
        if len(pairs) == 1:
            return found
        also = {name: found[name] for name in ("mixing", "transfer") if name in found}
        table[f"{first}->{second}"] = found["directed"]["forward"]["global"] | also
        table[f"{second}->{first}"] = found["directed"]["backward"]["global"] | also
    frame = pd.DataFrame(table).T
    worst, means = frame.min().to_dict(), frame.mean().to_dict()
    whole = {"global": {metric: means.pop(metric) for metric in matching.METRICS}}
    worst["foscttm"] = float(frame["foscttm"].max())
    return {"scores": whole, "pairs": table, "worst": worst} | means


def score_profiles(
    u1: np.ndarray, u2: np.ndarray, cells: HeldOutCells, pair: Sequence[str]
) -> Result:
    """Score the profiles of two modalities of the test cells, of the best candidate if several.

    u1, u2: (N, D), or (C, N, D) for C candidates, whose best by FOSCTTM counts.
    """
    known = "batch" in cells.obs
    batch = cells.obs["batch"].astype(str).to_numpy() if known else np.zeros(len(cells.obs))
    looks = [u.reshape(-1, *u.shape[-2:]) for u in (u1, u2)]
    directed = [matching.score_directions(a, b, batch) for a, b in zip(*looks, strict=True)]
    candidates = [matching.average_directions(scores) for scores in directed]
    best = int(np.argmin([scores["global"]["foscttm"] for scores in candidates]))
    first, second = (look[best] for look in looks)
    found: Result = {"scores": candidates[best], "directed": directed[best]}
    found |= integration.score_mixing(first, second)
    if LABEL in cells.obs:
        labels = np.where(*find_typed(cells.obs), "")
        found["transfer"] = integration.transfer_labels(first, second, labels)
        typed = integration.mark_labelled_cells(labels)
        profiles = (first[typed], second[typed], labels[typed])
        found["within_type"] = matching_controls.score_within_types(*profiles)
    if cells.log_depth.keys() >= set(pair):
        depths = np.stack([cells.log_depth[m] for m in pair], axis=1)
        found["without_depth"] = matching_controls.score_without_depth(first, second, depths)
    return found | ({"candidates": candidates} if len(candidates) > 1 else {})


def select_part(arrays: Mapping[str, np.ndarray], part: str) -> Embedded:
    """z of "train" or "test", by source."""
    names = [name for name in arrays if name.startswith(f"{part}_")]
    return {name.removeprefix(f"{part}_"): arrays[name] for name in names}


def join_alone(split: Split, *alone: np.ndarray) -> Embedded:
    """The joint z of who has none: the mean of its two; all are scaled to length 1."""
    scaled = [normalize(u) for u in alone]
    return {JOINT: normalize(sum(scaled))} | dict(zip(split.mods, scaled, strict=True))


def score_labels(z: Embedded, obs: pd.DataFrame) -> Result:
    """By source of z, of the test cells: accuracy of types, mixing of batches.

    `ilisi_random` is about batches that are dealt at random: perfect mixing.
    """
    keep, label = find_typed(obs)
    batch = obs["batch"].astype(str).to_numpy()[keep] if "batch" in obs else None
    found: Result = {"accuracy": {}, "ilisi": {}, "ilisi_random": {}}
    for source, x in z.items():
        found["accuracy"][source] = measure_accuracy(x[keep], label[keep])
        if batch is not None and len(set(batch)) > 1:
            near = find_neighbours(x[keep], integration.LISI_NEIGHBOURS)
            found["ilisi"][source] = integration.measure_ilisi(near, batch)
            dealt = integration.deal_batches(batch)
            found["ilisi_random"][source] = integration.measure_ilisi(near, dealt)
    return found


def find_typed(obs: pd.DataFrame) -> tuple[np.ndarray, np.ndarray]:
    """Which cells have a label that names a cell type, and the labels of all, (N,) each."""
    return ~obs[LABEL].isin(NO_TYPES).to_numpy(), obs[LABEL].astype(str).to_numpy()


def measure_accuracy(z: np.ndarray, labels: np.ndarray) -> float:
    """Share of cells whose label is their neighbours' majority, by 5-fold cross-validation."""
    return float(cross_val_score(KNeighborsClassifier(NEIGHBOURS), z, labels, cv=FIVE_PARTS).mean())


def score_neighbours(near: np.ndarray, obs: pd.DataFrame) -> Result:
    """The same accuracy by lists of neighbours, which tell no place of a cell, as a joint z does.

    near: (N, k), the test cells that are nearest to each, the nearest first. Of these the first 15
    count that have a type and are not tested in the same part.
    """
    typed, labels = find_typed(obs)
    codes, rows = np.unique(labels, return_inverse=True)[1], np.flatnonzero(typed)
    shares = []
    for fitted, tested in FIVE_PARTS.split(rows):
        usable = np.isin(np.arange(len(obs)), rows[fitted])
        chosen = [cells[usable[cells]][:NEIGHBOURS] for cells in near[rows[tested]]]
        votes = [np.bincount(codes[cells], minlength=1).argmax() for cells in chosen]
        shares.append(np.mean(votes == codes[rows[tested]]))
    return {"accuracy": {JOINT: float(np.mean(shares))}, "ilisi": {}}
