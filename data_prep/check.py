"""Is a store what its manifest says? Hash every file, decode every block, list all problems."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Collection
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from clue_dist.errors import ServerError, StoreError
from clue_dist.progress import Progress
from clue_dist.store import layout, location, svd
from clue_dist.store.location import Location
from clue_dist.store.manifest import Manifest
from clue_dist.store.manifest_parts import FileDigest
from clue_dist.store.reader import SegmentReader
from clue_dist.store.rows import describe_coding_fault
from clue_dist.store.writer import hash_file

THREADS = 4
SHARD_STEPS = 8  # a large shard is decoded in about as many steps


def check_store(store_location: str | Location) -> list[str]:
    """Check a committed store.

    Args:
        store_location: a folder or a URL.

    Returns:
        The problems, a line each. A sound store has none.

    Raises:
        StoreError: there is no store, its manifest cannot be used at all, or its server fails.
    """
    root = location.parse_location(store_location)
    manifest = Manifest.read(root)
    manifest.verify_fingerprint(root)
    # A stored SVD has digests of its own: the manifest does not know it.
    problems, svd_files = svd.verify_svd(root, manifest)
    problems += _check_manifest_file(root, manifest)
    problems += _find_extra_files(root, manifest, svd_files)
    damaged: set[str] = set()  # shards, which are not decoded: their problem is known

    def check_file(item: tuple[str, FileDigest]) -> list[str]:
        found = _check_file(root, *item)
        if found and item[0] in manifest.shards:
            damaged.add(item[0])
        return found

    files = [*manifest.metadata.items(), *manifest.shards.items()]
    problems += _check_all("hash", check_file, files)
    for name in manifest.strata:
        try:
            reader = SegmentReader(root, manifest, name)
        except StoreError as error:
            problems.append(_format_error(error))
            continue
        problems += _check_segment(reader, damaged)
    return problems


def _check_all(title: str, check: Callable[[Any], list[str]], items: list[Any]) -> list[str]:
    """Check every item, several at once; return the problems of all."""
    progress, problems = Progress(title, len(items)), []
    with ThreadPoolExecutor(THREADS) as threads:
        for found in threads.map(check, items):
            problems += found
            progress.mark_done()
    progress.close()
    return problems


def _check_manifest_file(root: Location, manifest: Manifest) -> list[str]:
    """Compare the manifest, of which the fingerprint covers a part, with its own seal."""
    content = location.read_file(root, layout.MANIFEST)
    if content is not None and manifest.is_sealed(content):
        return []
    return [
        f"{layout.MANIFEST}: changed after it was written, where its fingerprint does not see it"
    ]


def _check_file(root: Location, file: str, expected: FileDigest) -> list[str]:
    """Compare a file with its digest in the manifest."""
    try:
        location.require_plain_files(root, file)
        found = _hash_file(root, file, expected)
    except ServerError:
        raise  # a server that fails says nothing about the file
    except StoreError as error:
        return [f"{file}: {error.got}"]
    except OSError as error:
        return [f"{file}: cannot be read ({error.strerror})"]
    if found is None:
        return [f"{file}: missing"]
    if found.bytes != expected.bytes:
        return [f"{file}: {found.bytes} bytes, expected {expected.bytes}"]
    return [] if found == expected else [f"{file}: content changed (sha256 differs)"]


def _hash_file(root: Location, file: str, expected: FileDigest) -> FileDigest | None:
    """Take size and SHA-256 of a file; None where there is none.

    A file in a folder that has another size than expected is not read.
    """
    if not isinstance(root, Path):
        content = location.read_file(root, file)
        if content is None:
            return None
        return FileDigest(bytes=len(content), sha256=hashlib.sha256(content).hexdigest())
    path = root / file
    if not path.is_file():
        return None
    size = path.stat().st_size
    return hash_file(path) if size == expected.bytes else FileDigest(bytes=size, sha256="")


def _find_extra_files(root: Location, manifest: Manifest, svd_files: Collection[str]) -> list[str]:
    """Find files that the store does not know; a folder of an unknown segment counts once."""
    known = {layout.MANIFEST, *manifest.metadata, *manifest.shards, *svd_files}
    extra = [file for file in sorted(location.list_files(root) or []) if file not in known]
    # Files in a folder strata/NAME, and the name of this segment.
    segment = {f: f.split("/")[1] for f in extra if f.startswith("strata/") and f.count("/") > 1}
    strays = {file: name for file, name in segment.items() if name not in manifest.strata}
    fix = "perhaps of an addition that was broken off: type that again, or remove this folder"
    return [
        *(f"strata/{name}: not part of the store, {fix}" for name in sorted(set(strays.values()))),
        *(f"{file}: not part of the store" for file in extra if file not in strays),
    ]


def _check_segment(reader: SegmentReader, damaged: set[str]) -> list[str]:
    """Decode every block, some at a time, but for those of shards that are known to be damaged."""
    shard_blocks = reader.segment.shard_blocks
    step = layout.NARROW_CHUNK_BLOCKS * max(
        1, shard_blocks // layout.NARROW_CHUNK_BLOCKS // SHARD_STEPS
    )
    # A shard is the file strata/NAME/PART/ARRAY/c/SHARD/...
    paths = [file.split("/") for file in damaged if file.startswith(f"strata/{reader.name}/")]
    damaged_shards = {(path[2], int(path[5])) for path in paths}
    steps = []
    for part in [*reader.modalities, "obs"]:
        for first in range(0, reader.n_blocks, step):
            stop = min(first + step, reader.n_blocks)
            shards = range(first // shard_blocks, -(-stop // shard_blocks))
            if not damaged_shards & {(part, shard) for shard in shards}:
                steps.append((part, np.arange(first, stop)))

    def decode(item: tuple[str, np.ndarray]) -> list[str]:
        part, blocks = item
        try:
            if part == "obs":
                _read_metadata(reader, blocks)
                return []
            problem = _find_problem(reader, part, blocks)
        except StoreError as error:
            return [_format_error(error)]
        where = f"strata/{reader.name}/{part}, blocks {blocks[0]} to {blocks[-1]}"
        return [] if problem is None else [f"{where}: {problem}"]

    return _check_all(f"decode {reader.name}", decode, steps)


def _read_metadata(reader: SegmentReader, blocks: np.ndarray) -> None:
    """Read batch, label and barcode of all cells of some blocks; raises what is wrong with them."""
    start, stop = blocks[0] * reader.block_cells, (blocks[-1] + 1) * reader.block_cells
    reader.read_metadata(np.arange(start, min(stop, reader.n_cells)))


def _find_problem(reader: SegmentReader, modality: str, blocks: np.ndarray) -> str | None:
    """Find out whether values of a modality are other than its store may hold."""
    decoded = reader.read_blocks(modality, blocks)
    if isinstance(decoded, np.ndarray):
        return None if np.isfinite(decoded).all() else "values that are not finite"
    bits = reader.segment.packed[modality].bits
    return describe_coding_fault(decoded, bits, reader.manifest.modalities[modality].n_features)


def _format_error(error: StoreError) -> str:
    """Put an error of a segment into one line."""
    return f"{error.where}: {error.what} ({error.got})"
