"""What the manifest lists: modalities, segments of cells, the digests of files."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    StringConstraints,
    model_validator,
)

from clue_dist.errors import format_count, list_names
from clue_dist.kinds import KINDS, Storage
from clue_dist.store import layout
from clue_dist.store.obs_columns import Names


class _ManifestPart(BaseModel):
    """A part of the manifest: frozen, and without fields of another version."""

    model_config = ConfigDict(extra="forbid", frozen=True)


def _require_known_kind(name: str) -> str:
    """Refuse what is no row of the table of kinds; for pydantic."""
    if name not in KINDS:
        raise ValueError(f"unknown kind {name!r}, known are {list_names(KINDS)}")
    return name


KindName = Annotated[str, AfterValidator(_require_known_kind)]
Number = Annotated[int, Field(ge=0)]
Sha256 = Annotated[str, StringConstraints(pattern="^([0-9a-f]{64})?$")]
# The path of a file inside the store. No part of it can lead out of the store.
FileName = Annotated[
    str, StringConstraints(pattern=r"^[A-Za-z0-9][A-Za-z0-9_+.-]*(/[A-Za-z0-9][A-Za-z0-9_+.-]*)*$")
]


class Modality(_ManifestPart):
    """A modality of the store."""

    kind: KindName  # what was measured
    storage: Storage  # how it lies on disk; follows from the kind
    # Names of the features, in the order of the columns.
    features: Names = Field(min_length=1, max_length=layout.MAX_FEATURES)

    @model_validator(mode="after")
    def _require_storage_of_kind(self) -> Modality:
        """Refuse a storage that is not the one of the kind."""
        expected = KINDS[self.kind].storage
        if self.storage != expected:
            raise ValueError(f"{self.kind} is stored {expected}, not {self.storage}")
        return self

    def __repr__(self) -> str:
        return f"Modality({self.kind}, {format_count(self.n_features, 'feature')})"

    @property
    def n_features(self) -> int:
        """Number of features."""
        return len(self.features)


Unsigned = Literal["uint8", "uint16", "uint32", "uint64"]


class PackedModality(_ManifestPart):
    """How a modality is packed in one segment."""

    # Dense modalities: the type of their values.
    values: Unsigned | Literal["float32"] | None = None
    # Sparse modalities: non-zeros of the largest block, bits of a code that hold the count, numbers
    # in the `rest` of the largest block, and the type of these; see `rows`.
    capacity: int = Field(default=0, ge=0, le=2**31)
    bits: Literal[0, 2] = 0
    rest: int = Field(default=0, ge=0, le=2**31)
    rest_type: Literal["uint8", "uint16", "uint32"] | None = None


class Segment(_ManifestPart):
    """Cells of one stratum that were written together, shuffled."""

    modalities: list[str]  # those that each of the cells carries, in the manifest's order
    n_cells: int = Field(ge=1)
    shard_blocks: int = Field(ge=1)  # blocks of a shard
    barcode_width: int = Field(ge=1, le=layout.MAX_BARCODE_BYTES)  # bytes of the longest barcode
    packed: dict[str, PackedModality]  # by modality
    batch_counts: dict[str, Number]  # cells, by name of their batch
    label_counts: dict[str, Number]  # cells, by name of their label


class FileDigest(_ManifestPart):
    """Size and hash of one file: a shard, or a zarr.json."""

    bytes: Number
    sha256: Sha256
