"""The biological batches of cells: each is a combination of levels of one or several covariates.

However many covariates there are, the code of a cell's batch is its place in one list. So cells are
of one batch where they agree in every covariate, and all that compares cells of a batch compares
cells that were treated alike. Decoders alone take a batch apart into its levels.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from clue_dist.errors import DataError

if TYPE_CHECKING:
    import pandas as pd

BATCH = "batch"  # what the only covariate is called where no column is known that gave it
UNKNOWN = ""  # the level of a covariate that is not known of a batch
# Columns of obs that results have for these ends. A covariate that is called so gets another one.
TAKEN_COLUMNS = frozenset({BATCH, "cell_type", "barcode"})


@dataclass(frozen=True)
class BatchVocabulary:
    """The batches that a store, a model or cells in memory know."""

    names: list[str]  # of the batches; a code is a place in this list
    covariates: Mapping[str, Sequence[str]]  # by name, the level of each batch, or UNKNOWN

    @classmethod
    def from_lists(
        cls,
        names: list[str],
        covariates: Mapping[str, Sequence[str]] | None = None,
        column: str = "",
    ) -> BatchVocabulary:
        """Take the lists of a manifest or of a model card.

        Args:
            names: of the batches.
            covariates: the level of each batch by covariate; none where there is only one.
            column: the column of obs that gave the only covariate; "" where it is not known.
        """
        return cls(names, covariates or {column or BATCH: names})

    @property
    def has_several(self) -> bool:
        """Whether there are several covariates."""
        return len(self.covariates) > 1

    def list_levels(self, covariate: str) -> list[str]:
        """List the levels of a covariate, in the order in which batches name them first."""
        return [level for level in dict.fromkeys(self.covariates[covariate]) if level != UNKNOWN]

    def number_levels(self) -> dict[tuple[str, str], int]:
        """Number all levels, in the order in which batches name them first.

        The numbers are rows of a decoder's embedding: of one covariate they are the batches' codes,
        and batches that are added to the list change none of them.
        """
        numbers: dict[tuple[str, str], int] = {}
        for levels in zip(*self.covariates.values(), strict=True):
            for key in zip(self.covariates, levels, strict=True):
                if key[1] != UNKNOWN:
                    numbers.setdefault(key, len(numbers))
        return numbers

    def match_covariates(self, other: BatchVocabulary) -> dict[str, str]:
        """Which covariate of another vocabulary each is: that of its name; an only one the other's.

        Covariates that the other one lacks are left out.
        """
        if not self.has_several and not other.has_several:
            return dict(zip(self.covariates, other.covariates, strict=True))
        return {name: name for name in self.covariates if name in other.covariates}

    def encode_levels(self, other: BatchVocabulary) -> np.ndarray:
        """Look up the levels of another vocabulary's batches in this one.

        Returns:
            Numbers of levels, (batches of `other`, covariates here) int64; -1: not known here.
        """
        numbers, matched = self.number_levels(), self.match_covariates(other)
        found = np.full((len(other.names), len(self.covariates)), -1, np.int64)
        for column, name in enumerate(self.covariates):
            if name in matched:
                levels = other.covariates[matched[name]]
                found[:, column] = [numbers.get((name, level), -1) for level in levels]
        return found

    def match_levels(self, other: BatchVocabulary) -> dict[int, int]:
        """The number here of each level of another vocabulary that is known here, by that there."""
        numbers = self.number_levels()
        names = {theirs: name for name, theirs in self.match_covariates(other).items()}
        found = {
            number: numbers.get((names.get(covariate, ""), level))
            for (covariate, level), number in other.number_levels().items()
        }
        return {theirs: number for theirs, number in found.items() if number is not None}

    def decode_levels(self, codes: np.ndarray) -> dict[str, pd.Categorical[Any]]:
        """Decode the levels of cells, for obs of a result.

        Args:
            codes: (N,), the batch of each cell; -1: unknown.

        Returns:
            By column of obs the level of each cell; nothing of one covariate, which the batch is.
        """
        import pandas as pd

        columns: dict[str, pd.Categorical[Any]] = {}
        for covariate, levels in self.covariates.items() if self.has_several else ():
            listed = self.list_levels(covariate)
            places = {level: place for place, level in enumerate(listed)}
            level_codes = np.array([*(places.get(level, -1) for level in levels), -1])
            columns[name_level_column(covariate)] = pd.Categorical.from_codes(
                level_codes[codes], categories=pd.Index(listed)
            )
        return columns

    def choose_batches(self, names: list[str]) -> BatchVocabulary:
        """The vocabulary of some of the batches, in the order of `names`."""
        places = {name: place for place, name in enumerate(self.names)}
        chosen = {
            covariate: [levels[places[name]] for name in names]
            for covariate, levels in self.covariates.items()
        }
        return BatchVocabulary(names, chosen)

    def add_batches(self, other: BatchVocabulary) -> tuple[BatchVocabulary, np.ndarray]:
        """Add the batches of another vocabulary, as far as its covariates are known here.

        Returns:
            The vocabulary with those at its end that it lacked, and the code in it of each batch of
            `other`, (n,) int64.
        """
        matched, unknown = self.match_covariates(other), [UNKNOWN] * len(other.names)
        theirs = [
            other.covariates[matched[name]] if name in matched else unknown
            for name in self.covariates
        ]
        codes = {row: code for code, row in enumerate(zip(*self.covariates.values(), strict=True))}
        found = [codes.setdefault(row, len(codes)) for row in zip(*theirs, strict=True)]
        levels = dict(zip(self.covariates, zip(*codes, strict=True), strict=True))
        return BatchVocabulary(name_batches(list(codes)), levels), np.array(found, np.int64)

    def list_covariates(self) -> dict[str, list[str]]:
        """The covariates as a manifest and a model card list them: none where there is only one."""
        if not self.has_several:
            return {}
        return {name: list(levels) for name, levels in self.covariates.items()}


NO_BATCHES = BatchVocabulary.from_lists([])


def require_fitting_levels(batches: Sequence[str], covariates: Mapping[str, Sequence[str]]) -> None:
    """Refuse covariates that do not give every batch a combination of levels of its own.

    Args:
        batches: names of the batches.
        covariates: the level of each batch by covariate; none where there is only one.

    Raises:
        ValueError: they do not, for pydantic.
    """
    if not covariates:
        return
    if any(len(levels) != len(batches) for levels in covariates.values()):
        raise ValueError("batch_covariates do not give a level for each batch")
    combinations = set(zip(*covariates.values(), strict=True))
    if len(covariates) < 2 or len(combinations) < len(batches) or not all(map(any, combinations)):
        raise ValueError("batch_covariates do not tell the batches apart")
    if bad := [name for name in covariates if not name or "/" in name]:
        raise ValueError(f"batch_covariates have the name {bad[0]!r}")


def name_combination(levels: Sequence[str]) -> str:
    """Name the batch that has these levels, one of each covariate."""
    return " | ".join(level or "?" for level in levels) if len(levels) > 1 else levels[0]


def name_batches(combinations: Sequence[Sequence[str]]) -> list[str]:
    """Name every batch.

    Args:
        combinations: the levels of each batch, all different.

    Raises:
        DataError: two batches would have one name.
    """
    names = [name_combination(levels) for levels in combinations]
    if len(set(names)) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise DataError(
            "two combinations of levels would have one name",
            got=twice,
            expected='levels without " | ", and none that is "?", which stands for unknown',
            fix="rename the levels in obs",
        )
    return names


def name_level_column(covariate: str) -> str:
    """Name the column of obs in which results have the levels of a covariate."""
    return f"{covariate}_level" if covariate in TAKEN_COLUMNS else covariate


def combine_levels(
    levels: Mapping[str, Sequence[str]],
) -> tuple[BatchVocabulary, np.ndarray]:
    """Combine the levels of cells into batches.

    Args:
        levels: by covariate the level of each cell, (N,), or UNKNOWN.

    Returns:
        The batches that occur, and the code of each cell, (N,) int64; -1: no level is known.
    """
    rows = list(zip(*levels.values(), strict=True))
    distinct = sorted(row for row in set(rows) if any(row))
    codes = {row: code for code, row in enumerate(distinct)}
    columns = zip(*distinct, strict=True) if distinct else [() for _ in levels]
    covariates = {name: list(column) for name, column in zip(levels, columns, strict=True)}
    vocabulary = BatchVocabulary(name_batches(distinct), covariates)
    return vocabulary, np.array([codes.get(row, -1) for row in rows], np.int64)
