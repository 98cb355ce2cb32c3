"""A store of many cells, in a process of its own: python -m tests.benchmarks.atlas.probe STORE.

How long to open it, to find the cells of a far step, to go on from there; how fast batches come.
"""

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

from clue_dist.data.loader import Loader
from clue_dist.data.plan import CellPlan
from clue_dist.store import layout
from clue_dist.store.manifest import Manifest
from clue_dist.store.reader import Store
from tests.benchmarks.peers import measure
from tests.benchmarks.stores import plan_evenly

FAR = 10**9  # a step
LANES, WINDOW_BLOCKS = 8, 16
TIMES = 7  # that a short thing is timed
MANY = 100_000_000  # cells


def time_work(work: Callable[[], object]) -> float:
    """Milliseconds: the median of several times, after one that does not count."""
    work()
    seconds = []
    for _ in range(TIMES):
        began = time.perf_counter()
        work()
        seconds.append(time.perf_counter() - began)
    return 1e3 * statistics.median(seconds)


def read_first(store: Store, plan: CellPlan, step: int) -> None:
    with Loader(store, plan, first=step) as loader:
        next(loader)


def enlarge_manifest(manifest: Manifest, cells: int) -> Manifest:
    """The manifest of about so many cells: larger strata, with the shards that they have then."""
    times, sizes = max(1, cells // manifest.n_cells), manifest.strata.items()
    strata = {name: s.model_copy(update={"n_cells": s.n_cells * times}) for name, s in sizes}
    many = manifest.model_copy(update={"strata": strata})
    specs = [spec for name in strata for spec in many.specify_arrays(name)]
    files = [file for spec in specs for file in spec.list_shard_files()]
    shard = next(iter(manifest.shards.values()))
    return many.model_copy(update={"shards": dict.fromkeys(files, shard)})


def measure_manifest(manifest: Manifest) -> dict[str, float]:
    """MB of the manifest of MANY cells, and milliseconds to read and verify it."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        enlarge_manifest(manifest, MANY).write(folder)
        size = (folder / layout.MANIFEST).stat().st_size
        took = time_work(partial(Manifest.read, folder))
        return {"manifest_mb": size / 1e6, "manifest_ms": took}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("store", type=Path)
    measure.add_arguments(parser)
    args = parser.parse_args()
    store = Store(args.store)
    plan = plan_evenly(store, args.batch, LANES, WINDOW_BLOCKS)

    def find_cells(step: int) -> None:
        for segment in plan.segments:
            plan.select_cells(step, segment)

    found = {
        "open_ms": time_work(partial(Store, args.store)),
        "step_ms": time_work(partial(find_cells, 0)),
        "far_step_ms": time_work(partial(find_cells, FAR)),
        "first_ms": time_work(partial(read_first, store, plan, 0)),
        "far_first_ms": time_work(partial(read_first, store, plan, FAR)),
    }
    with Loader(store, plan) as loader:
        found |= measure.measure_stream(((batch.n_cells, 0) for batch in loader), args)
    # Bytes on disk of a cell's barcode, batch and label.
    shards = store.manifest.shards
    names = sum(shard.bytes for key, shard in shards.items() if "/obs/" in key)
    found |= {"names_bytes": names / store.manifest.n_cells}
    measure.print_result(found | measure_manifest(store.manifest))


if __name__ == "__main__":
    main()
