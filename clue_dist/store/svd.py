"""The leading singular vectors of a modality over all its cells, stored beside the cells.

    STORE.zarr/svd/rna.json          the note: what was computed, from which cells, and how
    STORE.zarr/svd/rna-<hash>.npz    the arrays of `StoredSvd`

The store's fingerprint is that of its cells; an SVD does not change it. The note has a digest of
its own, and names the fingerprint of the cells. It is written last: without it there is no SVD.
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
from clue_dist.store.manifest import Manifest
from clue_dist.store.manifest_parts import FileDigest

FOLDER = "svd"
VERSION = 1
_MAX_NOTE_BYTES = 2**20
_FIX = "compute it again with `python -m data_prep svd STORE`, or remove the store's folder `svd`"


class SvdNote(BaseModel):
    """How an SVD was computed, and the digests that show whether it is whole.

    A change of `normalise` that changes values must raise the version.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    format: Literal["clue_dist.svd"] = "clue_dist.svd"
    version: Literal[1] = 1
    store: str  # fingerprint of the cells
    modality: str
    normalise: str  # how counts were normalised; see `normalise.normalise_rows`
    n_cells: int = Field(ge=1)
    n_features: int = Field(ge=1)
    components: int = Field(ge=1, le=10**6)
    power: int = Field(ge=0)  # power iterations
    seed: int
    arrays: FileDigest = FileDigest(bytes=0, sha256="")  # digest of the file with the arrays
    digest: str = ""  # SHA-256 of all fields above

    def compute_digest(self) -> str:
        """Return the SHA-256 of the note without its digest, in hexadecimal."""
        content = self.model_dump(mode="json", exclude={"digest"})
        text = json.dumps(content, sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(text.encode()).hexdigest()

    @property
    def arrays_file(self) -> str:
        """Path of the file with the arrays, inside the store."""
        return f"{FOLDER}/{self.modality}-{self.arrays.sha256[:16]}.npz"

    @property
    def file_names(self) -> set[str]:
        """Paths of both files, inside the store."""
        return {_name_note(self.modality), self.arrays_file}


@dataclass(frozen=True)
class StoredSvd:
    """Right singular vectors of (x - mean) / scale, where x are the normalised cells."""

    note: SvdNote
    loadings: np.ndarray  # (features, components) float32, zero beyond the rank
    singular: np.ndarray  # (components,) float64
    idf: np.ndarray  # (features,) float64: inverse frequency, for tf-idf
    mean: np.ndarray  # (features,) float64
    scale: np.ndarray  # (features,) float64


_ARRAYS = [field.name for field in fields(StoredSvd) if field.name != "note"]
# Readers of the header of a .npy file, by version of the format.
_HEADERS = {
    (1, 0): np.lib.format.read_array_header_1_0,
    (2, 0): np.lib.format.read_array_header_2_0,
}


def write_svd(root: Path, svd: StoredSvd) -> SvdNote:
    """Save an SVD in its store, durably, in place of an earlier one of the modality.

    Returns:
        The note as it was written, with digests.
    """
    buffer = io.BytesIO()
    np.savez(buffer, **{name: getattr(svd, name) for name in _ARRAYS})
    content = buffer.getvalue()
    arrays = FileDigest(bytes=len(content), sha256=hashlib.sha256(content).hexdigest())
    unsigned = svd.note.model_copy(update={"arrays": arrays})
    note = unsigned.model_copy(update={"digest": unsigned.compute_digest()})
    (root / FOLDER).mkdir(exist_ok=True)
    write_file(root / note.arrays_file, content, durable=True)
    text = json.dumps(note.model_dump(mode="json"), indent=1)
    write_file(root / _name_note(note.modality), text, durable=True)
    # Remove the arrays of an earlier SVD. A modality may be called "rna-x": its files stay.
    for other in (root / FOLDER).glob(f"{note.modality}-*.npz"):
        is_ours = len(other.stem) == len(note.modality) + 17  # the name, a dash and 16 digits
        if is_ours and f"{FOLDER}/{other.name}" != note.arrays_file:
            other.unlink()
    return note


def read_svd_note(root: Location, manifest: Manifest, modality: str) -> SvdNote | None:
    """Read the note of a modality's SVD; None where there is none.

    Raises:
        StoreError: the note is damaged or is that of other cells, or a server fails.
    """
    name = _name_note(modality)
    where = root / name
    content = location.read_file(root, name, optional=True, max_bytes=_MAX_NOTE_BYTES)
    if content is None:
        return None
    try:
        note = SvdNote.model_validate_json(content)
    except ValidationError as error:
        first = error.errors()[0]
        field = ".".join(map(str, first["loc"])) or "top level"
        raise _make_damage_error(where, f"{field}: {first['msg']}") from None
    if note.digest != note.compute_digest():
        raise _make_damage_error(where, f"digest {note.digest[:16]}", note.compute_digest()[:16])
    expected = (manifest.fingerprint, modality, manifest.modalities[modality].n_features)
    if (note.store, note.modality, note.n_features) != expected:
        raise StoreError(
            "the SVD was computed from other cells",
            where=where,
            got=f"those of fingerprint {note.store[:16]}",
            expected=manifest.fingerprint[:16],
            fix=_FIX,
        )
    return note


def read_svd(root: Location, manifest: Manifest, modality: str) -> StoredSvd | None:
    """Read the SVD of a modality, and verify every byte; None where there is none.

    Raises:
        StoreError: the arrays are missing or damaged, or `read_svd_note` raises it.
    """
    note = read_svd_note(root, manifest, modality)
    if note is None:
        return None
    where = root / note.arrays_file
    content = location.read_file(root, note.arrays_file, max_bytes=note.arrays.bytes)
    if content is None:
        raise _make_damage_error(where, "no such file")
    digest = FileDigest(bytes=len(content), sha256=hashlib.sha256(content).hexdigest())
    if digest != note.arrays:
        raise _make_damage_error(where, _describe_digest(digest), _describe_digest(note.arrays))
    try:
        with zipfile.ZipFile(io.BytesIO(content)) as file:
            arrays = {
                name: _read_array(
                    file, f"{name}.npy", _expect_shape(note, name), _expect_type(name)
                )
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
        raise _make_damage_error(where, str(error)) from None
    return StoredSvd(note, **arrays)


def _read_array(file: zipfile.ZipFile, name: str, shape: tuple[int, ...], dtype: str) -> np.ndarray:
    """Read one array of an .npz file.

    The header may be forged: memory is allocated for what is expected, not for what it promises.

    Raises:
        ValueError, KeyError: The array is missing, is another, or holds NaN or Inf.
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
    """Verify the SVDs of a store.

    Returns:
        What is wrong, a line each; and the paths of the files that belong to SVDs.
    """
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
            files.add(_name_note(modality))
    return problems, files


def list_svds(root: Location, manifest: Manifest) -> dict[str, SvdNote]:
    """Read the notes of the modalities that have an SVD; raise what `read_svd_note` raises."""
    notes = {m: read_svd_note(root, manifest, m) for m in manifest.modalities}
    return {m: note for m, note in notes.items() if note is not None}


def _name_note(modality: str) -> str:
    """Return the path of a modality's note, inside the store."""
    return f"{FOLDER}/{modality}.json"


def _expect_shape(note: SvdNote, name: str) -> tuple[int, ...]:
    """Return the shape that an array of an SVD must have."""
    shapes = {"loadings": (note.n_features, note.components), "singular": (note.components,)}
    return shapes.get(name, (note.n_features,))


def _expect_type(name: str) -> str:
    """Return the type that an array of an SVD must have."""
    return "<f4" if name == "loadings" else "<f8"


def _describe_digest(digest: FileDigest) -> str:
    """Write a digest for an error message."""
    return f"{digest.bytes} bytes, sha256 {digest.sha256[:16]}"


def _make_damage_error(where: object, found: str, expected: str | None = None) -> StoreError:
    """Make the error for an SVD that is damaged."""
    return StoreError(
        "the stored SVD is damaged", where=where, got=found, expected=expected, fix=_FIX
    )
