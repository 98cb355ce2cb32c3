"""Is a store exactly what its manifest says? Every file hashed, every block decoded, all problems listed."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Collection
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from clue_dist.errors import ServerError, StoreError
from clue_dist.store import layout, location, svd
from clue_dist.store.location import Location
from clue_dist.store.manifest import FileDigest, Manifest
from clue_dist.store.reader import SegmentReader
from clue_dist.store.rows import describe_coding_fault
from clue_dist.store.writer import hash_file
from data_prep.jobs.workers import Progress

THREADS = 4


def check_store(where: str | Location) -> list[str]:
    """Problems of a committed store, one line each; empty where it is sound.

    Raises:
        StoreError: there is no store, its manifest cannot be used at all, or its server fails.
    """
    root = location.parse_location(where)
    manifest = Manifest.read(root)
    manifest.verify_fingerprint(root)
    problems, side_files = svd.verify_svd(root, manifest)
    problems += _manifest_file(root, manifest) + _extra_files(root, manifest, side_files)
    damaged: set[str] = set()

    def verify(item: tuple[str, FileDigest]) -> list[str]:
        found = _verify_file(root, *item)
        if found and item[0] in manifest.shards:
            damaged.add(item[0])
        return found

    problems += _all("hash", verify, [*manifest.metadata.items(), *manifest.shards.items()])
    for name in manifest.strata:
        try:
            reader = SegmentReader(root, manifest, name)
        except StoreError as error:
            problems.append(_line(error))
            continue
        problems += _check_stratum(reader, damaged)
    return problems


def _all(title: str, function: Callable[[Any], list[str]], items: list[Any]) -> list[str]:
    progress = Progress(title, len(items))

    def step(item: Any) -> list[str]:
        found = function(item)
        progress.mark_done()
        return found

    with ThreadPoolExecutor(THREADS) as pool:
        found = [line for lines in pool.map(step, items) for line in lines]
    progress.close()
    return found


def _manifest_file(root: Location, manifest: Manifest) -> list[str]:
    content = location.read_file(root, layout.MANIFEST)
    if content is not None and manifest.is_sealed(content):
        return []
    return [
        f"{layout.MANIFEST}: changed after it was written, where its fingerprint does not see it"
    ]


def _verify_file(root: Location, key: str, expected: FileDigest) -> list[str]:
    try:
        location.require_plain_files(root, key)
        got = _hash(root, key, expected)
    except ServerError:
        raise
    except StoreError as error:
        return [f"{key}: {error.got}"]
    except OSError as error:
        return [f"{key}: cannot be read ({error.strerror})"]
    if got is None:
        return [f"{key}: missing"]
    if got.bytes != expected.bytes:
        return [f"{key}: {got.bytes} bytes, expected {expected.bytes}"]
    return [] if got == expected else [f"{key}: content changed (sha256 differs)"]


def _hash(root: Location, key: str, expected: FileDigest) -> FileDigest | None:
    """Size and SHA-256 of a file; None where there is none. A file of another size than expected is not read."""
    if isinstance(root, Path):
        if not (root / key).is_file():
            return None
        size = (root / key).stat().st_size
        return (
            hash_file(root / key) if size == expected.bytes else FileDigest(bytes=size, sha256="")
        )
    content = location.read_file(root, key)
    return (
        None
        if content is None
        else FileDigest(bytes=len(content), sha256=hashlib.sha256(content).hexdigest())
    )


def _extra_files(root: Location, manifest: Manifest, side_files: Collection[str]) -> list[str]:
    known = {layout.MANIFEST, *manifest.metadata, *manifest.shards, *side_files}
    extra = [f for f in sorted(location.list_files(root) or []) if f not in known]
    folders = {f: f.split("/")[1] for f in extra if f.startswith("strata/") and f.count("/") > 1}
    strays = {f: name for f, name in folders.items() if name not in manifest.strata}
    fix = "perhaps of an addition that was broken off: type that again, or remove this folder"
    return [
        *(f"strata/{name}: not part of the store, {fix}" for name in sorted(set(strays.values()))),
        *(f"{f}: not part of the store" for f in extra if f not in strays),
    ]


def _check_stratum(reader: SegmentReader, damaged: set[str]) -> list[str]:
    """Decode every block, some at a time; pieces of shards that are known to be damaged are left out."""
    shard = reader.segment.shard_blocks
    step = layout.NARROW_CHUNK_BLOCKS * max(1, shard // layout.NARROW_CHUNK_BLOCKS // 8)
    parts = [*reader.modalities, "obs"]
    pieces = [
        (part, lo, min(lo + step, reader.n_blocks))
        for part in parts
        for lo in range(0, reader.n_blocks, step)
    ]
    bad = {
        (key.split("/")[2], int(key.split("/")[5]))
        for key in damaged
        if key.startswith(f"strata/{reader.name}/")
    }
    sound = [
        p for p in pieces if not {(p[0], s) for s in range(p[1] // shard, -(-p[2] // shard))} & bad
    ]

    def decode(piece: tuple[str, int, int]) -> list[str]:
        part, blocks = piece[0], np.arange(piece[1], piece[2])
        try:
            found = (
                _check_obs(reader, blocks) if part == "obs" else _check_blocks(reader, part, blocks)
            )
        except StoreError as error:
            return [_line(error)]
        return [
            f"strata/{reader.name}/{part}, blocks {blocks[0]} to {blocks[-1]}: {problem}"
            for problem in found
        ]

    return _all(f"decode {reader.name}", decode, sound)


def _check_obs(reader: SegmentReader, blocks: np.ndarray) -> list[str]:
    size = reader.block_cells
    reader.read_metadata(
        np.arange(blocks[0] * size, min((blocks[-1] + 1) * size, reader.n_cells))
    )  # raises what it finds
    return []


def _check_blocks(reader: SegmentReader, modality: str, blocks: np.ndarray) -> list[str]:
    decoded = reader.read_blocks(modality, blocks)
    if isinstance(decoded, np.ndarray):
        return [] if np.isfinite(decoded).all() else ["values that are not finite"]
    packed, n_features = (
        reader.segment.packed[modality],
        reader.manifest.modalities[modality].n_features,
    )
    return (
        []
        if (problem := describe_coding_fault(decoded, packed.bits, n_features)) is None
        else [problem]
    )


def _line(error: StoreError) -> str:
    return f"{error.where}: {error.what} ({error.got})"
