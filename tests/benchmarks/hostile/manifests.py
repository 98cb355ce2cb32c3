"""Manifests and metadata of arrays that were changed: by name, at random, and into what is no JSON any more."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from clue_dist.store import layout, svd
from tests.benchmarks.hostile import spoil
from tests.benchmarks.hostile.stores import (
    attempts,
    copied,
    sign,
    sound_values,
    write_sealed,
    write_signed,
)
from tests.benchmarks.hostile.trial import Trial

# --- manifests ---


def manifest(base: Path, folder: Path, number: int, rng: np.random.Generator) -> Trial:
    root = copied(base, folder)
    path = root / layout.MANIFEST
    tree, again = json.loads(path.read_text()), number % 3 != 0
    if number % 10 == 9:
        content, told = spoil.broken_text(path.read_bytes(), rng)
        path.write_bytes(content)
        return Trial(f"manifest: {told}", attempts(root, sound_values(base / "s.zarr")))
    if number % 10 == 7:
        features = tree["modalities"][str(rng.choice(list(tree["modalities"])))]["features"]
        features[:] = features[(turn := int(rng.integers(1, len(features)))) :] + features[:turn]
        write_sealed(root, tree)
        told = f"features turned by {turn}, sealed with the fingerprint of before"
        return Trial(f"manifest: {told}", attempts(root, None), frozenset({"check", "train"}))
    if number % 10 == 8:
        change = ABSURD[number // 10 % len(ABSURD)]
        tree, told, again = change(tree), change.__name__, True
    else:
        tree, told = spoil.spoiled(tree, rng, 1 + number % 2)
    path.write_bytes(spoil.text_of(tree))
    if again:
        write_signed(root, tree)
        shutil.rmtree(root / svd.FOLDER)  # of cells that would be others
    sound = None if again else sound_values(base / "s.zarr")
    return Trial(f"manifest{', signed again' if again else ''}: {told}", attempts(root, sound))


def leading_out(tree: Any) -> Any:
    """A modality whose folder lies elsewhere."""
    return _renamed(tree, "rna", "../../outside")


def absolute(tree: Any) -> Any:
    return _renamed(tree, "rna", "/etc")


def with_nul(tree: Any) -> Any:
    return _renamed(tree, "rna", "rna\0")


def dots(tree: Any) -> Any:
    return _renamed(tree, "rna", "..")


def endless_name(tree: Any) -> Any:
    return _renamed(tree, "rna", "r" * 300)


def shards_elsewhere(tree: Any) -> Any:
    tree["shards"] = {f"../../{key}": shard for key, shard in tree["shards"].items()}
    return tree


def metadata_elsewhere(tree: Any) -> Any:
    tree["metadata"] = {
        "/etc/passwd": {"bytes": 1, "sha256": "0" * 64},
        "a\0b": {"bytes": 1, "sha256": "0" * 64},
    }
    return tree


def many_cells(tree: Any) -> Any:
    tree["strata"]["rna"]["n_cells"] = 10**15
    return tree


def many_cells_in_one_shard(tree: Any) -> Any:
    tree["strata"]["rna"] |= {"n_cells": 10**15, "shard_blocks": 2**60}
    return tree


def wide_blocks(tree: Any) -> Any:
    tree["strata"]["rna"]["packed"]["rna"] |= {"capacity": 2**31, "rest": 2**31}
    return tree


def wide_barcodes(tree: Any) -> Any:
    tree["strata"]["rna"]["barcode_width"] = 4096
    tree["block_cells"] = 65536
    return tree


def no_strata(tree: Any) -> Any:
    return tree | {"strata": {}, "shards": {}}


def nothing(tree: Any) -> Any:
    return tree | {"strata": {}, "shards": {}, "modalities": {}, "metadata": {}}


def strange_notes(tree: Any) -> Any:
    notes = tree["provenance"]
    notes["inputs"], notes["cells"], notes["columns"], notes["appended"] = (
        [1, {"file": []}],
        {"in": "x"},
        [3],
        {"a": 1},
    )
    return tree


def notes_of_numbers(tree: Any) -> Any:
    return tree | {"provenance": {"features": {"rna": 7}, "tool": [], "inputs": {"a": None}}}


def _renamed(tree: Any, old: str, new: str) -> Any:
    """The modality under another name, everywhere."""
    text = json.dumps(tree)
    for before in (f'"{old}"', f'"{old}+', f"/{old}/", f"/{old}+"):
        text = text.replace(before, before.replace(old, json.dumps(new)[1:-1]))
    out: Any = json.loads(text)
    return out


ABSURD: list[Callable[[Any], Any]] = [
    *(leading_out, absolute, with_nul, dots, endless_name, shards_elsewhere, metadata_elsewhere),
    *(many_cells, many_cells_in_one_shard, wide_blocks, wide_barcodes, no_strata, nothing),
    *(strange_notes, notes_of_numbers),
]


# --- zarr.json ---


def metadata(base: Path, folder: Path, number: int, rng: np.random.Generator) -> Trial:
    root = copied(base, folder)
    paths = sorted(root.rglob("zarr.json"))
    arrays = [p for p in paths if b'"array"' in p.read_bytes()]
    path = (
        arrays[rng.integers(len(arrays))]
        if rng.random() < 0.85
        else paths[rng.integers(len(paths))]
    )
    tree = json.loads(path.read_text())
    if number % 12 == 11:
        content, told = spoil.broken_text(path.read_bytes(), rng)
    elif number % 2 and path in arrays:
        told = list(CHANGES)[number // 2 % len(CHANGES)]
        CHANGES[told](tree)
        content = spoil.text_of(tree)
    else:
        tree, told = spoil.spoiled(tree, rng)
        content = spoil.text_of(tree)
    path.write_bytes(content)
    again = bool(rng.integers(2))
    if again:
        sign(root)
    what = f"{path.relative_to(root)}{', signed again' if again else ''}: {told}"
    unsigned = frozenset() if again else frozenset({"check"})
    return Trial(what, attempts(root, sound_values(base / "s.zarr")), unsigned)


def _codecs(tree: Any) -> list[Any]:
    codecs: list[Any] = tree["codecs"][0]["configuration"]["codecs"]
    return codecs


def _put(**values: Any) -> Callable[[Any], None]:
    def put(tree: Any) -> None:
        tree.update(values)

    return put


def _coded(*codecs: Any) -> Callable[[Any], None]:
    """Other codecs inside the shards."""

    def put(tree: Any) -> None:
        _codecs(tree)[:] = codecs

    return put


def _shape(factor: int) -> Callable[[Any], None]:
    def put(tree: Any) -> None:
        tree["shape"] = [n * factor for n in tree["shape"]]

    return put


def _chunk(factor: int) -> Callable[[Any], None]:
    def put(tree: Any) -> None:
        grid = tree["chunk_grid"]["configuration"]
        grid["chunk_shape"] = [n * factor for n in grid["chunk_shape"]]
        inner = tree["codecs"][0]["configuration"]
        inner["chunk_shape"] = [n * factor for n in inner["chunk_shape"]]

    return put


def _without_checksum(tree: Any) -> None:
    _codecs(tree)[:] = [c for c in _codecs(tree) if c["name"] != "crc32c"]


def _index(**values: Any) -> Callable[[Any], None]:
    def put(tree: Any) -> None:
        tree["codecs"][0]["configuration"].update(values)

    return put


_BYTES = {"name": "bytes", "configuration": {"endian": "little"}}
CHANGES: dict[str, Callable[[Any], None]] = {
    "a codec that unpickles": _coded(
        _BYTES, {"name": "numcodecs.pickle", "configuration": {"protocol": 5}}
    ),
    "pickle instead of bytes": _coded({"name": "pickle"}),
    "a codec named like a module": _coded(
        {"name": spoil.CANARY}, {"name": f"{spoil.CANARY}.Canary"}
    ),
    "vlen-utf8": _coded({"name": "vlen-utf8"}),
    "gzip": _coded(_BYTES, {"name": "gzip", "configuration": {"level": 5}}),
    "zstd, which lets a flipped bit through": _coded(
        _BYTES, {"name": "zstd", "configuration": {"level": 1}}
    ),
    "no compression": _coded(_BYTES),
    "no checksum": _without_checksum,
    "turned axes": _coded({"name": "transpose", "configuration": {"order": [1, 0]}}, _BYTES),
    "no codecs": _put(codecs=[]),
    "bytes alone, no shards": _put(codecs=[_BYTES]),
    "shards in shards": lambda tree: _codecs(tree).insert(
        0, json.loads(json.dumps(tree["codecs"][0]))
    ),
    "the index at the start": _index(index_location="start"),
    "an index without a checksum": _index(index_codecs=[_BYTES]),
    "a compressed index": _index(
        index_codecs=[_BYTES, {"name": "gzip", "configuration": {"level": 1}}]
    ),
    "objects": _put(data_type="object"),
    "texts": _put(data_type="string"),
    "raw bytes": _put(data_type="r64"),
    "another type of the same width": lambda tree: tree.update(
        data_type={"uint8": "int8", "int32": "uint32", "uint32": "float32", "float32": "int32"}.get(
            tree["data_type"], "int16"
        )
    ),
    "bool": _put(data_type="bool", fill_value=False),
    "complex": _put(data_type="complex64", fill_value=[0.0, 0.0]),
    "another fill value": _put(fill_value=7),
    "no fill value": _put(fill_value=None),
    "an absurd shape": _shape(10**12),
    "a shape beyond 64 bits": _shape(2**62),
    "negative": _shape(-1),
    "empty": _shape(0),
    "absurd chunks": _chunk(10**6),
    "empty chunks": _chunk(0),
    "chunks and shape absurd": lambda tree: (_shape(10**6)(tree), _chunk(10**6)(tree))[0],
    "an axis more": lambda tree: tree.update(shape=[*tree["shape"], 1]),
    "no axis": _put(shape=[]),
    "chunk keys of version 2": _put(
        chunk_key_encoding={"name": "v2", "configuration": {"separator": "."}}
    ),
    "chunk keys that lead out": _put(
        chunk_key_encoding={"name": "default", "configuration": {"separator": "/../"}}
    ),
    "a chunk grid that is not regular": _put(
        chunk_grid={"name": "rectangular", "configuration": {}}
    ),
    "a transformer of storage": _put(storage_transformers=[{"name": spoil.CANARY}]),
    "a group": _put(node_type="group"),
    "version 2": _put(zarr_format=2),
    "an extension that must be understood": _put(hostile={"must_understand": True}),
    "attributes that name code": _put(
        attributes={"__reduce__": f"{spoil.CANARY}.Canary", "a": spoil.CODE}
    ),
    "names of axes": _put(dimension_names=["a", None]),
}
