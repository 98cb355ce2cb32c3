"""Our loader, in a process of its own: python -m tests.benchmarks.streaming.probe STORE KIND.

csr, dense, coded: batches of the loader, sparse, as dense float32, or for a GPU to expand; windows:
decoded blocks, no rows gathered. Limits of the machine: decode: our blocks decompressed; memcpy;
memset.
"""

import argparse
import itertools
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from math import prod
from pathlib import Path

import numcodecs.blosc
import numpy as np

from clue_dist.data.assembly import CountsForm
from clue_dist.data.batch import CodedCounts, SparseCounts
from clue_dist.data.loader import Loader
from clue_dist.data.plan import CellPlan
from clue_dist.store.layout import ArraySpec
from clue_dist.store.reader import Store
from clue_dist.store.rows import CodedBlocks
from clue_dist.store.shuffle import permute_positions
from tests.benchmarks.peers import measure
from tests.benchmarks.peers.measure import Batches
from tests.benchmarks.stores import plan_evenly
from tests.damages import CRC, ENTRY, NO_CHUNK

LANES = 8  # the default of data.lanes
IN_MEMORY = 512 * 2**20  # compressed bytes that decoding alone is measured on, at most
COPIED = 256 * 2**20


def plan_windows(store: Store, batch: int, window: int) -> CellPlan:
    """Batches of the store's one segment, mixed `window` cells at a time."""
    cells = LANES * store.manifest.block_cells
    if window % cells or not window:
        raise ValueError(f"a window of {window} cells is no multiple of {cells}, a block a lane")
    return plan_evenly(store, batch, LANES, window // cells)


def count_batches(loader: Loader) -> Batches:
    """Non-zeros of a dense batch are not counted, which would take longer than to make it."""
    while True:
        (observed,) = next(loader).modalities.values()
        counts = observed.profiles
        if isinstance(counts, CodedCounts):
            yield len(observed.rows), len(counts.codes)
        else:
            yield len(observed.rows), len(counts.indices) if isinstance(counts, SparseCounts) else 0


def count_windows(store: Store, cells: int) -> Batches:
    """Decoded blocks in random order, as many as hold `cells`, one window ahead."""
    ((_, reader),) = store.segments.items()
    count = cells // reader.block_cells

    def read(number: int) -> CodedBlocks:
        passed, place = np.divmod(np.arange(number * count, (number + 1) * count), reader.n_blocks)
        blocks = permute_positions(place, reader.n_blocks, key=passed.astype(np.uint64))
        found = reader.read_blocks(reader.modalities[0], blocks)
        assert isinstance(found, CodedBlocks)
        return found

    with ThreadPoolExecutor(1) as ahead:
        coming = ahead.submit(read, 0)
        for number in itertools.count(1):
            lengths, coming = coming.result().lengths[..., 0], ahead.submit(read, number)
            yield int((lengths > 0).sum()), int(lengths.sum())


def measure_codes(store: Store) -> float:
    """Bytes of a coded non-zero, by the first blocks of the store."""
    (reader,) = store.segments.values()
    blocks = reader.read_blocks(reader.modalities[0], np.arange(min(reader.n_blocks, 16)))
    assert isinstance(blocks, CodedBlocks)
    n_codes, n_rest = blocks.starts[:, -1].sum(0)
    return float((n_codes + n_rest * blocks.rest.itemsize) / n_codes)


def measure_kept(loader: Loader, store: Store) -> float:
    """Share of blocks that the loader has room for: with 1 it decodes nothing again."""
    (cache,), (reader,) = loader._caches.values(), store.segments.values()
    return cache.slots / reader.n_blocks


# --- what the machine can do ---


def read_compressed(root: Path, spec: ArraySpec) -> Iterator[bytes]:
    """The inner chunks of an array with one block to a chunk, without their crc32c."""
    n_chunks = spec.shard[0] // spec.chunk[0]
    for shard in sorted((root / spec.path / "c").iterdir(), key=lambda path: int(path.name)):
        content = (shard / "/".join("0" * (len(spec.shape) - 1))).read_bytes()
        index = np.frombuffer(content[-(ENTRY * n_chunks + CRC) : -CRC], "<u8").reshape(-1, 2)
        for offset, size in index[index[:, 0] != NO_CHUNK].astype(int):
            yield content[offset : offset + size - CRC]


@dataclass(frozen=True)
class HeldBlocks:
    """Compressed blocks in memory."""

    parts: list[tuple[bytes, ...]]  # of each block its arrays
    sizes: list[int]  # bytes of these arrays decompressed
    cells: float
    nonzeros: float


def hold_blocks(store: Store, limit: int = IN_MEMORY) -> HeldBlocks:
    """The store's first blocks, up to `limit` compressed bytes."""
    ((name, reader),) = store.segments.items()
    specs = store.manifest.specify_arrays(name)
    specs = [spec for spec in specs if spec.path.endswith(("/codes", "/rest"))]
    parts, total = [], 0
    for block in zip(*(read_compressed(store.root, spec) for spec in specs), strict=True):
        parts.append(block)
        total += sum(map(len, block))
        if total > limit:
            break
    lengths = reader.read_lengths(reader.modalities[0], np.arange(len(parts)))[..., 0]
    sizes = [prod(spec.chunk) * np.dtype(spec.dtype).itemsize for spec in specs]
    return HeldBlocks(parts, sizes, float((lengths > 0).sum()), float(lengths.sum()))


def repeat_work(work: Callable[[int], None], threads: int, seconds: float) -> float:
    """How often a second `work` is done, part i of it by thread i."""
    numcodecs.blosc.use_threads = False  # each of our threads decompresses by itself
    rounds, began = 0, time.perf_counter()
    with ThreadPoolExecutor(threads) as pool:
        while time.perf_counter() - began < seconds or not rounds:
            list(pool.map(work, range(threads)))
            rounds += 1
    return rounds / (time.perf_counter() - began)


def measure_decoding(store: Store, args: argparse.Namespace) -> dict[str, float]:
    """Decompression alone, from memory to memory that is used again."""
    blocks = hold_blocks(store)
    buffers = [[np.empty(size, np.uint8) for size in blocks.sizes] for _ in range(args.threads)]

    def work(thread: int) -> None:
        for block in blocks.parts[thread :: args.threads]:
            for part, buffer in zip(block, buffers[thread], strict=True):
                numcodecs.blosc.decompress(part, buffer)

    repeat_work(work, args.threads, args.warm)
    rate = repeat_work(work, args.threads, args.seconds)
    return {"cells_per_s": rate * blocks.cells, "nonzeros_per_s": rate * blocks.nonzeros}


def measure_memory(args: argparse.Namespace) -> dict[str, float]:
    """memcpy: bytes copied a second, each read and written once; memset: bytes set to zero."""
    source, target = np.ones(COPIED, np.uint8), np.ones(COPIED, np.uint8)
    ends = [i * COPIED // args.threads for i in range(args.threads + 1)]

    def work(thread: int) -> None:
        part = slice(ends[thread], ends[thread + 1])
        if args.kind == "memcpy":
            np.copyto(target[part], source[part])
        else:
            target[part] = 0

    repeat_work(work, args.threads, args.warm)
    return {"bytes_per_s": COPIED * repeat_work(work, args.threads, args.seconds)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    kinds = ("csr", "dense", "coded", "windows", "decode", "memcpy", "memset")
    parser.add_argument("store", help="folder or URL")
    parser.add_argument("kind", choices=kinds)
    parser.add_argument("--window", type=int, required=True, help="cells mixed at a time")
    measure.add_arguments(parser)
    args = parser.parse_args()
    if args.kind in ("memcpy", "memset"):
        return measure.print_result(measure_memory(args))
    store = Store(args.store)
    if args.kind == "decode":
        return measure.print_result(measure_decoding(store, args))
    if args.kind == "windows":
        return measure.print_result(measure.measure_stream(count_windows(store, args.window), args))
    plan = plan_windows(store, args.batch, args.window)
    form: CountsForm = "sparse" if args.kind == "csr" else args.kind
    with Loader(store, plan, form=form) as loader:
        found = measure.measure_stream(count_batches(loader), args)
        found |= {"kept": measure_kept(loader, store), "bytes_per_code": measure_codes(store)}
        return measure.print_result(found)


if __name__ == "__main__":
    main()
