"""What a person may choose of a conversion: inputs, columns and features."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from clue_dist.errors import DataError, list_names
from clue_dist.store.location import Location

# What a store keeps of each cell, and the column of obs that it is taken from by default.
FIELDS = {"batch": "batch", "label": "cell_type"}
# Where several covariates make up the batch, each is a field of its own: this, and its name.
COVARIATE = "batch:"
# Field of the column that tells the data sets of one file apart; it ends up in the barcode.
DATASET = "dataset"

IN_MEMORY = "cells in memory"  # what messages call them, and the file that is written of them

NO_COLUMN = "none"  # what stands for a column where a field is read from none

# How barcodes of several files meet: letter by letter, or by what `barcode_cores` leaves of them.
Pairing = Literal["exact", "core"]

# How the features of files that differ are brought together.
Mode = Literal["same", "intersection", "union"]


@dataclass(frozen=True)
class ObsColumns:
    """Columns of obs that hold batch and label."""

    # By field; a field without a column is read from no file. DATASET may be among the fields, and
    # fields of covariates in place of that of the batch.
    by_field: Mapping[str, str] = field(default_factory=lambda: dict(FIELDS))
    # Fields whose column a person named for all inputs.
    explicit_fields: frozenset[str] = frozenset()
    # By modality and field, columns that take precedence; NO_COLUMN: none. An input of that
    # modality must have the column.
    by_modality: Mapping[str, Mapping[str, str]] = field(default_factory=dict)

    @property
    def covariates(self) -> list[str]:
        """The covariates that make up the batch, where there are several."""
        return [f.removeprefix(COVARIATE) for f in self.by_field if f.startswith(COVARIATE)]

    def select_modality(self, modality: str) -> ObsColumns:
        """The columns of the inputs of one modality."""
        columns = {**self.by_field, **self.by_modality.get(modality, {})}
        known = {name: column for name, column in columns.items() if column != NO_COLUMN}
        return ObsColumns(known, self.explicit_fields)


def require_known_modalities(flag: str, named: Iterable[str], known: Iterable[str]) -> None:
    """Refuse a flag that names a modality which is not among the known ones.

    Raises:
        DataError: there is such a modality, so what the flag asks for it would be left undone.
    """
    modalities = list(dict.fromkeys(known))
    if absent := [name for name in named if name not in modalities]:
        raise DataError(
            "no such modality",
            where=flag,
            got=list_names(absent),
            expected=list_names(modalities) or "none",
        )


@dataclass(frozen=True)
class PerModality:
    """The values of one flag of the command line."""

    flag: str  # for messages
    default: str | None = None  # for the modalities that `by_modality` does not list
    by_modality: dict[str, str] = field(default_factory=dict)

    @classmethod
    def parse_values(cls, texts: Sequence[str], flag: str, what: str = "values") -> PerModality:
        """Read `VALUE`, at most once, and `NAME=VALUE`, once for each modality.

        Args:
            texts: as they were typed.
            flag: whose values they are.
            what: the values are, in the plural, for messages.

        Raises:
            DataError: two values for one modality.
        """
        defaults = [text for text in texts if "=" not in text]
        by_modality = dict(text.split("=", 1) for text in texts if "=" in text)
        if len(defaults) > 1 or len(defaults) + len(by_modality) < len(texts):
            fix = "NAME=VALUE for each; inputs come before the options"
            raise DataError(
                f"two {what} for one modality", where=flag, got=list_names(texts), fix=fix
            )
        return cls(flag, defaults[0] if defaults else None, by_modality)

    def get_value(self, modality: str) -> str | None:
        """The value for a modality; None where the flag says nothing about it."""
        return self.by_modality.get(modality, self.default)

    def require_known(self, names: Iterable[str]) -> None:
        """Refuse a modality that is not among `names`; see `require_known_modalities`."""
        require_known_modalities(self.flag, self.by_modality, names)


@dataclass(frozen=True)
class InputArgument:
    """One input as a person names it: `[DATASET:][NAME=]PATH[:KEY]`."""

    text: str  # as it was typed, for messages
    path: Location
    dataset: str = ""
    modality: str | None = None  # None: the file itself says which modalities it holds
    key: str | None = None  # the part of the file that a person picks; None: see `choose_parts`

    @property
    def typed_path(self) -> str:
        """The path as it was typed, without what stands before and behind it."""
        text = self.text.removeprefix(f"{self.dataset}:").removeprefix(f"{self.modality}=")
        return text.removesuffix(f":{self.key}")

    @property
    def local_path(self) -> Path:
        """The path, for formats that are not read from URLs."""
        assert isinstance(self.path, Path)
        return self.path


@dataclass(frozen=True)
class ReadingOptions:
    """How inputs are read; `python -m data_prep convert --help` explains each of the flags."""

    obs_columns: ObsColumns = field(default_factory=ObsColumns)
    # Kinds by modality, where its name says none.
    kinds: dict[str, str] = field(default_factory=dict)
    layers: PerModality = field(default_factory=lambda: PerModality("--layer"))
    id_columns: PerModality = field(default_factory=lambda: PerModality("--feature-ids"))
    barcodes: PerModality = field(default_factory=lambda: PerModality("--barcodes"))
    cut_sites: bool = False
    feature_types: PerModality = field(default_factory=lambda: PerModality("--feature-type"))


@dataclass(frozen=True)
class FeatureChoice:
    """Which features a modality gets."""

    mode: Mode | None = None  # None: `effective_mode` decides
    listed: tuple[str, ...] | None = None  # names of features, which decide instead of the files
    bin_width: int | None = None  # base pairs of the genome bins that peaks or fragments become
    top_features: int | None = None  # how many to keep, chosen from the cells

    @property
    def effective_mode(self) -> Mode:
        """How files come together. Bins are united: one that a file lacks was not hit there."""
        return self.mode or ("union" if self.bin_width else "same")

    def describe_identity(self) -> dict[str, Any]:
        """JSON-able; changes with whatever changes the features."""
        digest = None
        if self.listed is not None:
            digest = hashlib.sha256("\n".join(self.listed).encode()).hexdigest()
        return {
            "mode": self.effective_mode,
            "list_sha256": digest,
            "bins": self.bin_width,
            "top": self.top_features,
        }
