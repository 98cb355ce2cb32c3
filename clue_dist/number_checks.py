"""Numbers that a person gives, checked before they are used."""

from __future__ import annotations

import math
from numbers import Integral, Real
from typing import Any

from clue_dist.errors import ConfigError


def require_number(
    name: str,
    value: Any,
    least: float = 0,
    most: float = math.inf,
    *,
    above: bool = False,
    whole: bool = False,
) -> None:
    """Require a finite number of a range.

    Args:
        name: what a person calls it.
        value: what was given, which may be anything.
        least: the smallest number that is allowed.
        most: the largest one.
        above: whether `least` itself is not allowed.
        whole: whether the number must be an integer.

    Raises:
        ConfigError: it is no such number.
    """
    kind: Any = Integral if whole else Real
    # `math.isfinite` knows no integer beyond the range of a float.
    is_number = (
        isinstance(value, kind) and not isinstance(value, bool) and -math.inf < value < math.inf
    )
    if is_number and least <= value <= most and not (above and value == least):
        return
    raise ConfigError(
        "a value that cannot be used",
        where=name,
        got=repr(value),
        expected=f"a {'whole ' if whole else ''}number"
        + (f" above {least:,}" if above else f", {least:,} or more")
        + (f", {most:,} at most" if math.isfinite(most) else ""),
    )
