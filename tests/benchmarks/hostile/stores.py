"""What is tried with a store that was changed, and how one who changes it signs it again.

A change that was not signed must be refused, or alter no value. Who signs again says what the values are: then whatever
is served must at least be what the manifest says: columns, codes and numbers within their bounds.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
from pydantic import ValidationError

from clue_dist.config import Config
from clue_dist.errors import ClueError, StoreError
from clue_dist.store import layout
from clue_dist.store.manifest import Manifest
from clue_dist.store.reader import SegmentReader, Store
from clue_dist.store.rows import CsrRows
from clue_dist.store.writer import hash_file
from clue_dist.train.setup import prepare_setup
from tests.benchmarks.damage import serve
from tests.benchmarks.hostile import spoil
from tests.benchmarks.hostile.trial import command, wrong
from tests.unit.prep_helpers import convert_files, make_anndata, make_counts, write_h5ad, write_h5mu

Attempts = dict[str, Callable[[], object]]
READ = frozenset({"serve", "inspect", "train"})
ALL = READ | {"check"}


# --- the sound store ---


def ready(base: Path) -> None:
    """A store of rna, adt and other (dense) in two strata of several shards, with an SVD; and more cells for it."""
    have = {"rna": slice(0, 120), "adt": slice(0, 70), "other": slice(0, 70)}
    parts = {}
    for seed, (name, mine) in enumerate(have.items()):
        counts = make_counts(120, 20, seed, prefix=name)[mine]
        obs = {"batch": [f"batch-{i % 3}" for i in range(mine.stop)], "cell_type": "T"}
        parts[name] = make_anndata(counts / 7 if name == "other" else counts, **obs)
    with mock.patch.object(layout, "SHARD_BYTES", 1):
        given = write_h5mu(base / "cells.h5mu", **parts)
        convert_files(
            base / "s.zarr", str(given), block_cells=4, kinds={"other": "dense"}, workers=1
        )
    command("svd", base / "s.zarr", "--modality", "rna", "--components", 5, "--workers", 1)
    write_h5ad(base / "more.h5ad", make_counts(10, 20, 7, prefix="rna", cells="new"))


@lru_cache
def sound_values(root: Path) -> serve.Values:
    return serve.everything(Store(root))


def copied(base: Path, folder: Path) -> Path:
    return Path(shutil.copytree(base / "s.zarr", folder / "s.zarr"))


# --- what is tried ---


def attempts(root: Path, sound: serve.Values | None) -> Attempts:
    """sound: all values of the store, where nothing may be served that differs; None: they must be within bounds."""
    return {
        "serve": lambda: within_bounds(root) if sound is None else as_sound(root, sound),
        "check": lambda: command("check", root),
        "inspect": lambda: command("inspect", root),
        "train": lambda: prepare_setup(
            Config(store=str(root), run=str(root.parent / "run")), 1
        ).load_held_out_batch(),
    }


def as_sound(root: Path, sound: serve.Values) -> None:
    values, refused = serve.wrong_values(root, sound)
    if values:
        wrong(f"{values} values that are not the store's")
    if refused:
        raise StoreError("some of it was refused", where=root)


def within_bounds(root: Path) -> None:
    """Everything that a store serves; what is refused in part is read to its end all the same."""
    store = Store(root)
    errors: list[ClueError] = []
    for read in [
        *(lambda r=reader: _tables(store, r) for reader in store.segments.values()),
        lambda: _batches(store),
    ]:
        try:
            read()
        except ClueError as error:
            errors.append(error)
    if errors:
        raise errors[0]


def _tables(store: Store, reader: SegmentReader) -> None:
    cells = np.arange(reader.n_cells)
    obs = reader.read_metadata(cells)
    _bounded("batch", obs.batch, -1, len(store.manifest.batches))
    _bounded("label", obs.label, -1, len(store.manifest.labels))
    for modality in reader.modalities:
        n_features, rows = (
            store.manifest.modalities[modality].n_features,
            reader.read_rows(modality, cells),
        )
        if isinstance(rows, CsrRows):
            _bounded(f"{modality} columns", rows.indices, 0, n_features)
            _bounded(f"{modality} counts", rows.values, 1, 2**33)
        elif rows.shape != (reader.n_cells, n_features):
            wrong(f"{modality} {rows.shape}")


def _batches(store: Store) -> None:
    for name, values in serve.batches(store):
        if name.endswith("indices"):
            _bounded(name, values, 0, store.manifest.modalities[name.split()[-2]].n_features)
        if name.endswith("code"):
            _bounded(name, values, -1, len(store.manifest.batches))


def _bounded(what: str, values: np.ndarray, low: int, end: int) -> None:
    if len(values) and not (low <= values.min() and values.max() < end):
        wrong(f"{what} from {values.min()} to {values.max()}, not {low} to {end - 1}")


# --- signed again ---


def sign(root: Path, **changes: Any) -> None:
    """A manifest whose hashes, fingerprint and seal fit whatever lies there."""
    manifest = Manifest.read(root)
    files = {
        name: {key: hash_file(root / key) for key in getattr(manifest, name)}
        for name in ("shards", "metadata")
    }
    manifest.model_copy(update=files | changes).write(root)


def write_sealed(root: Path, tree: Any) -> None:
    """A manifest as JSON, with the seal of its content but the fingerprint it had."""
    manifest = Manifest.model_validate_json(json.dumps(tree | {"seal": ""}))
    seal = hashlib.sha256(manifest._encode()).hexdigest()
    (root / layout.MANIFEST).write_bytes(manifest.model_copy(update={"seal": seal})._encode())


def write_signed(root: Path, tree: Any) -> None:
    """A manifest as JSON, with the fingerprint and seal of its content, where it can be read at all."""
    try:
        Manifest.model_validate_json(json.dumps(tree)).write(root)
    except ValidationError:
        (root / layout.MANIFEST).write_bytes(spoil.text_of(tree))
