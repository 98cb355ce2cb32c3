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

from clue_dist import integration, matching, matching_controls
from clue_dist.neighbours import find_neighbours
from tests.benchmarks.mosaic import JOINT, Embedded, Split, ignore_warnings, list_pairs
from tests.benchmarks.report import Result
from tests.distributed.command import ROOT

CODE = ("matching.py", "matching_controls.py", "integration.py", "neighbours.py", "ranks/ranks.py")
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
    arrays, cells = dict(np.load(npz)), HeldOutCells.read_from(split)
    z, found = select_part(arrays, "test"), {}
    if "u1" in arrays:
        found = score_profiles(arrays["u1"], arrays["u2"], cells, split.mods)
        if "candidates" in found:
            return found
        alone = [arrays[name].reshape(-1, arrays[name].shape[-1]) for name in ("u1", "u2")]
        z = z or join_alone(split, *alone)
    return found | score_mosaic(arrays) | score_sources(arrays, z, cells, split)


def score_every_pair(folder: Path, split: Split) -> Result:
    """Score every ordered pair of a split's modalities, as `score_embedding` scores its only pair.

    Of a method that knows two modalities, a file for each pair is in the folder. scores, mixing,
    transfer: means over pairs; worst: of the worst pair.
    """
    cells, pairs = HeldOutCells.read_from(split), {}
    whole = folder / "z.npz"
    arrays = dict(np.load(whole)) if whole.exists() else {}
    for pair in combinations(split.mods, 2):
        part = arrays if arrays else dict(np.load(name_embedding(folder, split, pair)))
        names = [f"test_{m}" for m in pair] if arrays else ["u1", "u2"]
        found = score_profiles(*(part[name] for name in names), cells, pair)
        for direction, names in zip(matching.DIRECTIONS, (pair, pair[::-1]), strict=True):
            scores = found["directed"][direction]["global"]
            also = {name: found[name] for name in ("mixing", "transfer") if name in found}
            pairs["->".join(names)] = scores | also
    table = pd.DataFrame(pairs).T
    worst = {name: table[name].max() if name == "foscttm" else table[name].min() for name in table}
    means = table.mean().to_dict()
    found = {"pairs": pairs, "worst": worst}
    found["scores"] = {"global": {metric: means.pop(metric) for metric in matching.METRICS}}
    z = select_part(arrays, "test")
    return found | means | score_mosaic(arrays) | score_sources(arrays, z, cells, split)


def name_embedding(folder: Path, split: Split, pair: Sequence[str]) -> Path:
    """The file in which a method that knows two modalities leaves its embedding of a pair."""
    return folder / ("z.npz" if len(split.mods) == 2 else f"z-{'-'.join(pair)}.npz")


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
        sums = {m: np.asarray(x.sum(1), float).ravel() for m, x in counts.items()}
        return cls(table[split.mods[0]].obs, {m: np.log(total) for m, total in sums.items()})

    @property
    def batches(self) -> np.ndarray:
        """The batch of each cell; one for all where none is known."""
        known = "batch" in self.obs
        return self.obs["batch"].astype(str).to_numpy() if known else np.zeros(len(self.obs))


def score_profiles(
    first: np.ndarray, second: np.ndarray, cells: HeldOutCells, pair: Sequence[str]
) -> Result:
    """Score the profiles of two modalities of the test cells, of the best candidate if several.

    first, second: (N, D) or (C, N, D).
    """
    u1, u2 = (u.reshape(-1, *u.shape[-2:]) for u in (first, second))
    directed = [matching.score_directions(a, b, cells.batches) for a, b in zip(u1, u2, strict=True)]
    candidates = [matching.average_directions(scores) for scores in directed]
    best = int(np.argmin([scores["global"]["foscttm"] for scores in candidates]))
    found: Result = {"scores": candidates[best], "directed": directed[best]}
    found |= integration.score_mixing(u1[best], u2[best])
    if LABEL in cells.obs:
        labels = np.where(*find_typed(cells.obs), "")
        found["transfer"] = integration.transfer_labels(u1[best], u2[best], labels)
        known = integration.mark_labelled_cells(labels)
        typed = (u1[best][known], u2[best][known], labels[known])
        found["within_type"] = matching_controls.score_within_types(*typed)
    if cells.log_depth.keys() >= set(pair):
        depths = np.stack([cells.log_depth[m] for m in pair], axis=1)
        without = matching_controls.score_without_depth(u1[best], u2[best], depths)
        found["without_depth"] = without
    return found | ({"candidates": candidates} if len(candidates) > 1 else {})


def score_mosaic(arrays: Mapping[str, np.ndarray]) -> Result:
    """The worst island in the joint z of a training mosaic, where it was kept."""
    if "mosaic" not in arrays:
        return {}
    near = find_neighbours(arrays["mosaic"], integration.MIXING_NEIGHBOURS)
    return {"islands": max(integration.measure_islands(near, arrays["pattern"]).values())}


def score_sources(
    arrays: Mapping[str, np.ndarray], z: Embedded, cells: HeldOutCells, split: Split
) -> Result:
    """How labels are told by z, by its source, where there are labels and a joint z."""
    if LABEL not in cells.obs or not z:
        return {}
    known, known_obs = select_part(arrays, "train"), cells.obs
    if known:
        with ignore_warnings():
            first = md.read(split.train)[split.mods[0]]
        known_obs = first.obs.loc[list_pairs(split, "train")]
    found = score_labels(z, known, cells.obs, known_obs)
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


def score_neighbours(near: np.ndarray, cells: HeldOutCells) -> Result:
    """Accuracy of types by lists of neighbours, which tell no place of a cell, as of a z.

    near: (N, k), the test cells that are nearest to each, the nearest first. The folds are those of
    `measure_accuracy`; of neighbours the nearest 15 count that have a type and are not of the fold.
    """
    typed, labels = find_typed(cells.obs)
    codes, rows = np.unique(labels, return_inverse=True)[1], np.flatnonzero(typed)
    shares = []
    for _, tested in KFold(5, shuffle=True, random_state=0).split(rows):
        usable = typed.copy()
        usable[rows[tested]] = False
        chosen = [near[row][usable[near[row]]][:NEIGHBOURS] for row in rows[tested]]
        votes = [np.bincount(codes[cells]).argmax() if len(cells) else -1 for cells in chosen]
        shares.append(np.mean(votes == codes[rows[tested]]))
    accuracy = {JOINT: float(np.mean(shares))}
    return {"accuracy": accuracy, "transferred": {}, "ilisi": {}}


def measure_transfer(
    known: np.ndarray, known_labels: np.ndarray, z: np.ndarray, labels: np.ndarray
) -> float:
    """The same, with neighbours among other cells whose labels are known."""
    return float(KNeighborsClassifier(NEIGHBOURS).fit(known, known_labels).score(z, labels))
