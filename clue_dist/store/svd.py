"""The leading singular vectors of a modality, over all its cells, kept beside them in the store.

    STORE.zarr/svd/rna.json                what was computed, from the store of which fingerprint, hash of the arrays
    STORE.zarr/svd/rna-<hash>.npz          the arrays of `Svd`

The store's own fingerprint is that of its cells, and an SVD does not change it. The note is signed by a digest of its
own and names the fingerprint that it was computed from; it is written last, and without it there is no SVD.
"""

from __future__ import annotations

import hashlib
import io
import json
import math
import zipfile
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from clue_dist.errors import StoreError
from clue_dist.files import write_file
from clue_dist.store import location
from clue_dist.store.location import Location
from clue_dist.store.manifest import FileDigest, Manifest

FOLDER = "svd"
VERSION = 1
_NOTE_BYTES = 2**20
_FIX = "compute it again with `python -m data_prep svd STORE`, or remove the store's folder `svd`"


class SvdNote(BaseModel):
    """How an SVD came about, and how to know that it is whole."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    format: Literal["clue_dist.svd"] = "clue_dist.svd"
    version: Literal[1] = 1
    store: str  # fingerprint of the cells
    modality: str
    normalise: str
    n_cells: int = Field(ge=1)
    n_features: int = Field(ge=1)
    components: int = Field(ge=1, le=10**6)
    power: int = Field(ge=0)
    seed: int
    arrays: FileDigest = FileDigest(bytes=0, sha256="")
    digest: str = ""

    def compute_digest(self) -> str:
        content = self.model_dump(mode="json", exclude={"digest"})
        return hashlib.sha256(
            json.dumps(content, sort_keys=True, separators=(",", ":")).encode()
        ).hexdigest()

    @property
    def arrays_file(self) -> str:
        return f"{FOLDER}/{self.modality}-{self.arrays.sha256[:16]}.npz"

    @property
    def file_names(self) -> set[str]:
        return {_name(self.modality), self.arrays_file}


@dataclass(frozen=True)
class StoredSvd:
    """Right singular vectors of (x - mean) / scale, x the normalised cells. loadings: (features, components) float32,
    zero beyond the rank; singular: (components,); idf, mean, scale: (features,); float64."""

    note: SvdNote
    loadings: np.ndarray
    singular: np.ndarray
    idf: np.ndarray
    mean: np.ndarray
    scale: np.ndarray


_ARRAYS = [f.name for f in fields(StoredSvd) if f.name != "note"]
_HEADERS = {
    (1, 0): np.lib.format.read_array_header_1_0,
    (2, 0): np.lib.format.read_array_header_2_0,
}


def write_svd(root: Path, svd: StoredSvd) -> SvdNote:
    """Save an SVD in its store, durably; one that was there is replaced. Returns its signed note."""
    buffer = io.BytesIO()
    np.savez(buffer, **{name: getattr(svd, name) for name in _ARRAYS})
    content = buffer.getvalue()
    arrays = FileDigest(bytes=len(content), sha256=hashlib.sha256(content).hexdigest())
    unsigned = svd.note.model_copy(update={"arrays": arrays})
    note = unsigned.model_copy(update={"digest": unsigned.compute_digest()})
    (root / FOLDER).mkdir(exist_ok=True)
    write_file(root / note.arrays_file, content, durable=True)
    text = json.dumps(note.model_dump(mode="json"), indent=1)
    write_file(root / _name(note.modality), text, durable=True)
    for old in (root / FOLDER).glob(f"{note.modality}-*.npz"):
        if f"{FOLDER}/{old.name}" != note.arrays_file and len(old.stem) == len(note.modality) + 17:
            old.unlink()
    return note


def read_svd_note(root: Location, manifest: Manifest, modality: str) -> SvdNote | None:
    """The note of a modality's SVD; None where there is none.

    Raises:
        StoreError: it is damaged, or of other cells; a server that fails.
    """
    where, content = (
        root / _name(modality),
        location.read_file(root, _name(modality), optional=True, most=_NOTE_BYTES),
    )
    if content is None:
        return None
    try:
        note = SvdNote.model_validate_json(content)
    except ValidationError as error:
        first = error.errors()[0]
        raise _damaged(
            where, f"{'.'.join(map(str, first['loc'])) or 'top level'}: {first['msg']}"
        ) from None
    if note.digest != note.compute_digest():
        raise _damaged(where, f"digest {note.digest[:16]}", note.compute_digest()[:16])
    expected = (manifest.fingerprint, modality, manifest.modalities[modality].n_features)
    if (note.store, note.modality, note.n_features) != expected:
        what, got = (
            "the SVD was computed from other cells",
            f"those of fingerprint {note.store[:16]}",
        )
        raise StoreError(what, where=where, got=got, expected=manifest.fingerprint[:16], fix=_FIX)
    return note


def read_svd(root: Location, manifest: Manifest, modality: str) -> StoredSvd | None:
    """The SVD of a modality, every byte verified; None where there is none.

    Raises:
        StoreError: see `read_note`; arrays that are missing or damaged.
    """
    note = read_svd_note(root, manifest, modality)
    if note is None:
        return None
    where, content = (
        root / note.arrays_file,
        location.read_file(root, note.arrays_file, most=note.arrays.bytes),
    )
    if content is None:
        raise _damaged(where, "no such file")
    got = FileDigest(bytes=len(content), sha256=hashlib.sha256(content).hexdigest())
    if got != note.arrays:
        raise _damaged(where, f"{got.bytes} bytes, sha256 {got.sha256[:16]}", _told(note.arrays))
    try:
        with zipfile.ZipFile(io.BytesIO(content)) as file:
            arrays = {
                name: _array(file, f"{name}.npy", _shape(note, name), _dtype(name))
                for name in _ARRAYS
            }
    except (
        ValueError,
        KeyError,
        EOFError,
        NotImplementedError,
        RecursionError,
        MemoryError,
        zipfile.BadZipFile,
    ) as error:
        raise _damaged(where, str(error)) from None
    return StoredSvd(note, **arrays)


def _array(file: zipfile.ZipFile, name: str, shape: tuple[int, ...], dtype: str) -> np.ndarray:
    """A member of an .npz as `write` leaves it: what its header says is believed only where it is what it should be.

    Raises:
        ValueError, KeyError: it is missing, something else, or not finite.
    """
    size = math.prod(shape) * np.dtype(dtype).itemsize
    stored = file.getinfo(name)
    if stored.compress_type != zipfile.ZIP_STORED or not size < stored.file_size < size + 2**16:
        raise ValueError(
            f"{name}: {stored.file_size} bytes, {dtype} {shape} are {size}, uncompressed"
        )
    with file.open(name) as member:
        version = np.lib.format.read_magic(member)
        header = _HEADERS[version](member) if version in _HEADERS else None
        content = member.read(size)
    if header is None or (header[0], header[2]) != (shape, np.dtype(dtype)) or len(content) != size:
        raise ValueError(f"{name}: {header}, not {dtype} {shape}")
    array = np.frombuffer(content, dtype).reshape(shape, order="F" if header[1] else "C").copy()
    if not np.isfinite(array).all():
        raise ValueError(f"{name} holds numbers that are not finite")
    return array


def verify_svd(root: Location, manifest: Manifest) -> tuple[list[str], set[str]]:
    """What is wrong with the SVDs of a store, a line each; and the files that belong to them."""
    problems, files = [], set()
    for modality in manifest.modalities:
        try:
            note = read_svd_note(root, manifest, modality)
            if note is None:
                continue
            files |= note.file_names
            read_svd(root, manifest, modality)
        except StoreError as error:
            problems.append(f"{error.where}: {error.what} ({error.got})")
            files.add(_name(modality))
    return problems, files


def list_svds(root: Location, manifest: Manifest) -> dict[str, SvdNote]:
    """The notes of the modalities that have an SVD; raises as `read_note` does."""
    notes = {m: read_svd_note(root, manifest, m) for m in manifest.modalities}
    return {m: note for m, note in notes.items() if note is not None}


def _name(modality: str) -> str:
    return f"{FOLDER}/{modality}.json"


def _shape(note: SvdNote, name: str) -> tuple[int, ...]:
    shapes = {"loadings": (note.n_features, note.components), "singular": (note.components,)}
    return shapes.get(name, (note.n_features,))


def _dtype(name: str) -> str:
    return "<f4" if name == "loadings" else "<f8"


def _told(shard: FileDigest) -> str:
    return f"{shard.bytes} bytes, sha256 {shard.sha256[:16]}"


def _damaged(where: object, got: str, expected: str | None = None) -> StoreError:
    return StoreError(
        "the stored SVD is damaged", where=where, got=got, expected=expected, fix=_FIX
    )
