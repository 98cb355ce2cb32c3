"""Where training starts: statistics of a random sample of cells set the projections and the decoders' offsets.

A store is globally shuffled, so its first cells are a random draw: the cost does not grow with the atlas.
"""

from __future__ import annotations

import numpy as np
import scipy.sparse as sp
import torch
from torch import Tensor

from clue_dist.data.batch import Counts, SparseCounts
from clue_dist.model.clue import CLUE
from clue_dist.model.decoders import Decoder
from clue_dist.model.trunk import Projection, Trunk, normalise
from clue_dist.store.reader import Store

MAX_CELLS = 20_000  # of each modality
MAX_NONZEROS = 40_000_000  # bounds memory and time where profiles are long


@torch.no_grad()
def initialise(model: CLUE, store: Store, n_train: dict[str, int], svd: bool, seed: int) -> None:
    """Set TF-IDF weights, projections and decoder offsets from training cells.

    n_train: how many cells of each stratum, from its beginning, may be looked at.
    """
    for name in model.names:
        counts = sample(store, n_train, name)
        trunk, decoder = model.trunk(name), model.decoder(name)
        detected = _column_sums(counts, lambda v: (v > 0).astype(np.float64))
        n = counts.shape[0]
        trunk.idf.copy_(torch.from_numpy(n / np.maximum(detected, 1)))
        values = _normalised(counts, trunk)
        mean, scale = _moments(values)
        if trunk.how == "tfidf":  # latent semantic indexing works on the values as they are
            mean, scale = np.zeros_like(mean), np.ones_like(scale)
        if svd:
            _set_projection(trunk.projection, values, mean, scale, seed)
        _set_offsets(decoder, counts)


def sample(store: Store, n_train: dict[str, int], modality: str) -> sp.csr_matrix | np.ndarray:
    """Raw counts of a random sample of training cells that carry the modality, as (n, features)."""
    having = {s: n for s, n in n_train.items() if modality in store.strata[s].modalities}
    total = sum(having.values())
    limit = min(MAX_CELLS, total)
    parts = []
    for name, n in having.items():
        reader = store.strata[name]
        # A block holds at most `capacity` non-zeros, so this many cells cannot go beyond the stratum's share of them.
        most = MAX_NONZEROS * n / total * reader.block_cells / max(reader.stratum.packed[modality].capacity, 1)
        rows = reader.rows(modality, np.arange(max(1, min(n, round(limit * n / total), int(most)))))
        parts.append(rows if isinstance(rows, np.ndarray) else rows.scipy())
    if isinstance(parts[0], np.ndarray):
        return np.concatenate(parts).astype(np.float64)
    return sp.vstack(parts, format="csr")


def _normalised(counts: sp.csr_matrix | np.ndarray, trunk: Trunk) -> sp.csr_matrix | np.ndarray:
    got = normalise(_counts(counts), trunk.how, trunk.idf.float())
    if isinstance(got, Tensor):
        return got.double().numpy()
    arrays = (got.values.double().numpy(), got.indices.numpy(), got.indptr.numpy())
    return sp.csr_matrix(arrays, shape=counts.shape)


def _counts(x: sp.csr_matrix | np.ndarray) -> Counts:
    if isinstance(x, np.ndarray):
        return torch.from_numpy(x).float()
    indptr, indices = x.indptr.astype(np.int32), x.indices.astype(np.int32)
    values = torch.from_numpy(x.data.astype(np.float32))
    return SparseCounts(torch.from_numpy(indptr), torch.from_numpy(indices), values, x.shape[1])


def _column_sums(x, of):  # type: ignore[no-untyped-def]
    if isinstance(x, np.ndarray):
        return of(x).sum(0)
    return np.bincount(x.indices, weights=of(x.data), minlength=x.shape[1])


def _moments(x: sp.csr_matrix | np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Mean and standard deviation of each column."""
    n = x.shape[0]
    mean = _column_sums(x, lambda v: v) / n
    variance = _column_sums(x, np.square) / n - mean**2
    return mean, np.sqrt(np.maximum(variance, 1e-12))


def _set_projection(
    projection: Projection, x: sp.csr_matrix | np.ndarray, mean: np.ndarray, scale: np.ndarray, seed: int
) -> None:
    """Loadings V of the standardised sample: z = ((x - mean) / scale) V, folded into weight and bias."""
    components = projection.weight.shape[1]
    right, singular = randomised_svd(x, mean, scale, components, seed)
    # The strongest component gets unit variance, the others keep their proportion to it.
    right = right * (x.shape[0] ** 0.5 / singular[0])
    weight = right / scale[:, None]
    projection.weight.copy_(torch.from_numpy(weight))
    projection.bias.copy_(torch.from_numpy(-mean @ weight))


def randomised_svd(
    x: sp.csr_matrix | np.ndarray, mean: np.ndarray, scale: np.ndarray, rank: int, seed: int, passes: int = 4
) -> tuple[np.ndarray, np.ndarray]:
    """Right singular vectors (features, rank) and singular values of (x - mean) / scale, x never made dense.

    Randomised range finder with power iterations (Halko, Martinsson, Tropp, 2011, algorithm 4.4).
    """

    def forward(v: np.ndarray) -> np.ndarray:
        v = v / scale[:, None]
        return np.asarray(x @ v) - mean @ v

    def backward(u: np.ndarray) -> np.ndarray:
        return (np.asarray(x.T @ u) - np.outer(mean, u.sum(0))) / scale[:, None]

    width = min(rank + 10, min(x.shape))
    u = np.random.default_rng(seed).standard_normal((x.shape[0], width))
    for _ in range(passes):
        v, _ = np.linalg.qr(backward(np.linalg.qr(u)[0]))
        u = forward(v)
    _, singular, rotation = np.linalg.svd(u, full_matrices=False)
    right = v @ rotation.T
    found = min(rank, right.shape[1])
    out, values = np.zeros((x.shape[1], rank)), np.zeros(rank)
    out[:, :found], values[:found] = right[:, :found], singular[:found]
    return out, values


def _set_offsets(decoder: Decoder, counts: sp.csr_matrix | np.ndarray) -> None:
    """Start each feature's rate at its average over the sample."""
    total = np.maximum(_column_sums(counts, lambda v: v), 0.5)
    library = total.sum()
    if decoder.likelihood == "normal":
        mean, scale = _moments(counts)
        decoder.rate.bias.copy_(torch.from_numpy(mean))
        decoder.theta.weight.copy_(torch.from_numpy(np.log(scale)))
        return
    share = np.minimum(total / library, 0.999)
    if decoder.likelihood == "bernoulli":
        detected = np.clip(_column_sums(counts, lambda v: (v > 0).astype(np.float64)) / counts.shape[0], 1e-6, 0.999)
        decoder.rate.bias.copy_(torch.from_numpy(np.log(detected / (1 - detected)) - np.log(library / counts.shape[0])))
        return
    decoder.rate.bias.copy_(torch.from_numpy(np.log(share / (1 - share))))
