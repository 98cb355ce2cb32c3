"""Our loader, measured in a process of its own: python -m tests.benchmarks.streaming.probe STORE MEASURE.

csr, dense: batches of the loader, sparse or as dense float32; windows: decoded blocks for a GPU to expand, no
rows gathered. The limits of the machine: decode: our compressed blocks in memory, nothing but decompressed; memcpy;
memset.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from math import prod
from pathlib import Path

import numcodecs.blosc
import numpy as np

from clue_dist.data.batch import SparseCounts
from clue_dist.data.loader import Loader
from clue_dist.data.plan import CellPlan
from clue_dist.store.layout import ArraySpec
from clue_dist.store.reader import Store
from clue_dist.store.rows import CodedBlocks
from clue_dist.store.shuffle import permute_positions
from tests.benchmarks.peers import measure
from tests.benchmarks.peers.measure import Take

LANES = 8  # the default of data.lanes
IN_MEMORY = 512 * 2**20  # compressed bytes that decoding alone is measured on, at most
COPIED = 256 * 2**20


def plan_of(store: Store, batch: int, window: int) -> CellPlan:
    """Batches of the store's one stratum, mixed `window` cells at a time."""
    (name, reader), size = next(iter(store.segments.items())), store.manifest.block_cells
    window_blocks, rest = divmod(window, LANES * size)
    if rest or not window_blocks:
        raise ValueError(
            f"a window of {window} cells is no multiple of {LANES} lanes x {size} cells of a block"
        )
    return CellPlan(0, {name: reader.n_cells}, {name: batch}, LANES, window_blocks, size)


def batches(loader: Loader) -> Take:
    """Non-zeros of a dense batch are not told: to count them would take longer than to make it."""

    def take() -> tuple[int, int]:
        (observed,) = next(loader).modalities.values()
        counts = observed.counts
        return len(observed.rows), len(counts.indices) if isinstance(counts, SparseCounts) else 0

    return take


def windows(store: Store, cells: int) -> Iterator[CodedBlocks]:
    """Decoded blocks in random order, as many as hold `cells`, one window ahead; pass after pass."""
    ((_, reader),) = store.segments.items()
    count = cells // reader.block_cells

    def read(number: int) -> CodedBlocks:
        passed, place = np.divmod(np.arange(number * count, (number + 1) * count), reader.n_blocks)
        blocks = permute_positions(place, reader.n_blocks, key=passed.astype(np.uint64))
        got = reader.read_blocks(reader.modalities[0], blocks)
        assert isinstance(got, CodedBlocks)
        return got

    with ThreadPoolExecutor(1) as ahead:
        number, coming = 0, ahead.submit(read, 0)
        while True:
            got, number = coming.result(), number + 1
            coming = ahead.submit(read, number)
            yield got


def kept(loader: Loader, store: Store) -> float:
    """Share of the store's blocks that the loader has room for: at 1 it decodes nothing after the first pass."""
    (cache,), (reader,) = loader._caches.values(), store.segments.values()
    return cache.slots / reader.n_blocks


def whole_windows(store: Store, cells: int) -> Take:
    source = windows(store, cells)

    def take() -> tuple[int, int]:
        lengths = next(source).lengths[..., 0]
        return int((lengths > 0).sum()), int(lengths.sum())

    return take


# --- what the machine can do ---


def compressed(root: Path, spec: ArraySpec) -> Iterator[bytes]:
    """The inner chunks of an array with one block to a chunk, without their crc32c."""
    n_chunks = spec.shard[0] // spec.chunk[0]
    for shard in sorted((root / spec.path / "c").iterdir(), key=lambda path: int(path.name)):
        content = (shard / "/".join("0" * (len(spec.shape) - 1))).read_bytes()
        # Zarr's index of a shard: offset and size of each chunk, and a crc32c, at the end.
        index = np.frombuffer(content[-(16 * n_chunks + 4) : -4], "<u8").reshape(n_chunks, 2)
        for offset, size in index[index[:, 0] != np.iinfo(np.uint64).max].astype(int):
            yield content[offset : offset + size - 4]


