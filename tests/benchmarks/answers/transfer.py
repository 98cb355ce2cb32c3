"""Labels carried to unseen cells: does their confidence tell the truth, are new types unknown?"""

from collections.abc import Iterator
from dataclasses import dataclass

import mudata as md
import numpy as np
from sklearn.metrics import roc_auc_score

from clue_dist.api.trained_run import Run as TrainedRun
from clue_dist.neighbours.label_transfer import UNKNOWN_LABEL, fit_label_transfer
from tests.benchmarks.mosaic import JOINT, Embedded
from tests.benchmarks.report import Result
from tests.benchmarks.scores import LABEL, NO_TYPES

BINS = 10  # of confidence
KEPT = 0.9  # of the cells of known types, where novelty is compared at one threshold
FEWEST_TESTED = 10  # cells of a type that is left out


@dataclass(frozen=True)
class LabelledCells:
    """The cells of a part of a split whose label names a type."""

    z: Embedded  # by source of z (N, D), NaN where a cell lacks the modality
    labels: np.ndarray  # (N,)

    @classmethod
    def embed_with(cls, run: TrainedRun, cells: md.MuData) -> "LabelledCells":
        """Embed cells as if all that they carry had been observed, or one modality alone."""
        sources = {JOINT: None} | {name: [name] for name in cells.mod}
        z = {
            source: np.asarray(run.embed(cells, modalities=observed, per_modality=False))
            for source, observed in sources.items()
        }
        labels = np.full(cells.n_obs, NO_TYPES[0], object)
        for table in cells.mod.values():
            labels[cells.obs_names.get_indexer(table.obs_names)] = table.obs[LABEL].astype(str)
        return cls(z, labels.astype(str)).select(~np.isin(labels, NO_TYPES))

    def select(self, chosen: np.ndarray) -> "LabelledCells":
        """Some of the cells, chosen by a mask (N,)."""
        return LabelledCells({name: z[chosen] for name, z in self.z.items()}, self.labels[chosen])


def score_transfer(
    reference: LabelledCells, queries: LabelledCells
) -> Iterator[tuple[str, Result]]:
    """Score labels carried from paired training cells, by what queries are seen through."""
    paired = reference.select(np.all([np.isfinite(z).all(1) for z in reference.z.values()], 0))
    for source in queries.z:
        yield (
            source,
            score_confidence(paired, queries, source) | score_novelty(paired, queries, source),
        )


def score_confidence(reference: LabelledCells, queries: LabelledCells, source: str) -> Result:
    """How often labels are right, how far confidence is from that, of types that are there."""
    fitted = fit_label_transfer(reference.z[JOINT], reference.labels, reference.z[source])
    found = fitted.assign_labels(queries.z[source])
    is_known = np.isin(queries.labels, reference.labels)
    is_right = (found["nearest_label"].astype(str) == queries.labels).to_numpy()[is_known]
    confidence = found["confidence"].to_numpy()[is_known]
    error = measure_calibration_error(confidence, is_right)
    return {"accuracy": float(is_right.mean()), "calibration_error": error}


def measure_calibration_error(confidence: np.ndarray, is_right: np.ndarray) -> float:
    """Expected calibration error: |confidence - share that is right|, mean over cells by bin."""
    bins = np.minimum((BINS * confidence).astype(int), BINS - 1)
    gaps = np.bincount(bins, confidence - is_right, BINS)
    return float(np.abs(gaps).sum() / len(bins))


def score_novelty(reference: LabelledCells, queries: LabelledCells, source: str) -> Result:
    """How well types are told that the reference lacks: means over types left out in turn.

    auroc: of novelty, between cells of the type and all others; unknown: the share of its cells
    that are called unknown; kept: the share of the others that are not; at_kept: the share of its
    cells that are more novel than 90% of the others.
    """
    types, counts = np.unique(queries.labels, return_counts=True)
    rows = []
    for name in types[(counts >= FEWEST_TESTED) & np.isin(types, reference.labels)]:
        rest = reference.select(reference.labels != name)
        fitted = fit_label_transfer(rest.z[JOINT], rest.labels, rest.z[source])
        found = fitted.assign_labels(queries.z[source])
        is_new = queries.labels == name
        is_old = np.isin(queries.labels, rest.labels)
        is_unknown = (found["label"] == UNKNOWN_LABEL).to_numpy()
        novelty = found["novelty"].to_numpy()
        compared = is_new | is_old
        rows.append(
            {
                "auroc": roc_auc_score(is_new[compared], novelty[compared]),
                "unknown": is_unknown[is_new].mean(),
                "kept": 1 - is_unknown[is_old].mean(),
                "at_kept": (novelty[is_new] > np.quantile(novelty[is_old], KEPT)).mean(),
            }
        )
    return {score: float(np.mean([row[score] for row in rows])) for score in rows[0]}
