"""Compiled kernels that copy or multiply entries of sparse profiles on a CPU.

In PyTorch each would be up to a dozen passes over a batch's entries.
"""
# mypy: allow-untyped-defs

from __future__ import annotations

import numpy as np

from clue_dist.store.kernel_cache import compile_kernel


@compile_kernel
def copy_shown_entries(
    indptr, indices, values, key, share, shown_indptr, shown_indices, shown_values
):
    """Copy the entries of n profiles that `thinning` shows, and return how many these are.

    Args:
        indptr: (n + 1,) int32, where each profile begins and ends.
        indices: (nnz,) int32, the features.
        values: (nnz,) float32.
        key: (n,) uint32, random.
        share: (n,) float32, of the entries that are hidden.
        shown_indptr: written, like `indptr`.
        shown_indices: written from the front, as long as `indices`.
        shown_values: written from the front, as long as `values`.
    """
    longest = 0
    for row in range(len(key)):
        longest = max(longest, indptr[row + 1] - indptr[row])
    is_shown = np.empty(longest, np.bool_)
    n_shown = 0
    shown_indptr[0] = 0
    for row in range(len(key)):
        first, last = indptr[row], indptr[row + 1]
        limit = share[row] * np.float32(2**24)
        for entry in range(first, last):  # a loop of its own, for the processor's vectors
            hashed = mix_bits(key[row] ^ mix_bits(np.uint32(indices[entry] + 1)))
            is_shown[entry - first] = np.float32(np.int32(hashed >> np.uint32(8))) >= limit
        for entry in range(first, last):
            shown_indices[n_shown] = indices[entry]
            shown_values[n_shown] = values[entry]
            n_shown += is_shown[entry - first]
        shown_indptr[row + 1] = n_shown
    return n_shown


@compile_kernel
def copy_selected_entries(indptr, indices, values, place, kept_indptr, kept_indices, kept_values):
    """Copy the entries of selected features, numbered anew, and return how many these are.

    Args:
        indptr: (n + 1,) int32, where each profile begins and ends.
        indices: (nnz,) int32, the features.
        values: (nnz,) float32.
        place: (features,) int32, their new numbers; -1: not selected.
        kept_indptr: written, like `indptr`.
        kept_indices: written from the front, as long as `indices`.
        kept_values: written from the front, as long as `values`.
    """
    n_kept = 0
    kept_indptr[0] = 0
    for row in range(len(indptr) - 1):
        for entry in range(indptr[row], indptr[row + 1]):
            number = place[indices[entry]]
            kept_indices[n_kept] = number
            kept_values[n_kept] = values[entry]
            n_kept += number >= 0
        kept_indptr[row + 1] = n_kept
    return n_kept


@compile_kernel
def multiply_rows(indptr, values, factor, product):
    """Multiply the entries of n profiles, each profile by a factor of its own.

    Args:
        indptr: (n + 1,) int32, where each profile begins and ends.
        values: (nnz,) float32.
        factor: (n,) float32.
        product: written, like `values`.
    """
    for row in range(len(factor)):
        given = values[indptr[row] : indptr[row + 1]]
        made = product[indptr[row] : indptr[row + 1]]
        for entry in range(len(given)):
            made[entry] = given[entry] * factor[row]


@compile_kernel
def mix_bits(x):
    """`thinning._mix_bits` of a uint32."""
    x ^= x >> np.uint32(16)
    x = np.uint32(x * np.uint32(0x7FEB352D))
    x ^= x >> np.uint32(15)
    x = np.uint32(x * np.uint32(0x846CA68B))
    return x ^ (x >> np.uint32(16))
