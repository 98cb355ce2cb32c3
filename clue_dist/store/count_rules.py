"""Which values are counts, and what is said of those that are not."""

from __future__ import annotations

from typing import Any

import numpy as np

from clue_dist.errors import DataError
from clue_dist.store.encoding_kernels import LARGEST_COUNT

# How far a count may be from a whole number: that far if it is small, and if it is large.
_NEARLY_WHOLE = (1e-3, 0.05)


def limit_rounding(whole: np.ndarray) -> np.ndarray:
    """How far a count may be from a whole number and still is rounded to it, as it was computed.

    Args:
        whole: the whole numbers, (n,).
    """
    return np.clip(1e-5 * whole, *_NEARLY_WHOLE)


def make_count_error(where: str, value: Any, fix: str | None) -> DataError:
    """Make the error for a value that is no count."""
    rule = "counts must be raw: non-negative, finite integers"
    if LARGEST_COUNT < value < np.inf:
        rule = f"counts above {LARGEST_COUNT} cannot be held exactly in float32"
    return DataError(rule, where=where, got=value, expected="0, 1, 2, ...", fix=fix)


def make_real_value_error(where: str, value: Any, fix: str | None) -> DataError:
    """Make the error for a real value that is not finite."""
    return DataError(
        "dense values must be finite", where=where, got=value, expected="a finite number", fix=fix
    )
