"""The manifest: what a reader must know of a store before it touches an array.

It lists modalities, segments and the digest of every file, and carries the store's fingerprint.
The names of its fields are those of the JSON, where `strata` holds the segments of all strata.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from functools import partial
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from clue_dist.errors import StoreError
from clue_dist.files import write_file
from clue_dist.store import layout, location
from clue_dist.store.batch_vocabulary import BatchVocabulary, require_fitting_levels
from clue_dist.store.layout import ArraySpec, Codec
from clue_dist.store.location import Location
from clue_dist.store.manifest_parts import FileDigest, FileName, Modality, Segment
from clue_dist.store.obs_columns import KeptColumn, Names, name_kept_array
from clue_dist.store.provenance import Notes


class Manifest(BaseModel):
    """What a store holds. Writing the manifest is what makes the store exist."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    format: Literal["clue_dist.store"] = "clue_dist.store"
    version: Literal[2] = 2
    block_cells: int = Field(default=layout.BLOCK_CELLS, ge=1, le=65536)
    codec: Codec = "balanced"
    modalities: dict[str, Modality]  # in the order that the model has them in, too
    batches: Names  # a cell's batch code is a place in this list
    # By name, the level of each batch, or ""; a store of one covariate does not list it.
    batch_covariates: dict[str, list[str]] = {}
    labels: Names  # a cell's label code is a place in this list
    obs_columns: dict[str, KeptColumn] = {}  # by name; a store without any does not list them
    strata: dict[str, Segment] = Field(min_length=1)  # by name of the segment
    shards: dict[FileName, FileDigest]
    # The fingerprint leaves out what follows. Equal cells may come from other files, and
    # zarr-python may write another zarr.json of the same array.
    provenance: Notes = {}
    metadata: dict[FileName, FileDigest] = {}  # of every zarr.json
    fingerprint: str = ""
    seal: str = ""  # SHA-256 of the manifest's file, taken while this field was empty

    @model_validator(mode="after")
    def _require_consistent_names(self) -> Manifest:
        """Refuse segments that do not fit their names, modalities, batches or labels."""
        for name in self.modalities:
            if not layout.MODALITY_NAME.fullmatch(name) or name in layout.RESERVED_NAMES:
                raise ValueError(f"modality name {name!r} is not a plain name")
        require_fitting_levels(self.batches, self.batch_covariates)
        segments_seen: Counter[str] = Counter()  # by stratum
        for name, segment in self.strata.items():
            stratum = layout.name_stratum(name)
            segments_seen[stratum] += 1
            in_order = [m for m in self.modalities if m in segment.modalities]
            if segment.modalities != in_order or not in_order:
                raise ValueError(
                    f"segment {name!r} lists modalities {segment.modalities}, "
                    f"known are {list(self.modalities)}"
                )
            expected = layout.name_segment(segment.modalities, segments_seen[stratum])
            if name != expected or set(segment.packed) != set(segment.modalities):
                raise ValueError(
                    f"segment {name!r} does not fit its modalities {segment.modalities}"
                )
            self._require_packed_as_stored(name, segment)
            self._require_known_codes(name, segment)
        return self

    def _require_packed_as_stored(self, name: str, segment: Segment) -> None:
        """Refuse a dense modality that is packed as a sparse one, or the other way round."""
        for modality, packed in segment.packed.items():
            storage = self.modalities[modality].storage
            is_dense = storage == "dense"
            if is_dense != (packed.values is not None) or is_dense == (
                packed.rest_type is not None
            ):
                raise ValueError(
                    f"segment {name!r} packs {modality!r} against its storage {storage!r}"
                )

    def _require_known_codes(self, name: str, segment: Segment) -> None:
        """Refuse counts of unknown batches or labels, or of more cells than there are."""
        for field, counts, names in (
            ("batch", segment.batch_counts, self.batches),
            ("label", segment.label_counts, self.labels),
        ):
            if not counts.keys() <= set(names) or sum(counts.values()) > segment.n_cells:
                raise ValueError(
                    f"{field}_counts of segment {name!r} do not fit its cells and {field} names"
                )

    @model_validator(mode="after")
    def _require_real_sizes(self) -> Manifest:
        """Refuse an array that is larger than its cells and features can make it.

        A forged manifest is thus refused before memory is allocated for what it promises.
        """
        for name, segment in self.strata.items():
            limit = layout.limit_shard_blocks(segment.n_cells, self.block_cells)
            if segment.shard_blocks > limit or segment.shard_blocks % layout.NARROW_CHUNK_BLOCKS:
                raise ValueError(
                    f"segment {name!r} has shards of {segment.shard_blocks} blocks, "
                    f"more than {limit} or uneven"
                )
            for modality, packed in segment.packed.items():
                block_cells = min(self.block_cells, segment.n_cells)
                block_values = block_cells * self.modalities[modality].n_features
                if packed.capacity > block_values or packed.rest > 3 * block_values:
                    raise ValueError(
                        f"a block of {modality!r} in segment {name!r} has {block_values} values, "
                        "and is packed as more"
                    )
            for spec in self.specify_arrays(name):
                if not 0 < spec.chunk_bytes <= layout.MAX_CHUNK_BYTES:
                    raise ValueError(
                        f"{spec.path} has chunks of {spec.chunk_bytes} bytes, "
                        f"at most {layout.MAX_CHUNK_BYTES}"
                    )
        return self

    @property
    def n_cells(self) -> int:
        """Number of cells in all segments."""
        return sum(segment.n_cells for segment in self.strata.values())

    @property
    def batch_vocabulary(self) -> BatchVocabulary:
        """The batches, and their levels of each covariate."""
        column = self.provenance.get("columns", {}).get("batch", "")
        return BatchVocabulary.from_lists(self.batches, self.batch_covariates, column)

    def compute_fingerprint(self) -> str:
        """Hash what the cells decide: equal cells give an equal fingerprint.

        Returns:
            SHA-256 in hexadecimal.
        """
        left_out = {"provenance", "metadata", "fingerprint", "seal"}
        content = self.model_dump(mode="json", exclude=left_out | self._list_unused_fields())
        text = json.dumps(content, sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(text.encode()).hexdigest()

    def specify_arrays(self, name: str) -> list[ArraySpec]:
        """List the arrays of a segment, those of `obs` first."""
        segment, width = self.strata[name], self.block_cells
        narrow = partial(self._specify_array, name, chunk_blocks=layout.NARROW_CHUNK_BLOCKS)
        wide = partial(self._specify_array, name, chunk_blocks=1)
        specs = [
            narrow("obs/batch", tail=(width,), dtype="int32"),
            narrow("obs/label", tail=(width,), dtype="int32"),
            narrow("obs/barcode", tail=(width, segment.barcode_width), dtype="uint8"),
        ]
        specs += [
            narrow(f"obs/{name_kept_array(number)}", tail=(width,), dtype=column.dtype)
            for number, column in enumerate(self.obs_columns.values())
        ]
        for modality in segment.modalities:
            packed = segment.packed[modality]
            if packed.values is not None:
                tail = (width, self.modalities[modality].n_features)
                specs.append(wide(f"{modality}/values", tail=tail, dtype=packed.values))
                continue
            assert packed.rest_type is not None
            specs += [
                narrow(f"{modality}/lengths", tail=(width, 3), dtype="uint32"),
                wide(
                    f"{modality}/codes",
                    tail=(packed.capacity,),
                    dtype="uint8",
                    lz4_is_idle=packed.bits == 0,
                ),
                wide(f"{modality}/rest", tail=(packed.rest,), dtype=packed.rest_type),
            ]
        return specs

    def _specify_array(
        self,
        name: str,
        array: str,
        tail: tuple[int, ...],
        dtype: str,
        chunk_blocks: int,
        lz4_is_idle: bool = False,
    ) -> ArraySpec:
        """Specify one array of a segment; `tail` is the shape of what it holds of a block."""
        segment = self.strata[name]
        return ArraySpec(
            path=f"strata/{name}/{array}",
            shape=(layout.count_blocks(segment.n_cells, self.block_cells), *tail),
            chunk=(chunk_blocks, *tail),
            shard=(segment.shard_blocks, *tail),
            dtype=dtype,
            compressor=layout.choose_compressor(self.codec, lz4_is_idle),
        )

    def lists_every_shard(self) -> bool:
        """Whether the manifest lists exactly the shards that its arrays have."""
        specs = [spec for name in self.strata for spec in self.specify_arrays(name)]
        # A forged manifest may promise more shards than there is memory for their names.
        if sum(spec.n_shards for spec in specs) != len(self.shards):
            return False
        return self.shards.keys() == {file for spec in specs for file in spec.list_shard_files()}

    def write(self, root: Path) -> Manifest:
        """Sign the manifest and write it as a whole, durably.

        Args:
            root: the store's folder.

        Returns:
            The manifest as it was written, with fingerprint and seal.
        """
        signed = self.model_copy(update={"fingerprint": self.compute_fingerprint(), "seal": ""})
        signed = signed.model_copy(update={"seal": hashlib.sha256(signed._encode()).hexdigest()})
        write_file(root / layout.MANIFEST, signed._encode(), durable=True)
        return signed

    def _encode(self) -> bytes:
        """Return the content of the manifest's file."""
        return self.model_dump_json(indent=1, exclude=self._list_unused_fields()).encode()

    def _list_unused_fields(self) -> set[str]:
        """List the fields that a manifest without them lacks, as earlier versions wrote it."""
        return {name for name in ("obs_columns", "batch_covariates") if not getattr(self, name)}

    def is_sealed(self, content: bytes) -> bool:
        """Whether the file that this manifest was read from is to the byte what `write` wrote.

        The fingerprint does not see the provenance and the metadata; the seal does.

        Args:
            content: what the file holds.
        """
        unsealed = b"".join(content.rsplit(self.seal.encode(), 1)) if self.seal else content
        return hashlib.sha256(unsealed).hexdigest() == self.seal

    @classmethod
    def read(cls, root: Location) -> Manifest:
        """Read and verify the manifest of a store.

        Raises:
            StoreError: there is no store or an unfinished one, the manifest is of another version
                or was edited, or a server fails.
        """
        path = root / layout.MANIFEST
        content = location.read_file(root, layout.MANIFEST)
        if content is None:
            raise StoreError(
                "no store here",
                where=root,
                got=f"no {layout.MANIFEST}",
                fix=_suggest_conversion(root),
            )
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
        # The seal is quick to check. The fingerprint takes longer than all else that is done here,
        # so it is computed only where the seal is broken.
        if not manifest.is_sealed(content):
            manifest.verify_fingerprint(root)
        return manifest

    def verify_fingerprint(self, root: Location) -> None:
        """Compare the content of the manifest with its fingerprint.

        Raises:
            StoreError: they differ.
        """
        expected = self.compute_fingerprint()
        if self.fingerprint != expected:
            raise StoreError(
                "the manifest was changed after it was written",
                where=root / layout.MANIFEST,
                got=self.fingerprint[:16],
                expected=expected[:16],
                fix="convert again from the source files, or restore the manifest",
            )


def is_store(folder: Path) -> bool:
    """Whether a folder is a store, of any version. Other programs write a manifest.json, too."""
    try:
        tree = json.loads((folder / layout.MANIFEST).read_bytes())
    except (OSError, ValueError):
        return False
    return isinstance(tree, dict) and tree.get("format") == layout.FORMAT


def _suggest_conversion(root: Location) -> str:
    """Say how to get a store where there is none."""
    if isinstance(root, Path) and Path(f"{root.resolve()}.partial").exists():
        return "run the same `python -m data_prep convert` again: it goes on where it stopped"
    return "make one with `python -m data_prep convert ... --out STORE.zarr`, or correct the path"
