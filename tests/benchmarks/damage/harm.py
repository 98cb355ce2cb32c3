"""Random damages of a store: a place that is missing, that was cut short, or of which one byte was changed."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

import google_crc32c
import numpy as np

from clue_dist.store.layout import MANIFEST
from clue_dist.store.manifest import Manifest

Kind = Literal["missing", "truncated", "flipped"]
What = Literal["chunk", "shard", "metadata", "manifest"]
KINDS: tuple[Kind, ...] = get_args(Kind)
PLACES: tuple[What, ...] = get_args(What)
ENTRY, CRC = (
    16,
    4,
)  # bytes of a chunk's offset and size in a shard's index, and of the checksum behind all of them
NO_CHUNK = b"\xff" * ENTRY  # how an index says that a chunk was never written


@dataclass(frozen=True)
class Damage:
    """kind, what: what was done to what; file: in the store; detail: where in it; content: of the file, None = gone."""

    kind: Kind
    what: What
    file: str
    detail: str
    content: bytes | None

    def __str__(self) -> str:
        return f"{self.kind} {self.what}: {self.file} {self.detail}".rstrip()


def damages(root: Path, kind: Kind, count: int, seed: int) -> Iterator[Damage]:
    """Random damages of a sound store, of which the kinds of place take turns; the store is left as it is."""
    rng = np.random.default_rng([seed, KINDS.index(kind)])
    files = files_of(root)
    for i in range(count):
        what = PLACES[i % len(PLACES)]
        file = str(rng.choice(files[what]))
        sound = (root / file).read_bytes()
        content, detail = (
            in_chunk(root, file, kind, rng) if what == "chunk" else in_bytes(sound, kind, rng)
        )
        assert content != sound
        yield Damage(kind, what, file, detail, content)


def files_of(root: Path) -> dict[What, list[str]]:
    """Files that hold each kind of place."""
    shards = sorted(Manifest.read(root).shards)
    metadata = sorted(path.relative_to(root).as_posix() for path in root.rglob("zarr.json"))
    return {"chunk": shards, "shard": shards, "metadata": metadata, "manifest": [MANIFEST]}


@contextmanager
def done(damage: Damage, root: Path) -> Iterator[None]:
    """The store with the damage in it, and afterwards without."""
    path = root / damage.file
    sound = path.read_bytes()
    path.unlink() if damage.content is None else path.write_bytes(damage.content)
    try:
        yield
    finally:
        path.write_bytes(sound)


def in_bytes(sound: bytes, kind: Kind, rng: np.random.Generator) -> tuple[bytes | None, str]:
    """What a damage of this kind leaves of some bytes, and where it is."""
    if kind == "missing":
        return None, ""
    at = int(rng.integers(len(sound)))
    if kind == "truncated":
        return sound[:at], f"after byte {at} of {len(sound)}"
    return sound[:at] + bytes([sound[at] ^ int(rng.integers(1, 256))]) + sound[
        at + 1 :
    ], f"byte {at} of {len(sound)}"


def in_chunk(root: Path, file: str, kind: Kind, rng: np.random.Generator) -> tuple[bytes, str]:
    """A damage inside a shard: the index says that a chunk is not there, or shorter, with a checksum that fits; or one
    of the chunk's bytes is another."""
    sound = (root / file).read_bytes()
    start = len(sound) - CRC - ENTRY * chunks_in(root, file)
    index = np.frombuffer(sound[start:-CRC], "<u8").reshape(-1, 2).copy()
    chunk = int(rng.choice(np.flatnonzero(index[:, 0] != np.iinfo(np.uint64).max)))
    offset, size = index[chunk].tolist()
    changed, detail = in_bytes(sound[offset : offset + size], kind, rng)
    detail = f"chunk {chunk} {detail}".rstrip()
    if kind == "flipped":
        assert changed is not None
        return sound[:offset] + changed + sound[offset + size :], detail
    if changed is None:
        index[chunk] = np.frombuffer(NO_CHUNK, "<u8")
    else:
        index[chunk, 1] = len(changed)
    return sound[:start] + signed(index.tobytes()), detail


def signed(index: bytes) -> bytes:
    return index + int(google_crc32c.value(index)).to_bytes(CRC, "little")


def chunks_in(root: Path, file: str) -> int:
    """Chunks that a shard has room for."""
    manifest, (_, stratum, *_) = Manifest.read(root), file.split("/")
    spec = next(s for s in manifest.specify_arrays(stratum) if file.startswith(f"{s.path}/c/"))
    return spec.shard[0] // spec.chunk[0]
