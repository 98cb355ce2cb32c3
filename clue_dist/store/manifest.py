"""The manifest: everything a reader must know before it touches an array, and the store's fingerprint."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from functools import partial
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    StringConstraints,
    ValidationError,
    model_validator,
)

from clue_dist.errors import StoreError, list_names
from clue_dist.files import write_file
from clue_dist.kinds import KINDS, Storage
from clue_dist.store import layout, location
from clue_dist.store.layout import ArraySpec, Codec
from clue_dist.store.location import Location
from clue_dist.store.provenance import Notes


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


def _unrepeated(names: list[str]) -> list[str]:
    if len(set(names)) < len(names):
        raise ValueError(f"{len(names) - len(set(names))} names that occur more than once")
    return names


def _require_known_kind(name: str) -> str:
    if name not in KINDS:
        raise ValueError(f"unknown kind {name!r}, known are {list_names(KINDS)}")
    return name


KindName = Annotated[str, AfterValidator(_require_known_kind)]
Names = Annotated[list[str], AfterValidator(_unrepeated)]
Number = Annotated[int, Field(ge=0)]
Sha256 = Annotated[str, StringConstraints(pattern="^([0-9a-f]{64})?$")]
# Of a file in the store: no part of it leads up or out.
FileName = Annotated[
    str, StringConstraints(pattern=r"^[A-Za-z0-9][A-Za-z0-9_+.-]*(/[A-Za-z0-9][A-Za-z0-9_+.-]*)*$")
]


class Modality(_Strict):
    """One modality: what was measured, how it lies on disk, its features in column order."""

    kind: KindName
    storage: Storage
    features: Names = Field(min_length=1, max_length=layout.MAX_FEATURES)

    @model_validator(mode="after")
    def _as_its_kind(self) -> Modality:
        expected = KINDS[self.kind].storage
        if self.storage != expected:
            raise ValueError(f"{self.kind} is stored {expected}, not {self.storage}")
        return self

    @property
    def n_features(self) -> int:
        return len(self.features)


Unsigned = Literal["uint8", "uint16", "uint32", "uint64"]


class PackedModality(_Strict):
    """How a modality is packed in one stratum: `values` where it is dense, else blocks of at most `capacity` non-zeros
    with `bits` of each for its count, and at most `rest` numbers of `rest_type` that did not fit."""

    values: Unsigned | Literal["float32"] | None = None
    capacity: int = Field(default=0, ge=0, le=2**31)
    bits: Literal[0, 2] = 0
    rest: int = Field(default=0, ge=0, le=2**31)
    rest_type: Literal["uint8", "uint16", "uint32"] | None = None


class Segment(_Strict):
    """Cells that carry exactly `modalities`, globally shuffled; of several segments, those of one."""

    modalities: list[str]
    n_cells: int = Field(ge=1)
    shard_blocks: int = Field(ge=1)
    barcode_width: int = Field(ge=1, le=layout.MAX_BARCODE_BYTES)
    packed: dict[str, PackedModality]
    batch_counts: dict[str, Number]
    label_counts: dict[str, Number]


class FileDigest(_Strict):
    """Size and SHA-256 of one file: a shard, or a zarr.json."""

    bytes: Number
    sha256: Sha256


class Manifest(_Strict):
    """The whole store at a glance. Writing it is what makes the store exist."""

    format: Literal["clue_dist.store"] = "clue_dist.store"
    version: Literal[2] = 2
    block_cells: int = Field(default=layout.BLOCK_CELLS, ge=1, le=65536)
    codec: Codec = "balanced"
    modalities: dict[str, Modality]
    batches: Names
    labels: Names
    strata: dict[str, Segment] = Field(min_length=1)
    shards: dict[FileName, FileDigest]
    # Not part of the fingerprint: where the cells came from, and every zarr.json, as zarr-python happens to write it.
    provenance: Notes = {}
    metadata: dict[FileName, FileDigest] = {}
    fingerprint: str = ""
    seal: str = ""  # SHA-256 of the manifest's file as it is without these letters

    @model_validator(mode="after")
    def _consistent(self) -> Manifest:
        order = list(self.modalities)
        for name in order:
            if not layout.MODALITY_NAME.fullmatch(name) or name in layout.RESERVED_NAMES:
                raise ValueError(f"modality name {name!r} is not a plain name")
        segments: Counter[str] = Counter()
        for name, stratum in self.strata.items():
            segments[layout.name_stratum(name)] += 1
            if (
                stratum.modalities != [m for m in order if m in stratum.modalities]
                or not stratum.modalities
            ):
                raise ValueError(
                    f"stratum {name!r} lists modalities {stratum.modalities}, known are {order}"
                )
            expected = layout.name_segment(stratum.modalities, segments[layout.name_stratum(name)])
            if name != expected or set(stratum.packed) != set(stratum.modalities):
                raise ValueError(
                    f"stratum {name!r} does not fit its modalities {stratum.modalities}"
                )
            for m, packed in stratum.packed.items():
                dense = self.modalities[m].storage == "dense"
                if dense != (packed.values is not None) or dense == (packed.rest_type is not None):
                    raise ValueError(
                        f"stratum {name!r} packs {m!r} against its storage {self.modalities[m].storage!r}"
                    )
            for field, of, names in (
                ("batch", stratum.batch_counts, self.batches),
                ("label", stratum.label_counts, self.labels),
            ):
                if not of.keys() <= set(names) or sum(of.values()) > stratum.n_cells:
                    raise ValueError(
                        f"{field}_counts of stratum {name!r} do not fit its cells and {field} names"
                    )
        return self

    @model_validator(mode="after")
    def _of_real_sizes(self) -> Manifest:
        """Before anything is allocated: no array is larger than its cells and features can make it."""
        for name, s in self.strata.items():
            most = layout.limit_shard_blocks(s.n_cells, self.block_cells)
            if s.shard_blocks > most or s.shard_blocks % layout.CHUNK_ROWS:
                raise ValueError(
                    f"stratum {name!r} has shards of {s.shard_blocks} blocks, more than {most} or uneven"
                )
            for m, packed in s.packed.items():
                values = min(self.block_cells, s.n_cells) * self.modalities[m].n_features
                if packed.capacity > values or packed.rest > 3 * values:
                    raise ValueError(
                        f"a block of {m!r} in stratum {name!r} has {values} values, and is packed as more"
                    )
            for spec in self.specify_arrays(name):
                if not 0 < spec.chunk_bytes <= layout.MAX_CHUNK_BYTES:
                    raise ValueError(
                        f"{spec.path} has chunks of {spec.chunk_bytes} bytes, at most {layout.MAX_CHUNK_BYTES}"
                    )
        return self

    @property
    def n_cells(self) -> int:
        return sum(s.n_cells for s in self.strata.values())

    def compute_fingerprint(self) -> str:
        """SHA-256 of the manifest's content, but for what the data do not decide: equal data, equal fingerprint."""
        content = self.model_dump(
            mode="json", exclude={"provenance", "metadata", "fingerprint", "seal"}
        )
        return hashlib.sha256(
            json.dumps(content, sort_keys=True, separators=(",", ":")).encode()
        ).hexdigest()

    def specify_arrays(self, stratum: str) -> list[ArraySpec]:
        """Specs of every array of a stratum, `obs` first."""
        s, size = self.strata[stratum], self.block_cells
        n = layout.count_blocks(s.n_cells, size)
        root, usual = f"strata/{stratum}", layout.choose_compressor(self.codec)
        narrow = partial(
            layout.specify_narrow_array, n_blocks=n, shard=s.shard_blocks, compressor=usual
        )
        wide = partial(layout.specify_wide_array, n_blocks=n, shard=s.shard_blocks)
        specs = [
            narrow(f"{root}/obs/batch", tail=(size,), dtype="int32"),
            narrow(f"{root}/obs/label", tail=(size,), dtype="int32"),
            narrow(f"{root}/obs/barcode", tail=(size, s.barcode_width), dtype="uint8"),
        ]
        for m in s.modalities:
            packed, features, folder = s.packed[m], self.modalities[m].n_features, f"{root}/{m}"
            if packed.values is not None:
                specs.append(
                    wide(
                        f"{folder}/values",
                        tail=(size, features),
                        dtype=packed.values,
                        compressor=usual,
                    )
                )
                continue
            assert packed.rest_type is not None
            of_codes = layout.choose_compressor(self.codec, lz4_is_idle=packed.bits == 0)
            specs.append(narrow(f"{folder}/lengths", tail=(size, 3), dtype="uint32"))
            specs.append(
                wide(f"{folder}/codes", tail=(packed.capacity,), dtype="uint8", compressor=of_codes)
            )
            specs.append(
                wide(
                    f"{folder}/rest", tail=(packed.rest,), dtype=packed.rest_type, compressor=usual
                )
            )
        return specs

    def lists_every_shard(self) -> bool:
        """Whether exactly the shards are listed that all arrays have."""
        specs = [spec for name in self.strata for spec in self.specify_arrays(name)]
        if sum(spec.n_shards for spec in specs) != len(self.shards):  # which may be absurdly many
            return False
        return self.shards.keys() == {file for spec in specs for file in spec.list_shard_files()}

    def write(self, root: Path) -> Manifest:
        """Sign and write the manifest durably: to a temporary name, synced, then renamed."""
        signed = self.model_copy(update={"fingerprint": self.compute_fingerprint(), "seal": ""})
        signed = signed.model_copy(update={"seal": hashlib.sha256(signed._text()).hexdigest()})
        write_file(root / layout.MANIFEST, signed._text(), durable=True)
        return signed

    def _text(self) -> bytes:
        return self.model_dump_json(indent=1).encode()

    def is_sealed(self, content: bytes) -> bool:
        """Whether `content`, of the file this was read from, is to the byte what `write` wrote, provenance and all."""
        unsealed = b"".join(content.rsplit(self.seal.encode(), 1)) if self.seal else content
        return hashlib.sha256(unsealed).hexdigest() == self.seal

    @classmethod
    def read(cls, root: Location) -> Manifest:
        """Read and verify the manifest of a store.

        Raises:
            StoreError: no store there, an unfinished conversion, a manifest that is not ours or was edited; a server
                that fails.
        """
        path, content = root / layout.MANIFEST, location.read_file(root, layout.MANIFEST)
        if content is None:
            unfinished = isinstance(root, Path) and root.with_name(root.name + ".partial").exists()
            fix = (
                "run the same `python -m data_prep convert` again: it goes on where it stopped"
                if unfinished
                else "make one with `python -m data_prep convert ... --out STORE.zarr`, or mend the path"
            )
            raise StoreError("no store here", where=root, got=f"no {layout.MANIFEST}", fix=fix)
        try:
            manifest = cls.model_validate_json(content)
        except ValidationError as error:
            first = error.errors()[0]
            field = ".".join(str(p) for p in first["loc"]) or "top level"
            raise StoreError(
                "the manifest does not describe a store of this version",
                where=f"{path}: {field}",
                got=first["msg"],
                expected=f"{layout.FORMAT} version {layout.VERSION}",
                fix="convert again from the source files",
            ) from None
        if not manifest.lists_every_shard():
            raise StoreError(
                "the manifest does not list the shards that its strata have",
                where=path,
                got=f"{len(manifest.shards)} shards",
                fix="convert again from the source files, or restore the manifest",
            )
        # A file that is to the byte what was written needs no closer look, which takes longer than all the rest.
        if not manifest.is_sealed(content):
            manifest.verify_fingerprint(root)
        return manifest

    def verify_fingerprint(self, root: Location) -> None:
        """Compare the content with its fingerprint.

        Raises:
            StoreError: they differ.
        """
        if self.fingerprint != self.compute_fingerprint():
            raise StoreError(
                "the manifest was changed after it was written",
                where=root / layout.MANIFEST,
                got=self.fingerprint[:16],
                expected=self.compute_fingerprint()[:16],
                fix="convert again from the source files, or restore the manifest",
            )


def find_largest_block(lengths: np.ndarray, block_cells: int) -> int:
    """The most of something in a block, at least 1. lengths: what each cell has, (n_cells,) in store order."""
    edges = np.arange(0, len(lengths), block_cells)
    return (
        int(np.add.reduceat(lengths.astype(np.int64), edges).max(initial=1)) if len(lengths) else 1
    )
