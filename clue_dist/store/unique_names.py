"""Names of features that repeat."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence


def make_names_unique(names: Sequence[str], replacements: Sequence[str]) -> list[str]:
    """Names where one that repeats, or is empty, gives way to its replacement. All (features,)."""
    times = Counter(names)
    return [
        replacement if times[name] > 1 or not name else name
        for name, replacement in zip(names, replacements, strict=True)
    ]
