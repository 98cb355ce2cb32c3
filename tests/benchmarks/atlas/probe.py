"""A store of many cells, measured in a process of its own: python -m tests.benchmarks.atlas.probe STORE.

How long it takes to open it, to find the cells of a step far ahead and to go on from there; how fast its batches come.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from clue_dist.data.loader import Loader
from clue_dist.data.plan import CellPlan
from clue_dist.store import layout
from clue_dist.store.manifest import Manifest
from clue_dist.store.reader import Store
from tests.benchmarks.peers import measure

FAR = 10**9  # a step
LANES, WINDOW_BLOCKS = 8, 16
TIMES = 7  # that a short thing is timed
MANY = 100_000_000  # cells


def plan_of(store: Store, batch: int) -> CellPlan:
    """Batches to which every stratum gives the same number of cells."""
    sizes = {name: reader.n_cells for name, reader in store.segments.items()}
    return CellPlan(
        0,
        sizes,
        dict.fromkeys(sizes, batch // len(sizes)),
        LANES,
        WINDOW_BLOCKS,
        store.manifest.block_cells,
    )


def timed_ms(work: Callable[[], object]) -> float:
    """The median of several times, after one that does not count."""
    work()
    seconds = []
    for _ in range(TIMES):
        began = time.perf_counter()
        work()
        seconds.append(time.perf_counter() - began)
    return 1e3 * statistics.median(seconds)


def first_batch(store: Store, plan: CellPlan, step: int) -> None:
    with Loader(store, plan, first=step) as loader:
        next(loader)


def every_cell(plan: CellPlan, step: int) -> None:
    for segment in plan.segments:
        plan.select_cells(step, segment)


def enlarged(manifest: Manifest, cells: int) -> Manifest:
    """The manifest of about so many cells: every stratum times as many, and the shards that its arrays have then."""
    times = max(1, cells // manifest.n_cells)
    strata = {
        name: s.model_copy(update={"n_cells": s.n_cells * times})
        for name, s in manifest.strata.items()
    }
    many, shard = (
        manifest.model_copy(update={"strata": strata}),
        next(iter(manifest.shards.values())),
    )
    files = (
        file
        for name in strata
        for spec in many.specify_arrays(name)
        for file in spec.list_shard_files()
    )
    return many.model_copy(update={"shards": dict.fromkeys(files, shard)})


def manifest_of_many(manifest: Manifest) -> dict[str, float]:
    """MB of the manifest of MANY cells, and milliseconds to read and verify it."""
    with tempfile.TemporaryDirectory() as folder:
        enlarged(manifest, MANY).write(Path(folder))
        size = (Path(folder) / layout.MANIFEST).stat().st_size
        return {
            "manifest_mb": size / 1e6,
            "manifest_ms": timed_ms(lambda: Manifest.read(Path(folder))),
        }


def names_bytes(store: Store) -> float:
    """Bytes on disk of a cell's barcode, batch and label."""
    total = sum(shard.bytes for key, shard in store.manifest.shards.items() if "/obs/" in key)
    return total / store.manifest.n_cells


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("store", type=Path)
    measure.arguments(parser)
    args = parser.parse_args()
    store = Store(args.store)
    plan = plan_of(store, args.batch)
    short = {
        "open_ms": timed_ms(lambda: Store(args.store)),
        "step_ms": timed_ms(lambda: every_cell(plan, 0)),
        "far_step_ms": timed_ms(lambda: every_cell(plan, FAR)),
        "first_ms": timed_ms(lambda: first_batch(store, plan, 0)),
        "far_first_ms": timed_ms(lambda: first_batch(store, plan, FAR)),
    }
    with Loader(store, plan) as loader:
        got = measure.stream(lambda: (next(loader).n_cells, 0), args)
    measure.tell(
        got | short | manifest_of_many(store.manifest) | {"names_bytes": names_bytes(store)}
    )


if __name__ == "__main__":
    main()
