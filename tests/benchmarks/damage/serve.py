"""All that a store serves, by both ways in which training and embedding read it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import numpy as np

from clue_dist.data.batch import Batch, SparseCounts
from clue_dist.data.loader import Loader
from clue_dist.data.plan import CellPlan
from clue_dist.errors import StoreError
from clue_dist.store.reader import SegmentReader, Store
from clue_dist.store.rows import CsrRows

LANES, WINDOW = 2, 2
Values = dict[str, np.ndarray]  # by name of what was read


def everything(store: Store) -> Values:
    return dict(batches(store)) | {name: read() for name, read in tables(store)}


def wrong_values(root: Path, sound: Values) -> tuple[int, bool]:
    """Values served that are not those of the sound store, and whether anything was refused."""
    try:
        store = Store(root)
    except StoreError:
        return 0, True
    wrong, refused = 0, False
    try:
        for name, got in batches(store):
            wrong += differences(got, sound[name])
    except StoreError:
        refused = True
    for name, read in tables(store):  # each by itself, so that one refusal hides no other value
        try:
            wrong += differences(read(), sound[name])
        except StoreError:
            refused = True
    return wrong, refused


def differences(got: np.ndarray, want: np.ndarray) -> int:
    """Values that are not the same; all of them where even the shape is another."""
    return int((got != want).sum()) if got.shape == want.shape else got.size


def batches(store: Store) -> Iterator[tuple[str, np.ndarray]]:
    """The loader's batches, until every stratum has been passed through."""
    sizes = {s: reader.n_cells for s, reader in store.segments.items()}
    plan = CellPlan(
        0, sizes, dict.fromkeys(sizes, 4 * LANES), LANES, WINDOW, store.manifest.block_cells
    )
    steps = max(-(-sizes[s] // n) for s, n in plan.stratum_shares.items())
    with Loader(store, plan, prefetch=1) as loader:
        for t in range(steps):
            yield from parts(t, next(loader))


def parts(step: int, batch: Batch) -> Iterator[tuple[str, np.ndarray]]:
    yield f"batch {step} observed", batch.observed.numpy()
    yield f"batch {step} code", batch.batch_code.numpy()
    for modality, observed in batch.modalities.items():
        arrays = (
            vars(observed.counts)
            if isinstance(observed.counts, SparseCounts)
            else {"values": observed.counts}
        )
        for name, values in arrays.items():
            yield f"batch {step} {modality} {name}", np.asarray(values)


def tables(store: Store) -> Iterator[tuple[str, Callable[[], np.ndarray]]]:
    """Counts and obs of every block, to be read one by one."""
    size = store.manifest.block_cells
    for stratum, reader in store.segments.items():
        for first in range(0, reader.n_cells, size):
            cells = np.arange(first, min(first + size, reader.n_cells))
            for modality in reader.modalities:
                yield f"{stratum} {first} {modality}", partial(counts, reader, modality, cells)
            for field in ("batch", "label"):
                yield f"{stratum} {first} {field}", partial(reader.read_codes, field, cells)
            yield f"{stratum} {first} barcodes", partial(barcodes, reader, cells)


def counts(reader: SegmentReader, modality: str, cells: np.ndarray) -> np.ndarray:
    rows = reader.read_rows(modality, cells)
    return rows.to_scipy().toarray() if isinstance(rows, CsrRows) else rows


def barcodes(reader: SegmentReader, cells: np.ndarray) -> np.ndarray:
    return reader.read_metadata(cells).barcodes
