"""A small store, and all that it serves by both ways in which training and embedding read it."""

from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from unittest import mock

import numpy as np

from clue_dist.data.batch import SparseCounts
from clue_dist.data.loader import Loader
from clue_dist.data.plan import CellPlan
from clue_dist.errors import StoreError
from clue_dist.store import layout
from clue_dist.store.reader import SegmentReader, Store
from clue_dist.store.rows import CsrRows
from tests.unit.prep_helpers import convert_files, make_anndata, make_counts, write_h5mu

LANES, WINDOW = 2, 2
Values = dict[str, np.ndarray]  # by name of what was read


def make_small_store(folder: Path, cells: Mapping[str, slice], features: int) -> Path:
    """A store of several strata and shards, of modalities that carry some of the same cells."""
    total, parts = max(some.stop for some in cells.values()), {}
    for seed, (name, some) in enumerate(cells.items()):
        counts, numbers = make_counts(total, features, seed, prefix=name)[some], range(total)[some]
        values = {"atac": counts.clip(upper=1), "other": counts / 7}.get(name, counts)
        batch, label = (
            [f"{kind}-{i % n}" for i in numbers] for kind, n in (("batch", 3), ("type", 5))
        )
        parts[name] = make_anndata(values, batch=batch, cell_type=label)
    given, store = str(write_h5mu(folder / "cells.h5mu", **parts)), folder / "s.zarr"
    with mock.patch.object(layout, "SHARD_BYTES", 1):  # so that few cells fill several shards
        convert_files(store, given, block_cells=4, kinds={"other": "dense"}, workers=1)
    return store


def read_everything(store: Store) -> Values:
    return dict(read_batches(store)) | {name: read() for name, read in list_tables(store)}


def count_wrong_values(root: Path, sound: Values) -> tuple[int, bool]:
    """Values served that are not those of the sound store, and whether anything was refused."""
    try:
        store = Store(root)
    except StoreError:
        return 0, True
    wrong, refused = 0, False
    try:
        for name, values in read_batches(store):
            wrong += count_differences(values, sound[name])
    except StoreError:
        refused = True
    for name, read in list_tables(store):  # each by itself, so that no refusal hides another value
        try:
            wrong += count_differences(read(), sound[name])
        except StoreError:
            refused = True
    return wrong, refused


def count_differences(found: np.ndarray, wanted: np.ndarray) -> int:
    """Values that are not the same; all of them where even the shape is another."""
    return int((found != wanted).sum()) if found.shape == wanted.shape else found.size


def read_batches(store: Store) -> Iterator[tuple[str, np.ndarray]]:
    """The loader's batches, until every stratum has been passed through."""
    sizes = {name: reader.n_cells for name, reader in store.segments.items()}
    shares, block = dict.fromkeys(sizes, 4 * LANES), store.manifest.block_cells
    plan = CellPlan(0, sizes, shares, LANES, WINDOW, block)
    with Loader(store, plan, prefetch=1) as loader:
        for step in range(-(-max(sizes.values()) // (4 * LANES))):
            batch = next(loader)
            yield f"batch {step} observed", batch.observed.numpy()
            yield f"batch {step} code", batch.batch_code.numpy()
            for modality, observed in batch.modalities.items():
                sparse, counts = isinstance(observed.counts, SparseCounts), observed.counts
                for name, values in (vars(counts) if sparse else {"values": counts}).items():
                    yield f"batch {step} {modality} {name}", np.asarray(values)


def list_tables(store: Store) -> Iterator[tuple[str, Callable[[], np.ndarray]]]:
    """Counts and metadata of every block, to be read one by one."""
    size = store.manifest.block_cells
    for name, reader in store.segments.items():
        for first in range(0, reader.n_cells, size):
            cells = np.arange(first, min(first + size, reader.n_cells))
            for modality in reader.modalities:
                yield f"{name} {first} {modality}", partial(read_counts, reader, modality, cells)
            for field in ("batch", "label"):
                yield f"{name} {first} {field}", partial(reader.read_codes, field, cells)
            metadata = partial(reader.read_metadata, cells)
            yield f"{name} {first} barcodes", lambda metadata=metadata: metadata().barcodes


def read_counts(reader: SegmentReader, modality: str, cells: np.ndarray) -> np.ndarray:
    rows = reader.read_rows(modality, cells)
    return rows.to_scipy().toarray() if isinstance(rows, CsrRows) else rows
