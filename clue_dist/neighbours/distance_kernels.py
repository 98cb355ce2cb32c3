"""Compiled kernels that go through tiles of bounds on distances; `distance_tiles` makes the tiles.

All kernels are in this file. Numba's cache on disk would not notice that a kernel in another file,
which one of these calls, had changed.

An entry of a tile is never above half the squared distance of a query and a key. So an entry above
a limit decides by itself, and only the few entries below it are computed exactly, in float64. Two
calls compute the same distance bit by bit, whichever of both points is the query.
"""
# mypy: allow-untyped-defs

from __future__ import annotations

import numpy as np

from clue_dist.store.kernel_cache import compile_kernel

# Entries that are tested together, by the vector instructions of the processor. Where one of them
# is among the nearest, smaller parts are tested.
_CHUNK, _PART = 256, 32


@compile_kernel
def compute_half_distance(queries, keys, query, key):
    """Compute half the squared distance of two points, in float64.

    Args:
        queries: (N, D + 1) float64; the last column holds half the square of a point's length.
        keys: (M, D + 1) float64.
        query: row of the queries.
        key: row of the keys.
    """
    width = queries.shape[1] - 1
    # Four sums, as a processor adds to one while it waits for another. Their order is fixed.
    sum0, sum1, sum2, sum3 = 0.0, 0.0, 0.0, 0.0
    whole = width - width % 4
    for k in range(0, whole, 4):
        sum0 += queries[query, k] * keys[key, k]
        sum1 += queries[query, k + 1] * keys[key, k + 1]
        sum2 += queries[query, k + 2] * keys[key, k + 2]
        sum3 += queries[query, k + 3] * keys[key, k + 3]
    for k in range(whole, width):
        sum0 += queries[query, k] * keys[key, k]
    half = (queries[query, width] + keys[key, width]) - ((sum0 + sum1) + (sum2 + sum3))
    return max(half, 0.0)


@compile_kernel
def compute_partner_distances(queries, keys):
    """Compute half the squared distance of row i to row i, (N,) float64."""
    halves = np.empty(len(queries))
    for row in range(len(queries)):
        halves[row] = compute_half_distance(queries, keys, row, row)
    return halves


@compile_kernel
def round_up(value):
    """Round to a float32 that is not below the value."""
    return np.float32(value * (1 + 2.0**-22) + 2.0**-110)


@compile_kernel
def _order_chunks(tile, by_column):
    """The loops over rows and chunks of columns; the outer one is that of the queries.

    So what is known of a query stays in the processor's cache while keys pass.
    """
    rows, starts = range(tile.shape[0]), range(0, tile.shape[1], _CHUNK)
    if by_column:
        return starts, rows
    return rows, starts


# --- nearest keys ---------------------------------------------------------------------------------


@compile_kernel
def replace_furthest(distances, indices, distance, index):
    """Replace the furthest key of a heap, its first, unless the new one is further away.

    Of keys at the same distance the one of lowest index counts as the nearer, so that the order in
    which keys come does not matter.
    """
    count = len(distances)
    if distance > distances[0] or (distance == distances[0] and index > indices[0]):
        return
    place = 0
    while True:
        child = 2 * place + 1
        if child >= count:
            break
        other = child + 1
        if other < count and (
            distances[other] > distances[child]
            or (distances[other] == distances[child] and indices[other] > indices[child])
        ):
            child = other
        if distances[child] < distance or (distances[child] == distance and indices[child] < index):
            break
        distances[place], indices[place] = distances[child], indices[child]
        place = child
    distances[place], indices[place] = distance, index


@compile_kernel
def collect_nearest(
    tile, by_column, first_row, first_column, queries, keys, is_same, limits, distances, indices,
):  # fmt: skip
    """Put the keys of a tile into the heaps of nearest keys of its queries.

    Args:
        tile: (n, m) float32, bounds on half distances.
        by_column: whether columns are the queries, and rows the keys.
        first_row: the point of the tile's first row.
        first_column: the point of its first column.
        queries: (N, D + 1), as of `compute_half_distance`.
        keys: (M, D + 1).
        is_same: whether queries and keys are the same points, of which none is its own neighbour.
        limits: (N,) float32, above which a key is none of the nearest.
        distances: (N, k) float64, a heap of half distances for each query.
        indices: (N, k) int64, keys.
    """
    outer, inner = _order_chunks(tile, by_column)
    for i in outer:
        for j in inner:
            row, start = (j, i) if by_column else (i, j)
            stop = min(start + _CHUNK, tile.shape[1])
            bounds, first = tile[row], (first_row + row, first_column)
            if not _has_nearer(bounds, start, stop, by_column, first, limits):
                continue
            for part in range(start, stop, _PART):
                part_stop = min(part + _PART, stop)
                if not _has_nearer(bounds, part, part_stop, by_column, first, limits):
                    continue
                for place in range(part, part_stop):
                    query, key = first_row + row, first_column + place
                    if by_column:
                        query, key = key, query
                    if bounds[place] > limits[query] or (is_same and key == query):
                        continue
                    half = compute_half_distance(queries, keys, query, key)
                    replace_furthest(distances[query], indices[query], half, key)
                    limits[query] = round_up(distances[query, 0])


