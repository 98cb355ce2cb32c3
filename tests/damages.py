"""Random damages of a store: a place is missing, was cut short, or one byte of it was changed."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import google_crc32c
import numpy as np

from clue_dist.store.layout import MANIFEST
from clue_dist.store.manifest import Manifest

Rng = np.random.Generator
KINDS = ("missing", "truncated", "flipped")
PLACES = ("chunk", "shard", "metadata", "manifest")
# Bytes of a chunk's offset and size in a shard's index, and of the checksum behind all of them.
ENTRY, CRC = 16, 4
NO_CHUNK = 2**64 - 1  # offset and size by which an index says that a chunk was never written


@dataclass(frozen=True)
class Damage:
    """One damage of a store."""

    kind: str  # of KINDS
    place: str  # of PLACES
    file: str  # in the store
    detail: str  # where in the file
    content: bytes | None  # of the file; None: it is gone

    def __str__(self) -> str:
        return f"{self.kind} {self.place}: {self.file} {self.detail}".rstrip()

    @contextmanager
    def apply_to(self, root: Path) -> Iterator[None]:
        """The store with the damage in it, and afterwards without."""
        path = root / self.file
        sound = path.read_bytes()
        write_or_remove(path, self.content)
        try:
            yield
        finally:
            path.write_bytes(sound)


def write_or_remove(path: Path, content: bytes | None) -> None:
    path.unlink() if content is None else path.write_bytes(content)


def draw_damages(root: Path, kind: str, count: int, seed: int) -> Iterator[Damage]:
    """Random damages of a sound store, in every kind of place by turns; it is left as it is."""
    rng = np.random.default_rng([seed, KINDS.index(kind)])
    shards = sorted(Manifest.read(root).shards)
    metadata = sorted(path.relative_to(root).as_posix() for path in root.rglob("zarr.json"))
    files = {"chunk": shards, "shard": shards, "metadata": metadata, "manifest": [MANIFEST]}
    for i in range(count):
        place = PLACES[i % len(PLACES)]
        file = str(rng.choice(files[place]))
        sound = (root / file).read_bytes()
        if place == "chunk":
            content, detail = harm_chunk(sound, count_chunks(root, file), kind, rng)
        else:
            content, detail = harm_bytes(sound, kind, rng)
        assert content != sound
        yield Damage(kind, place, file, detail, content)


def harm_bytes(sound: bytes, kind: str, rng: Rng) -> tuple[bytes | None, str]:
    """What a damage of this kind leaves of some bytes, and where it is."""
    if kind == "missing":
        return None, ""
    place = int(rng.integers(len(sound)))
    if kind == "truncated":
        return sound[:place], f"after byte {place} of {len(sound)}"
    other = bytes([sound[place] ^ int(rng.integers(1, 256))])
    return sound[:place] + other + sound[place + 1 :], f"byte {place} of {len(sound)}"


def harm_chunk(shard: bytes, chunks: int, kind: str, rng: Rng) -> tuple[bytes, str]:
    """A chunk is missing or shorter by its shard's index, with a checksum that fits; or flipped."""
    start = len(shard) - CRC - ENTRY * chunks
    index = np.frombuffer(shard[start:-CRC], "<u8").reshape(-1, 2).copy()
    chunk = int(rng.choice(np.flatnonzero(index[:, 0] != NO_CHUNK)))
    offset, size = index[chunk].tolist()
    changed, detail = harm_bytes(shard[offset : offset + size], kind, rng)
    detail = f"chunk {chunk} {detail}".rstrip()
    if kind == "flipped":
        return shard[:offset] + (changed or b"") + shard[offset + size :], detail
    index[chunk] = NO_CHUNK if changed is None else (offset, len(changed))
    return shard[:start] + sign_index(index.tobytes()), detail


def sign_index(index: bytes) -> bytes:
    return index + int(google_crc32c.value(index)).to_bytes(CRC, "little")


def count_chunks(root: Path, file: str) -> int:
    manifest, (_, stratum, *_) = Manifest.read(root), file.split("/")
    specs = manifest.specify_arrays(stratum)
    spec = next(spec for spec in specs if file.startswith(f"{spec.path}/c/"))
    return spec.shard[0] // spec.chunk[0]
