"""What the provenance of a manifest may hold: where the cells came from, for people to read.

Others may write stores too. Any field may therefore be missing, and there may be more of them; but
a field that is there has the type that is given here.
"""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, ConfigDict, Field


class _Note(BaseModel):
    """A part of the provenance."""

    model_config = ConfigDict(strict=True)


class FeatureFit(_Note):
    """How the features of an input fit those of the store."""

    missing: int  # features of the store that the input lacks
    extra: int  # features of the input that the store lacks


class InputFile(_Note):
    """One modality of an input file."""

    file: str
    modality: str
    dataset: str
    cells: int
    empty: int  # cells without any count
    features: FeatureFit
    names: str = "var_names"  # the column of var that the features' names were taken from
    counted: str = ""  # what was counted of fragments


class FeatureDecision(_Note):
    """How the features of a modality were decided."""

    mode: str
    list_sha256: str | None  # hash of the list of features that was given
    bins: int | None  # width of the genome bins, in base pairs


class FeatureSelection(_Note):
    """How features were selected by the cells."""

    kept: int
    total: int = Field(alias="of")
    by: str  # the measure


class CellTally(_Note):
    """How many cells the inputs have, and how many of them were dropped."""

    into: int = Field(0, alias="in")
    dropped: int = 0
    # Barcodes that joined a cell with another barcode; only where barcodes pair by their core.
    paired_by_core: int = 0


class StorePart(_Note):
    """How a store was cut in two, and which part this is."""

    whole: list[str]  # what identifies the cells of the store that was cut; see `identify_cells`
    rule: str  # the same for both parts, and another where another rule cut the store
    side: str  # "train" or "test"


class Provenance(_Note):
    """Where the cells of a store came from."""

    tool: str = "?"
    cells: CellTally = CellTally()
    inputs: list[InputFile] = []
    features: dict[str, FeatureDecision] = {}  # by modality
    selected: dict[str, FeatureSelection] = {}  # by modality
    columns: dict[str, str] = {}  # the columns of obs that gave batch and label
    appended: list[Provenance] = []  # one for each addition
    before: str = ""  # of an addition: the fingerprint that the store had before
    parts: list[StorePart] = []  # the cuts that led to this store, from the whole on


def _require_provenance(notes: dict[str, Any]) -> dict[str, Any]:
    """Refuse fields of another type, and keep everything as it is; for pydantic."""
    Provenance.model_validate(notes)
    return notes


Notes = Annotated[dict[str, Any], AfterValidator(_require_provenance)]
