"""Training hides entries of profiles that are sparse samples, as those of open chromatin are.

Of a cell's open regions few are counted, so that encoders learn by heart which ones were. Shown
each time without another random part of them, they learn what the cell's regions have in common.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from clue_dist.data.batch import Counts, SparseCounts
from clue_dist.model.entry_kernels import copy_shown_entries

# Share of the features that a typical cell shows, from which on its profile is no sparse sample.
# Thinning helps where it is 0.003 (mouse cortex), and costs where it is 0.12 (600 peaks of bone
# marrow, docs/results.md). It did, too, in one trial with the 600 peaks that most cells of mouse
# cortex show, where it is 0.04.
DENSE = 0.02
# Hashes are of 32 bits. In int64 a product of two may overflow, which leaves its low bits right.
_BITS = 0xFFFFFFFF


def hide_entries(counts: Counts, most: float | Tensor, key: Tensor) -> Counts:
    """Set a share of each cell's entries to 0.

    Whether an entry is hidden follows from the key and the feature alone, so that it needs no draw
    of its own, and is the same on any number of ranks.

    Args:
        counts: n profiles.
        most: the share is uniform between 0 and this.
        key: (n,) int64 of 32 bits, random.

    Returns:
        The profiles. Sparse ones lack the hidden entries on a CPU; a GPU, which would have to say
        how many are left, keeps them as zeros.
    """
    share = most * _hash_to_uniform(key)
    if isinstance(counts, Tensor):
        feature = torch.arange(counts.shape[1], device=key.device)
        return counts * _find_shown(key[:, None], feature, share[:, None]).to(counts.dtype)
    if key.device.type == "cpu":
        return _drop_entries(counts, key, share)
    return _zero_entries(counts, key, share)


def _zero_entries(counts: SparseCounts, key: Tensor, share: Tensor) -> SparseCounts:
    """The profiles, of the same layout, with zeros."""
    row = counts.entry_rows
    shown = _find_shown(key.index_select(0, row), counts.indices, share.index_select(0, row))
    return counts.replace_values(counts.values * shown, has_zeros=True)


def _drop_entries(counts: SparseCounts, key: Tensor, share: Tensor) -> SparseCounts:
    """The profiles without what `_zero_entries` sets to 0, in one pass over the non-zeros."""
    return counts.copy_entries(
        lambda given, made: copy_shown_entries(
            *given, key.numpy().astype(np.uint32), share.numpy(), *made
        )
    )


def _find_shown(key: Tensor, feature: Tensor, share: Tensor) -> Tensor:
    """Whether each entry is shown, bool; `copy_shown_entries` decides alike."""
    return _hash_to_uniform(key ^ _mix_bits(feature.long() + 1)) >= share


def _hash_to_uniform(key: Tensor) -> Tensor:
    """Hash integers of 32 bits to [0, 1)."""
    return (_mix_bits(key) >> 8).float() / 2**24


def _mix_bits(x: Tensor) -> Tensor:
    """A hash of 32 bits in which each bit of x changes half of the bits.

    Multiply, shift and exclude, with the constants that C. Wellons found (hash-prospector, 2018).
    """
    x = x ^ (x >> 16)
    x = x * 0x7FEB352D & _BITS
    x = x ^ (x >> 15)
    x = x * 0x846CA68B & _BITS
    return x ^ (x >> 16)