@compile_kernel
def _has_nearer(bounds, start, stop, by_column, first, limits):
    """Whether one of the entries `start` to `stop` of a row is within the limit of its query."""
    chunk, n_within = bounds[start:stop], np.int32(0)
    # int32, as wider counts would leave half of each vector instruction unused.
    if by_column:
        chunk_limits = limits[first[1] + start : first[1] + stop]
        for place in range(len(chunk)):
            n_within = np.int32(n_within + (chunk[place] <= chunk_limits[place]))
    else:
        limit = limits[first[0]]
        for place in range(len(chunk)):
            n_within = np.int32(n_within + (chunk[place] <= limit))
    return n_within > 0


@compile_kernel
def sort_heaps(distances, indices):
    """Sort the heaps of `collect_nearest`, (N, k) each, the nearest key first."""
    for query in range(len(distances)):
        for last in range(distances.shape[1] - 1, 0, -1):
            distance, index = distances[query, last], indices[query, last]
            distances[query, last], indices[query, last] = distances[query, 0], indices[query, 0]
            replace_furthest(distances[query, :last], indices[query, :last], distance, index)


# --- ranks of partners ----------------------------------------------------------------------------


@compile_kernel
def rank_partners(
    tile, by_column, first_row, first_column, queries, keys, certain, limits, reach, halves,
    nearer, ties, nearest, least,
):  # fmt: skip
    """Count the keys of a tile that are nearer to a query than its partner, the key of its row.

    Args:
        tile: (n, m) float32, bounds on half distances.
        by_column: whether columns are the queries, and rows the keys.
        first_row: the point of the tile's first row.
        first_column: the point of its first column.
        queries: (N, D + 1), as of `compute_half_distance`.
        keys: (N, D + 1).
        certain: (N,) float32, below which a key is nearer than the partner.
        limits: (N,) float32, above which a key is not nearer than the partner.
        reach: (N,) float32, above which a key is not nearer than the nearest found.
        halves: (N,) float64, half distances of the partners.
        nearer: (N,) int32, counts keys that are nearer than the partner.
        ties: (N,) int32, counts keys as near as the partner, of a lower index.
        nearest: (N,) int64, the nearest key that was found, of ties the one of lowest index.
        least: (N,) float64, its half distance.
    """
    outer, inner = _order_chunks(tile, by_column)
    for i in outer:
        for j in inner:
            row, start = (j, i) if by_column else (i, j)
            chunk = tile[row, start : start + _CHUNK]
            if by_column:
                n_open = _count_for_columns(
                    chunk, first_column + start, certain, limits, reach, nearer
                )
            else:
                n_open = _count_for_row(chunk, first_row + row, certain, limits, reach, nearer)
            if n_open == 0:
                continue
            for place in range(len(chunk)):
                query, key = first_row + row, first_column + start + place
                if by_column:
                    query, key = key, query
                is_open = certain[query] <= chunk[place] <= limits[query]
                if not is_open and chunk[place] > reach[query]:
                    continue
                half = compute_half_distance(queries, keys, query, key)
                if is_open and half < halves[query]:
                    nearer[query] += 1
                elif is_open and half == halves[query] and key < query:
                    ties[query] += 1
                if half < least[query] or (half == least[query] and key < nearest[query]):
                    least[query], nearest[query] = half, key
                    reach[query] = round_up(half)


@compile_kernel
def _count_for_row(chunk, query, certain, limits, reach, nearer):
    """Count keys that are certainly nearer; return how many entries must be looked at."""
    sure, limit, best = certain[query], limits[query], reach[query]
    n_sure, n_open = np.int32(0), np.int32(0)
    for place in range(len(chunk)):
        bound = chunk[place]
        is_sure = bound < sure
        n_sure = np.int32(n_sure + is_sure)
        n_open = np.int32(n_open + ((bound <= best) | ((bound <= limit) & (not is_sure))))
    nearer[query] += n_sure
    return n_open


@compile_kernel
def _count_for_columns(chunk, first, certain, limits, reach, nearer):
    """Count for each column's query; return how many entries must be looked at."""
    last = first + len(chunk)
    sure, limit, best = certain[first:last], limits[first:last], reach[first:last]
    counts, n_open = nearer[first:last], np.int32(0)
    for place in range(len(chunk)):
        bound = chunk[place]
        is_sure = bound < sure[place]
        counts[place] += is_sure
        n_open = np.int32(
            n_open + ((bound <= best[place]) | ((bound <= limit[place]) & (not is_sure)))
        )
    return n_open
