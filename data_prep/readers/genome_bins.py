"""Regions of a genome by name (`chr1:100-200`, `chr1-100-200`, `chr1_100_200`) and the bins they fall into.

A bin is named by the half-open region it covers, counted from 0: the first of 5 kb is `chr1:0-5000`.
"""

from __future__ import annotations

import re

import numpy as np
import pandas as pd

from clue_dist.errors import DataError, list_names

_REGION = r"^(.*[^:_-])[:_-]([0-9]{1,10})[-_]([0-9]{1,10})$"  # whose sums fit into 64 bits


def bin_peaks(names: list[str], width: int, where: str) -> list[str]:
    """The bin of `width` base pairs that holds the middle of each region; several regions may share one.

    Raises:
        DataError: a name that is not a region.
    """
    parts = pd.Series(names, dtype=object).str.extract(_REGION)
    bad = np.flatnonzero(parts[0].isna().to_numpy())
    if len(bad):
        raise DataError(
            f"{len(bad)} features are not named as regions of a genome, so they cannot be binned",
            where=where,
            got=list_names(names[i] for i in bad[:5]),
            expected="chr1:1000-1500, chr1-1000-1500 or chr1_1000_1500",
            fix="leave `--bins` out, or take the names from a column of var with `--feature-ids`",
        )
    middle = (parts[1].astype("int64") + parts[2].astype("int64")) // 2
    return [
        name_bin(c, i, width) for c, i in zip(parts[0], (middle // width).tolist(), strict=True)
    ]


def name_bin(chromosome: str, index: int, width: int) -> str:
    return f"{chromosome}:{index * width}-{(index + 1) * width}"


def order_along_genome(bins: set[str]) -> list[str]:
    """Bins in the order of the genome: chr2 before chr10, the numbered before X and Y."""
    place: dict[str, list[tuple[bool, int | str]]] = {}

    def key(name: str) -> tuple[list[tuple[bool, int | str]], int]:
        chromosome, _, rest = name.rpartition(":")
        if chromosome not in place:
            words = re.findall(r"[0-9]{1,18}|[^0-9]+", chromosome.removeprefix("chr"))
            place[chromosome] = [
                (False, int(w)) if w[0] in "0123456789" else (True, w) for w in words
            ]
        return place[chromosome], int(rest.partition("-")[0])

    return sorted(bins, key=key)
