"""What an S3 server gives at most: python -m tests.benchmarks.streaming.gets URL.

Plain GETs of the bytes that the loader reads, as many blocks at a time as a lane's window has, over
connections that stay open. What comes is thrown away.
"""

import argparse
import http.client
import random
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple
from urllib.parse import urlsplit

import boto3
import numpy as np

from clue_dist.store.layout import ArraySpec, count_blocks
from clue_dist.store.reader import Store
from tests.benchmarks.peers import measure
from tests.damages import CRC, ENTRY, NO_CHUNK

RUN_BLOCKS = 16  # the default of data.window_blocks
CONNECTIONS = 8


class ByteRange(NamedTuple):
    """Bytes of an object."""

    url: str  # signed
    first: int
    last: int  # of them, too


def list_ranges(store: Store, client: Any) -> Iterator[ByteRange]:
    """The runs of blocks of the store's one segment: codes and rest."""
    bucket, _, prefix = str(store.root).removeprefix("s3://").partition("/")
    ((name, reader),) = store.segments.items()
    for spec in store.manifest.specify_arrays(name):
        if spec.path.endswith(("/codes", "/rest")):
            for shard in range(count_blocks(reader.n_blocks, spec.shard[0])):
                place = {"Bucket": bucket, "Key": f"{prefix}/{spec.name_shard_file(shard)}"}
                url = client.generate_presigned_url("get_object", Params=place)
                entries = read_index(spec, place, client)
                for start in range(0, len(entries), RUN_BLOCKS):
                    run = entries[start : start + RUN_BLOCKS]
                    yield ByteRange(url, int(run[:, 0].min()), int(run.sum(1).max()) - 1)


def read_index(spec: ArraySpec, place: dict[str, str], client: Any) -> np.ndarray:
    """Offset and size of the blocks in a shard, (n, 2), as its end tells."""
    size = ENTRY * (spec.shard[0] // spec.chunk[0])
    end = client.get_object(Range=f"bytes=-{size + CRC}", **place)["Body"].read()
    index = np.frombuffer(end[:size], "<u8").reshape(-1, 2)
    return index[index[:, 0] != NO_CHUNK].astype(np.int64)


def get_bytes(wanted: ByteRange, thread: Any) -> int:
    """How many bytes came, over this thread's connection."""
    target = urlsplit(wanted.url)
    if not hasattr(thread, "connection"):
        thread.connection = http.client.HTTPConnection(target.netloc)
    headers = {"Range": f"bytes={wanted.first}-{wanted.last}"}
    thread.connection.request("GET", f"{target.path}?{target.query}", headers=headers)
    response = thread.connection.getresponse()
    body = response.read()
    if response.status != http.client.PARTIAL_CONTENT:
        raise RuntimeError(f"{response.status}: {body[:200]!r}")
    return len(body)


def count_cells(store: Store, ranges: list[ByteRange]) -> measure.Batches:
    """The cells that come with each answer, on average; all ranges, in random order, for ever."""
    cells = store.manifest.n_cells / sum(last + 1 - first for _, first, last in ranges)
    thread, order = threading.local(), random.Random(0)
    with ThreadPoolExecutor(CONNECTIONS) as pool:
        while True:
            order.shuffle(ranges)
            for size in pool.map(lambda wanted: get_bytes(wanted, thread), ranges):
                yield size * cells, 0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("store", help="URL")
    measure.add_arguments(parser)
    args = parser.parse_args()
    store = Store(args.store)
    ranges = list(list_ranges(store, boto3.client("s3")))
    measure.print_result(measure.measure_stream(count_cells(store, ranges), args))


if __name__ == "__main__":
    main()
