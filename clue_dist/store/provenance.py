"""What the provenance of a manifest may hold: where the cells came from, for people to read. Others may write stores
too, so that any of it may be missing, and more may be there; what is there must be of these types."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, ConfigDict, Field


class _Note(BaseModel):
    model_config = ConfigDict(strict=True)


class FeatureFit(_Note):
    """How the features of an input fit those of the store."""

    missing: int
    extra: int


class InputFile(_Note):
    """An input file."""

    file: str
    modality: str
    dataset: str
    cells: int
    empty: int
    features: FeatureFit
    names: str = "var_names"
    counted: str = ""


class FeatureDecision(_Note):
    """How the features of a modality were decided."""

    mode: str
    list_sha256: str | None
    bins: int | None


class FeatureSelection(_Note):
    kept: int
    of: int
    by: str


class CellTally(_Note):
    into: int = Field(0, alias="in")
    dropped: int = 0


class Provenance(_Note):
    tool: str = "?"
    cells: CellTally = CellTally()
    inputs: list[InputFile] = []
    features: dict[str, FeatureDecision] = {}
    selected: dict[str, FeatureSelection] = {}
    columns: dict[str, str] = {}
    appended: list[Provenance] = []


def _checked(notes: dict[str, Any]) -> dict[str, Any]:
    Provenance.model_validate(notes)
    return notes


Notes = Annotated[dict[str, Any], AfterValidator(_checked)]