@dataclass(frozen=True)
class Held:
    """Compressed blocks in memory. parts: of each block its arrays; sizes: bytes of these arrays decompressed."""

    parts: list[tuple[bytes, ...]]
    sizes: list[int]
    cells: float
    nonzeros: float


def held(store: Store, limit: int = IN_MEMORY) -> Held:
    """The store's first blocks, up to `limit` compressed bytes."""
    ((name, reader),) = store.segments.items()
    specs = [s for s in store.manifest.specify_arrays(name) if s.path.endswith(("/codes", "/rest"))]
    parts, total = [], 0
    for block in zip(*(compressed(store.root, spec) for spec in specs), strict=True):
        parts.append(block)
        total += sum(map(len, block))
        if total > limit:
            break
    lengths = reader.read_lengths(reader.modalities[0], np.arange(len(parts)))
    sizes = [prod(spec.chunk) * np.dtype(spec.dtype).itemsize for spec in specs]
    return Held(parts, sizes, float((lengths > 0).sum()), float(lengths.sum()))


def over_and_over(work: Callable[[int], None], threads: int, seconds: float) -> float:
    """How often a second `work` is done, part i of it by thread i."""
    numcodecs.blosc.use_threads = False  # each of our threads decompresses by itself
    rounds, began = 0, time.perf_counter()
    with ThreadPoolExecutor(threads) as pool:
        while time.perf_counter() - began < seconds or not rounds:
            list(pool.map(work, range(threads)))
            rounds += 1
    return rounds / (time.perf_counter() - began)


def decode(store: Store, args: argparse.Namespace) -> dict[str, float]:
    """Decompression alone, from memory to memory that is used again."""
    blocks = held(store)
    buffers = [[np.empty(size, np.uint8) for size in blocks.sizes] for _ in range(args.threads)]

    def work(thread: int) -> None:
        for block in blocks.parts[thread :: args.threads]:
            for part, buffer in zip(block, buffers[thread], strict=True):
                numcodecs.blosc.decompress(part, buffer)

    over_and_over(work, args.threads, args.warm)
    rate = over_and_over(work, args.threads, args.seconds)
    return {"cells_per_s": rate * blocks.cells, "nonzeros_per_s": rate * blocks.nonzeros}


def memory(args: argparse.Namespace) -> dict[str, float]:
    """memcpy: bytes copied a second, each read once and written once; memset: bytes set to zero."""
    source, target = np.ones(COPIED, np.uint8), np.ones(COPIED, np.uint8)
    parts = [
        slice(i * COPIED // args.threads, (i + 1) * COPIED // args.threads)
        for i in range(args.threads)
    ]

    def work(thread: int) -> None:
        if args.measure == "memcpy":
            np.copyto(target[parts[thread]], source[parts[thread]])
        else:
            target[parts[thread]] = 0

    over_and_over(work, args.threads, args.warm)
    return {"bytes_per_s": COPIED * over_and_over(work, args.threads, args.seconds)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("store", help="folder or URL")
    parser.add_argument(
        "measure", choices=("csr", "dense", "windows", "decode", "memcpy", "memset")
    )
    parser.add_argument("--window", type=int, required=True, help="cells mixed at a time")
    measure.arguments(parser)
    args = parser.parse_args()
    if args.measure in ("memcpy", "memset"):
        return measure.tell(memory(args))
    store = Store(args.store)
    if args.measure == "decode":
        return measure.tell(decode(store, args))
    if args.measure == "windows":
        return measure.tell(measure.stream(whole_windows(store, args.window), args))
    with Loader(
        store, plan_of(store, args.batch, args.window), dense=args.measure == "dense"
    ) as loader:
        measure.tell(measure.stream(batches(loader), args) | {"kept": kept(loader, store)})


if __name__ == "__main__":
    main()
