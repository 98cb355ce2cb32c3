"""A store of many cells made of the shards of a smaller one, over and over, in seconds."""

import os
from pathlib import Path

from clue_dist.store.reader import Store
from clue_dist.store.writer import create_store
from tests.benchmarks.atlas.probe import enlarge_manifest


def enlarge_store(source: Path, cells: int, out: Path) -> None:
    """Make a store of several times as many cells, whose files are links to those of `source`.

    Shards that are not full are left out, as only the last one of a segment may be so.

    Raises:
        ValueError: a segment has no full shard.
    """
    small = Store(source).manifest
    many, shards = enlarge_manifest(small, cells), {}
    create_store(out, many)
    for name, segment in small.strata.items():
        n_full = segment.n_cells // (segment.shard_blocks * small.block_cells)
        if not n_full:
            raise ValueError(f"{name} of {source} has no full shard")
        arrays = zip(small.specify_arrays(name), many.specify_arrays(name), strict=True)
        for before, after in arrays:
            files = list(before.list_shard_files())
            for number, file in enumerate(after.list_shard_files()):
                origin = files[number % n_full]
                (out / file).parent.mkdir(parents=True, exist_ok=True)
                os.link(source / origin, out / file)
                shards[file] = small.shards[origin]
    many.model_copy(update={"shards": shards}).write(out)
