"""One modality of unseen cells told from another: ours and what is simpler, and their scores."""

from itertools import permutations
from pathlib import Path

import anndata as ad
import mudata as md
import numpy as np
import scipy.sparse as sp
from sklearn.linear_model import Ridge
from sklearn.neighbors import NearestNeighbors

from clue_dist.api.trained_run import Run as TrainedRun
from tests.benchmarks.factors import views
from tests.benchmarks.report import Result

COMPONENTS, NEIGHBOURS, RIDGE = 50, 25, 1.0
INTERVAL, DRAWS = 0.9, 99
MOST_CELLS, MOST_FEATURES = 500, 500  # whose intervals are judged
RIVALS = ("mean", "knn", "ridge")
IMPUTED = "imputed.npz"  # by scripts of `peers`: expected counts or shares, by direction


def score_run(run: TrainedRun, test: md.MuData) -> Result:
    """Scores of what a run imputes, by direction, such as "rna-adt"."""
    found = {}
    for source, target in permutations(test.mod, 2):
        predicted = predict_by_run(run, test, source, target)
        scores = score_prediction(predicted, log_normalise(test[target].X))
        covered = {"coverage": measure_coverage(run, test, source, target)}
        found[f"{source}-{target}"] = scores | covered
    return found


def score_rival(method: str, train: md.MuData, test: md.MuData) -> Result:
    """Scores of what the mean, kNN or ridge regression imputes, by direction."""
    found = {}
    for source, target in permutations(test.mod, 2):
        predicted = predict_simply(method, train, test, source, target)
        found[f"{source}-{target}"] = score_prediction(predicted, log_normalise(test[target].X))
    return found


def score_peer(folder: Path, test: md.MuData) -> Result:
    """Scores of what another model left in the folder of its run, by direction."""
    found = {}
    with np.load(folder / IMPUTED) as expected:
        for direction, values in expected.items():
            truth = log_normalise(test[direction.partition("-")[2]].X)
            found[direction] = score_prediction(log_normalise(values), truth)
    return found


def log_normalise(counts: np.ndarray | sp.spmatrix) -> np.ndarray:
    """ln(1 + counts per 10,000), (cells, features)."""
    x = np.asarray(counts.todense() if sp.issparse(counts) else counts, np.float64)
    return np.log1p(1e4 * x / np.maximum(x.sum(1, keepdims=True), 1e-9))


def select_pairs(train: md.MuData, source: str, target: str) -> tuple[ad.AnnData, ad.AnnData]:
    """The training cells that carry both, in one order."""
    names = train[source].obs_names
    names = names[names.isin(train[target].obs_names)]
    return train[source][names], train[target][names]


def predict_simply(
    method: str, train: md.MuData, test: md.MuData, source: str, target: str
) -> np.ndarray:
    """Log-normalised values of the target by a rival: the mean, kNN or ridge regression on pairs.

    Neighbours and predictors are in components of the source, fitted on all training cells.
    """
    inputs, outputs = select_pairs(train, source, target)
    values = log_normalise(outputs.X)
    if method == "mean":
        return np.repeat(values.mean(0, keepdims=True), test.n_obs, 0)
    _, queries = views.reduce_view(source, train[source].X, test[source].X, COMPONENTS)
    _, known = views.reduce_view(source, train[source].X, inputs.X, COMPONENTS)
    if method == "ridge":
        return np.asarray(Ridge(RIDGE).fit(known, values).predict(queries))
    k = min(NEIGHBOURS, len(known))
    near = NearestNeighbors(n_neighbors=k).fit(known).kneighbors(queries, return_distance=False)
    return np.stack([values[row].mean(0) for row in near])


def predict_by_run(run: TrainedRun, test: md.MuData, source: str, target: str) -> np.ndarray:
    """What a run expects of log-normalised values, which does not know the target at all."""
    answer = run.impute(md.MuData({source: test[source]}), target, log1p=True, min_known=0)
    assert isinstance(answer, ad.AnnData)
    return np.asarray(_align_columns(answer, test[target]).X)


def _align_columns(answer: ad.AnnData, cells: ad.AnnData) -> ad.AnnData:
    return answer[cells.obs_names, cells.var_names]


def score_prediction(predicted: np.ndarray, truth: np.ndarray) -> Result:
    """Pearson correlation by feature and by cell, means, and the root of the mean square error."""
    varied = truth.std(0) > 0
    return {
        "feature": float(np.mean(correlate(predicted[:, varied], truth[:, varied], axis=0))),
        "cell": float(np.mean(correlate(predicted, truth, axis=1))),
        "rmse": float(np.sqrt(np.mean((predicted - truth) ** 2))),
    }


def correlate(first: np.ndarray, second: np.ndarray, axis: int) -> np.ndarray:
    """Pearson correlation along an axis; 0 where one does not vary."""
    a, b = (x - x.mean(axis, keepdims=True) for x in (first, second))
    scale = np.sqrt((a**2).sum(axis) * (b**2).sum(axis))
    return (a * b).sum(axis) / np.maximum(scale, 1e-12)


def measure_coverage(run: TrainedRun, test: md.MuData, source: str, target: str) -> float:
    """The share of counts that lie in the central interval of their draws.

    Counts are few and many are 0, so that an interval with whole ends holds more than its share.
    So ties with draws are broken at random, as in the randomised PIT of Czado, Gneiting and Held
    (2009): if the model is right, counts rank among their draws uniformly.
    """
    rng = np.random.default_rng(0)
    cells = np.sort(rng.permutation(test.n_obs)[:MOST_CELLS])
    known = test[target].var_names[
        test[target].var_names.isin(run.trained_model.modalities[target].features)
    ]
    features = known[np.sort(rng.permutation(len(known))[:MOST_FEATURES])]
    part = md.MuData({m: test[m][cells].copy() for m in (source, target)})
    answer = run.impute(
        part,
        target,
        from_=[source],
        features=list(features),
        library_size="own",
        samples=DRAWS,
        min_known=0,
    )
    assert isinstance(answer, ad.AnnData)
    answer = answer[part[target].obs_names]
    truth = part[target][:, features].X
    truth = np.asarray(truth.todense() if sp.issparse(truth) else truth)
    draws = np.stack([answer.layers[f"sample-{i}"] for i in range(DRAWS)])
    return cover_truth(truth, draws, rng)


def cover_truth(truth: np.ndarray, draws: np.ndarray, rng: np.random.Generator) -> float:
    """The share of values (n, F) that lie in the central interval of draws (DRAWS, n, F)."""
    below, ties = (draws < truth).sum(0), (draws == truth).sum(0)
    rank = below + rng.integers(0, ties + 1)  # 0 to DRAWS
    outside = round((DRAWS + 1) * (1 - INTERVAL) / 2)
    return float(np.mean((rank >= outside) & (rank <= DRAWS - outside)))
