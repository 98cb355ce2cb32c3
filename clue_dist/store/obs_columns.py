"""The columns of obs that a store keeps beside batch and label: how their values are stored."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Literal

import numpy as np
from pydantic import AfterValidator, BaseModel, ConfigDict

if TYPE_CHECKING:
    import pandas as pd

_TYPES = {"category": "int32", "integer": "int64", "number": "float64", "boolean": "int8"}
# What pandas, NumPy and R write for a missing value, where it is turned into text.
MISSING_TEXTS = frozenset(
    {"nan", "NaN", "NAN", "None", "NA", "<NA>", "N/A", "n/a", "NaT", "null", "NULL"}
)
_LEAST = np.iinfo(np.int64).min


def name_value(value: object) -> str:
    """Name a value of obs that tells cells apart, as a batch or a label.

    Each value is named alone, so that it has one name whatever other values a column holds. 1.0 is
    called "1", as integers become floats in a column that lacks some.
    """
    if isinstance(value, (float, np.floating)) and value.is_integer():
        return str(int(value))
    return str(value)


def _require_unique(names: list[str]) -> list[str]:
    """Refuse a list that names something twice; for pydantic."""
    if len(set(names)) < len(names):
        raise ValueError(f"{len(names) - len(set(names))} names that occur more than once")
    return names


Names = Annotated[list[str], AfterValidator(_require_unique)]


class KeptColumn(BaseModel):
    """What the manifest says of a column.

    A value that is missing is -1 where it is a category or a boolean, the least int64 where it is
    an integer, and NaN where it is a number.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    kind: Literal["category", "integer", "number", "boolean"]
    categories: Names = []  # a value of kind category is a place in this list; texts are categories

    @property
    def dtype(self) -> str:
        """The type in which its values are stored."""
        return _TYPES[self.kind]

    @property
    def missing(self) -> float:
        """What stands for a missing value."""
        return {"integer": _LEAST, "number": np.nan}.get(self.kind, -1)

    def decode_values(self, values: np.ndarray) -> pd.api.extensions.ExtensionArray | np.ndarray:
        """Decode values as they are stored into what a data frame holds.

        Args:
            values: (n,), of the type of the column.

        Returns:
            (n,): a Categorical; plain integers or booleans, nullable ones where some are missing;
            floats.
        """
        import pandas as pd

        if self.kind == "category":
            return pd.Categorical.from_codes(values, categories=pd.Index(self.categories))
        if self.kind == "number":
            return values
        is_missing = values == self.missing
        plain = values.astype(bool) if self.kind == "boolean" else values
        if not is_missing.any():
            return plain
        masked = pd.arrays.BooleanArray if self.kind == "boolean" else pd.arrays.IntegerArray
        return masked(plain, is_missing)


def name_kept_array(number: int) -> str:
    """Name the array of a kept column by its place; the column itself may be called anything."""
    return f"kept-{number}"
