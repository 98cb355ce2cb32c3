"""Regions of a genome by name, and the bins that they fall into.

A region is called `chr1:100-200`, `chr1-100-200` or `chr1_100_200`. A bin is called by the
half-open region that it covers, counted from 0: the first of 5 kb is `chr1:0-5000`.
"""

from __future__ import annotations

import re

import numpy as np
import pandas as pd

from clue_dist.errors import DataError, format_count, list_names

_REGION = r"^(.*[^:_-])[:_-]([0-9]{1,10})[-_]([0-9]{1,10})$"  # the sum of two fits into 64 bits


def bin_peaks(names: list[str], width: int, where: str) -> list[str]:
    """For each region the bin that holds its middle; several regions may share one.

    Args:
        names: names of the regions.
        width: width of a bin, in base pairs.
        where: the names come from, for messages.

    Raises:
        DataError: a name that is not a region's.
    """
    parts = pd.Series(names, dtype=object).str.extract(_REGION)
    bad = np.flatnonzero(parts[0].isna().to_numpy())
    if len(bad):
        raise DataError(
            "bins take features that are named as regions of a genome",
            where=where,
            got=f"{format_count(len(bad), 'feature')} named otherwise, such as "
            f"{list_names(names[i] for i in bad[:5])}",
            expected="chr1:1000-1500, chr1-1000-1500 or chr1_1000_1500",
            fix="leave `--bins` out, or take the names from a column of var with `--feature-ids`",
        )
    middle = (parts[1].astype("int64") + parts[2].astype("int64")) // 2
    bins = zip(parts[0], (middle // width).tolist(), strict=True)
    return [name_bin(chromosome, index, width) for chromosome, index in bins]


def name_bin(chromosome: str, index: int, width: int) -> str:
    """What the bin number `index` of a chromosome is called, counted from 0."""
    return f"{chromosome}:{index * width}-{(index + 1) * width}"


def order_along_genome(bins: set[str]) -> list[str]:
    """Bins in the order of the genome: chr2 before chr10, numbered chromosomes before X and Y."""
    places: dict[str, list[tuple[bool, int | str]]] = {}

    def find_place(name: str) -> tuple[list[tuple[bool, int | str]], int]:
        chromosome, _, region = name.rpartition(":")
        # Digits count as numbers and come before letters. There are many bins on few chromosomes.
        if chromosome not in places:
            words = re.findall(r"[0-9]{1,18}|[^0-9]+", chromosome.removeprefix("chr"))
            places[chromosome] = [
                (False, int(word)) if word[0] in "0123456789" else (True, word) for word in words
            ]
        return places[chromosome], int(region.partition("-")[0])

    return sorted(bins, key=find_place)
