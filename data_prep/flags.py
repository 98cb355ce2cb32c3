"""Flags whose value is for every modality (`--layer counts`) or for one (`--layer rna=counts`)."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from clue_dist.errors import DataError, listed
from data_prep.sources import require_known


@dataclass(frozen=True)
class PerModality:
    """The values of one flag. general: that of the modalities not `named`."""

    flag: str
    general: str | None = None
    named: dict[str, str] = field(default_factory=dict)

    @classmethod
    def parse(cls, texts: Sequence[str], flag: str, what: str = "values") -> PerModality:
        """`VALUE` once at most, and `NAME=VALUE` once for each name.

        Raises:
            DataError: two values for one modality.
        """
        general = [text for text in texts if "=" not in text]
        named = dict(text.split("=", 1) for text in texts if "=" in text)
        if len(general) > 1 or len(general) + len(named) < len(texts):
            fix = "NAME=VALUE for each; inputs come before the options"
            raise DataError(f"two {what} for one modality", where=flag, got=listed(texts), fix=fix)
        return cls(flag, general[0] if general else None, named)

    def of(self, name: str | None) -> str | None:
        return self.named.get(name or "", self.general)

    def require_known(self, names: Iterable[str]) -> None:
        """Every modality that is named is among `names`; else a DataError."""
        require_known(self.flag, self.named, names)
