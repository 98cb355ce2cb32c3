"""What a person may choose of a conversion: columns, features, values for one modality or for all."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from clue_dist.errors import DataError, list_names

FIELDS = {
    "batch": "batch",
    "label": "cell_type",
}  # what a store keeps of each cell, and the column it comes from


@dataclass(frozen=True)
class ObsColumns:
    """Columns of obs that hold batch and label; a name given explicitly must exist in some file."""

    by_field: Mapping[str, str] = field(default_factory=lambda: dict(FIELDS))
    explicit_fields: frozenset[str] = frozenset()


def require_known_modalities(flag: str, named: Iterable[str], known: Iterable[str]) -> None:
    """Every modality that `flag` names is among the `known` ones.

    Raises:
        DataError: one is not, so what was asked for it would be left undone.
    """
    there = list(dict.fromkeys(known))
    if absent := [name for name in named if name not in there]:
        raise DataError(
            "no such modality",
            where=flag,
            got=list_names(absent),
            expected=list_names(there) or "none",
        )


@dataclass(frozen=True)
class PerModality:
    """The values of one flag. general: that of the modalities not `named`."""

    flag: str
    default: str | None = None
    by_modality: dict[str, str] = field(default_factory=dict)

    @classmethod
    def parse_values(cls, texts: Sequence[str], flag: str, what: str = "values") -> PerModality:
        """`VALUE` once at most, and `NAME=VALUE` once for each name.

        Raises:
            DataError: two values for one modality.
        """
        general = [text for text in texts if "=" not in text]
        named = dict(text.split("=", 1) for text in texts if "=" in text)
        if len(general) > 1 or len(general) + len(named) < len(texts):
            fix = "NAME=VALUE for each; inputs come before the options"
            raise DataError(
                f"two {what} for one modality", where=flag, got=list_names(texts), fix=fix
            )
        return cls(flag, general[0] if general else None, named)

    def get_value(self, modality: str | None) -> str | None:
        return self.by_modality.get(modality or "", self.default)

    def require_known(self, names: Iterable[str]) -> None:
        """Every modality that is named is among `names`; else a DataError."""
        require_known_modalities(self.flag, self.by_modality, names)


Mode = Literal["same", "intersection", "union"]


@dataclass(frozen=True)
class FeatureChoice:
    """Which features a modality gets.

    mode: how files that differ come together (None: the same in every file, or the union of bins); given: a list of
    names that decides instead; bins: width in base pairs of the genome bins that peaks or fragments become; top: how
    many to keep, chosen from the cells.
    """

    mode: Mode | None = None
    listed: tuple[str, ...] | None = None
    bin_width: int | None = None
    top_features: int | None = None

    @property
    def effective_mode(self) -> Mode:
        """A bin that a file does not list was not hit there, so that bins of files are united."""
        return self.mode or ("union" if self.bin_width else "same")

    def describe_identity(self) -> dict[str, Any]:
        """JSON-able; changes with whatever changes the features."""
        names = (
            None
            if self.listed is None
            else hashlib.sha256("\n".join(self.listed).encode()).hexdigest()
        )
        return {
            "mode": self.effective_mode,
            "list_sha256": names,
            "bins": self.bin_width,
            "top": self.top_features,
        }
