"""Partners of cells across two modalities, as a sparse matrix of weights.

Row i of the matrix holds the partners that a cell of the first modality has in the second. The
weights of a row sum to 1, which is the format of the NeurIPS 2021 competition, and `n_partners` of
1,000 or fewer keeps the matrix within its limit of 1,000 non-zeros a row. A row without candidates,
or without a mutual neighbour where these are asked for, is empty.

Profiles are scaled to length 1, and similarity is their cosine. No method needs N x M memory: all
work on a graph that links every profile to its nearest ones in the other modality, both ways.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import scipy.sparse as sp
import torch

from clue_dist.errors import DataError, list_names
from clue_dist.neighbours.nearest import (
    Neighbours,
    find_approximate_neighbours,
    find_neighbours,
    scale_to_length_one,
)
from clue_dist.neighbours.partner_settings import PartnerMethod, PartnerSettings

_BIPARTITE_BLOCK = 4_096  # cells assigned at once: the time of an assignment is cubic at worst
_ROWS_AT_ONCE = 2**16  # whose candidates are compared
_TRANSPORT_ROUNDS = 200
_TRANSPORT_ERROR = 1e-3  # of the marginals, relative, at which transport has converged


@dataclass(frozen=True)
class ProfilePair:
    """The profiles of both modalities, of length 1."""

    first: torch.Tensor  # (N, D) float32
    second: torch.Tensor  # (M, D) float32
    settings: PartnerSettings

    @property
    def shape(self) -> tuple[int, int]:
        return len(self.first), len(self.second)

    def search(self, queries: torch.Tensor, keys: torch.Tensor, count: int) -> Neighbours:
        """The nearest `count` keys of each query, exact or approximate."""
        if self.settings.approximate:
            return find_approximate_neighbours(queries, count, keys)
        return find_neighbours(queries, count, keys)

    def link_candidates(self) -> sp.coo_array:
        """Cosines of all pairs of which one is among the other's candidates, (N, M)."""
        count = self.settings.n_candidates
        forward = self.search(self.first, self.second, count).indices
        backward = self.search(self.second, self.first, count).indices
        rows = np.concatenate([_repeat_rows(forward), backward.ravel()])
        columns = np.concatenate([forward.ravel(), _repeat_rows(backward)])
        is_found = (rows >= 0) & (columns >= 0)  # faiss gives -1 for none
        pairs = np.unique(rows[is_found] * len(self.second) + columns[is_found])
        rows, columns = np.divmod(pairs, len(self.second))
        return sp.coo_array((self.compute_cosines(rows, columns), (rows, columns)), self.shape)

    def compute_cosines(self, rows: np.ndarray, columns: np.ndarray) -> np.ndarray:
        """Cosines of pairs of profiles, (n,), in slices so that memory stays small."""
        cosines = np.empty(len(rows))
        step = max(1, 2**22 // self.first.shape[1])
        for start in range(0, len(rows), step):
            part = slice(start, start + step)
            products = self.first[rows[part]] * self.second[columns[part]]
            cosines[part] = products.sum(1).cpu().numpy()
        return cosines


def find_partners(
    first: np.ndarray,
    second: np.ndarray,
    settings: PartnerSettings | None = None,
    batches: tuple[np.ndarray, np.ndarray] | None = None,
) -> sp.csr_array:
    """Find partners in the second modality for each cell of the first.

    Methods, of which `settings.method` names one:
        nearest: the nearest profiles.
        scaled: the nearest after each cosine is reduced by how near profiles lie to their 10
            nearest, so that no profile is everybody's partner (Conneau et al., 2018).
        shared: the Jaccard index of shared neighbours, eq. 16.
        mutual: only profiles that are among the nearest of each other.
        transport: entropic optimal transport on the graph of candidates. Each cell gives and gets
            its share, so that cells compete for partners.
        bipartite: one partner for one cell, which maximises the sum of cosines, in blocks of
            similar cells.

    Args:
        first: (N, D), profiles of cells seen through the first modality.
        second: (M, D), the same of the second modality.
        settings: how partners are sought.
        batches: (N,) and (M,) names or codes. Partners are sought within a batch where they are
            given, among all cells otherwise. A cell whose batch is "" gets no partner.

    Returns:
        Weights (N, M), of which each row sums to 1 or is empty.

    Raises:
        ConfigError: no such method; faiss is wanted and is not installed.
        DataError: the shapes do not fit, or values are not finite.
    """
    settings = settings or PartnerSettings()
    x, y = (scale_to_length_one(torch.as_tensor(u).detach().float()) for u in (first, second))
    if x.ndim != 2 or y.ndim != 2 or x.shape[1] != y.shape[1] or not (len(x) and len(y)):
        raise DataError(
            "profiles of two modalities in one space are needed",
            got=(tuple(x.shape), tuple(y.shape)),
            expected="(N, D) and (M, D)",
        )
    link = METHODS[settings.method]
    if batches is None:
        return keep_best_partners(link(ProfilePair(x, y, settings)), settings.n_partners)
    parts = []
    for name in np.intersect1d(*batches):
        if name == "":
            continue
        rows, columns = (np.flatnonzero(batch == name) for batch in batches)
        weights = link(ProfilePair(x[rows], y[columns], settings)).tocoo()
        parts.append((weights.data, rows[weights.row], columns[weights.col]))
    if not parts:
        raise DataError(
            "no batch has cells of both modalities",
            got="; against ".join(list_names(np.unique(side), 5) for side in batches),
            fix="seek partners among all cells, not within batches",
        )
    data, rows, columns = (np.concatenate(part) for part in zip(*parts, strict=True))
    weights = sp.csr_array((data, (rows, columns)), shape=(len(x), len(y)))
    return keep_best_partners(weights, settings.n_partners)


def keep_best_partners(weights: sp.sparray, n_partners: int) -> sp.csr_array:
    """Keep the largest weights of each row, and scale rows to a sum of 1.

    Args:
        weights: (N, M), none negative.
        n_partners: how many to keep; of equal weights those of lower columns.
    """
    matrix = sp.csr_array(weights)
    matrix.eliminate_zeros()
    matrix.sort_indices()
    rows = _repeat_indptr(matrix.indptr)
    order = np.lexsort((matrix.indices, -matrix.data, rows))
    place = np.arange(len(order)) - matrix.indptr[rows]  # in the order of weights, by row
    kept = np.sort(order[place < n_partners])
    data, rows, columns = matrix.data[kept], rows[kept], matrix.indices[kept]
    sums = np.bincount(rows, data, matrix.shape[0])
    return sp.csr_array((data / sums[rows], (rows, columns)), shape=matrix.shape)


def link_nearest(profiles: ProfilePair) -> sp.csr_array:
    """Weights of the nearest profiles, a softmax of cosines over the temperature."""
    settings = profiles.settings
    found = profiles.search(profiles.first, profiles.second, settings.n_partners)
    cosine = 1 - found.distances**2 / 2
    weights = np.exp((cosine - cosine[:, :1]) / settings.temperature)
    return _place_weights(found.indices, weights, profiles.shape)


def link_scaled(profiles: ProfilePair) -> sp.csr_array:
    """Weights by cosines that are scaled locally, a softmax over the temperature."""
    settings, count = profiles.settings, profiles.settings.n_neighbours
    # Half the mean cosine around the candidate. That around the cell itself is equal for all of
    # its candidates, and the weights do not change with it.
    backward = profiles.search(profiles.second, profiles.first, count)
    crowding = (1 - _square_distances(backward.distances).mean(1) / 2) / 2
    del backward
    most = max(count, settings.n_candidates, settings.n_partners)
    forward = profiles.search(profiles.first, profiles.second, most)
    shape = len(forward.indices), min(settings.n_partners, forward.indices.shape[1])
    columns, weights = np.empty(shape, np.int64), np.empty(shape)
    # In slices, as the scores of all candidates of a million cells would fill the memory.
    for start in range(0, len(columns), _ROWS_AT_ONCE):
        rows = slice(start, start + _ROWS_AT_ONCE)
        candidates = forward.indices[rows]
        cosines = 1 - _square_distances(forward.distances[rows]) / 2
        scores = (cosines - crowding[candidates]) / settings.temperature
        best = np.argsort(-scores, axis=1, kind="stable")[:, : shape[1]]
        scores, columns[rows] = (np.take_along_axis(u, best, 1) for u in (scores, candidates))
        weights[rows] = np.exp(scores - scores[:, :1])
    return _place_weights(columns, weights, profiles.shape)


def _square_distances(distances: np.ndarray) -> np.ndarray:
    """Squares of distances; that of opposite profiles, 4, stands for what faiss did not find."""
    return np.asarray(np.minimum(distances, 2) ** 2)


def link_shared(profiles: ProfilePair) -> sp.csr_array:
    """Eq. 16: the share of the neighbours of two profiles that are neighbours of both.

    A profile is its own nearest neighbour inside its modality.
    """
    count = profiles.settings.n_neighbours
    first, second = profiles.first, profiles.second
    across = [
        _mark_neighbours(profiles.search(first, second, count), len(second)),
        _mark_neighbours(profiles.search(second, first, count), len(first)),
    ]
    inside = [_mark_neighbours(_search_itself(profiles, u, count), len(u)) for u in (first, second)]
    # Of the second modality |NN_ij & NN_jj|, and of the first |NN_ji & NN_ii|.
    shared = (across[0] @ inside[1].T + inside[0] @ across[1].T).tocsr()
    sizes = [matrix.sum(1) for matrix in (*across, *inside)]
    rows = _repeat_indptr(shared.indptr)
    everyone = (sizes[0] + sizes[2])[rows] + (sizes[1] + sizes[3])[shared.indices]
    return sp.csr_array(
        (shared.data / (everyone - shared.data), shared.indices, shared.indptr), shape=shared.shape
    )


def link_mutual(profiles: ProfilePair) -> sp.csr_array:
    """Weights of profiles that are among the nearest of each other, a softmax of cosines."""
    count = profiles.settings.n_neighbours
    first, second = profiles.first, profiles.second
    forward = _mark_neighbours(profiles.search(first, second, count), len(second))
    backward = _mark_neighbours(profiles.search(second, first, count), len(first))
    graph = forward.multiply(backward.T).tocoo()
    cosines = profiles.compute_cosines(graph.row, graph.col)
    return _weigh_by_softmax(graph, cosines / profiles.settings.temperature)


def link_transport(profiles: ProfilePair) -> sp.csr_array:
    """The plan of entropic optimal transport between uniform marginals (Cuturi, 2013).

    Only candidates may exchange mass. Beyond them a plan of such a temperature is next to zero, and
    solvers for the whole N x M matrix, as those of POT, need memory for it.
    """
    graph = profiles.link_candidates()
    kernel = sp.csr_array(
        (
            np.exp((graph.data - graph.data.max()) / profiles.settings.temperature),
            (graph.row, graph.col),
        ),
        shape=graph.shape,
    )
    transposed = kernel.T.tocsr()
    row_mass, column_mass = (1 / size for size in graph.shape)
    column_scale = np.ones(graph.shape[1])
    for _ in range(_TRANSPORT_ROUNDS):
        row_scale = row_mass / np.maximum(kernel @ column_scale, 1e-300)
        column_sums = transposed @ row_scale
        error = np.abs(column_scale * column_sums / column_mass - 1).mean()
        column_scale = column_mass / np.maximum(column_sums, 1e-300)
        if error < _TRANSPORT_ERROR:
            break
    return sp.csr_array(kernel.multiply(row_scale[:, None]).multiply(column_scale[None]))


def link_bipartite(profiles: ProfilePair) -> sp.csr_array:
    """One partner for each cell of the modality that has fewer, by the largest sum of cosines."""
    from scipy.optimize import linear_sum_assignment

    parts = []
    for rows, columns in _cut_blocks(profiles):
        if len(rows) and len(columns):
            cosines = (profiles.first[rows] @ profiles.second[columns].T).cpu().numpy()
            chosen = linear_sum_assignment(cosines, maximize=True)
            parts.append((rows[chosen[0]], columns[chosen[1]]))
    rows, columns = (np.concatenate(part) for part in zip(*parts, strict=True))
    return sp.csr_array((np.ones(len(rows)), (rows, columns)), shape=profiles.shape)


METHODS: dict[PartnerMethod, Callable[[ProfilePair], sp.csr_array]] = {
    "nearest": link_nearest,
    "scaled": link_scaled,
    "shared": link_shared,
    "mutual": link_mutual,
    "transport": link_transport,
    "bipartite": link_bipartite,
}


def _cut_blocks(profiles: ProfilePair) -> list[tuple[np.ndarray, np.ndarray]]:
    """Rows and columns of blocks of similar cells, of about _BIPARTITE_BLOCK cells a modality."""
    n_blocks = -(-max(profiles.shape) // _BIPARTITE_BLOCK)
    if n_blocks == 1:
        n_rows, n_columns = profiles.shape
        return [(np.arange(n_rows), np.arange(n_columns))]
    from sklearn.cluster import MiniBatchKMeans

    clusters = MiniBatchKMeans(n_blocks, batch_size=4096, n_init=1, random_state=0)
    clusters.fit(torch.cat([profiles.first, profiles.second]).cpu().numpy())
    codes = [clusters.predict(u.cpu().numpy()) for u in (profiles.first, profiles.second)]
    blocks: list[tuple[np.ndarray, np.ndarray]] = []
    for number in range(n_blocks):
        rows, columns = (np.flatnonzero(code == number) for code in codes)
        # A cluster may be larger than a block: it is cut further, at random.
        n_parts = -(-max(len(rows), len(columns)) // (2 * _BIPARTITE_BLOCK)) or 1
        blocks += zip(np.array_split(rows, n_parts), np.array_split(columns, n_parts), strict=True)
    return blocks


def _search_itself(profiles: ProfilePair, points: torch.Tensor, count: int) -> Neighbours:
    """The nearest points of each point, itself among them as the first."""
    found = profiles.search(points, points, count)
    itself = np.arange(len(points))
    indices = found.indices.copy()
    # Equal points may have taken its place.
    absent = ~(indices == itself[:, None]).any(1)
    indices[absent, -1] = itself[absent]
    return Neighbours(indices, found.distances)


def _mark_neighbours(found: Neighbours, n_keys: int) -> sp.csr_array:
    """1 where a key is a neighbour of a query, (queries, keys)."""
    return _place_weights(found.indices, np.ones(found.indices.shape), (len(found.indices), n_keys))


def _place_weights(
    columns: np.ndarray, weights: np.ndarray, shape: tuple[int, int]
) -> sp.csr_array:
    """A sparse matrix with as many weights in each row; faiss gives column -1 for none."""
    rows, known = _repeat_rows(columns), columns.ravel() >= 0
    entries = weights.ravel()[known], (rows[known], columns.ravel()[known])
    return sp.csr_array(entries, shape=shape)


def _weigh_by_softmax(graph: sp.coo_array, scores: np.ndarray) -> sp.csr_array:
    """exp(score) of each edge, relative to the largest of its row."""
    largest = np.full(graph.shape[0], -np.inf)
    np.maximum.at(largest, graph.row, scores)
    weights = np.exp(scores - largest[graph.row])
    return sp.csr_array((weights, (graph.row, graph.col)), shape=graph.shape)


def _repeat_rows(columns: np.ndarray) -> np.ndarray:
    """The row of each element of (n, k), (n * k,)."""
    return np.repeat(np.arange(len(columns)), columns.shape[1])


def _repeat_indptr(indptr: np.ndarray) -> np.ndarray:
    """The row of each stored element of a CSR matrix."""
    return np.repeat(np.arange(len(indptr) - 1), np.diff(indptr))
