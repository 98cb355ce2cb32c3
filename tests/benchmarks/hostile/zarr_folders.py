"""Malformed AnnData and MuData in Zarr folders, of both versions of Zarr.

The edits are those of HDF5 files, which are copied into Zarr; metadata and files are spoilt too.
"""

import json
import shutil
from functools import partial
from pathlib import Path
from random import Random

import h5py
import numpy as np
import zarr

from clue_dist.config import LONGEST_NAME
from tests.benchmarks.hostile import spoil
from tests.benchmarks.hostile.changes import REPLACED, list_edits, replace_path, spoil_bytes
from tests.benchmarks.hostile.hdf5 import H5AD, H5MU, OtherForm, edit_file
from tests.benchmarks.hostile.inputs import (
    Contents,
    read_h5ad,
    read_h5mu,
    read_modalities,
    try_conversion,
)
from tests.benchmarks.hostile.stores import edit_json
from tests.benchmarks.hostile.trial import Trial

FILES = ("csr.h5ad", "csc.h5ad", "dense.h5ad", "m.h5mu")
METADATA = list(list_edits("metadata"))
UNREAD = {"layers", "obsm", "obsp", "uns", "varm", "varp"}  # parts that no conversion reads
NAMES = ("zarr.json", ".zarray", ".zgroup", ".zattrs")


def spoil_zarr(base: Path, folder: Path, number: int, rng: Random) -> Trial:
    """Three of five are edits, the others changes of metadata and of any file or folder."""
    turn, kind = divmod(number, 5)
    name, version = FILES[turn % 4], 2 + turn // 4 % 2
    source, path = Path(shutil.copy(base / name, folder)), folder / "a.zarr"
    edits, must = (H5MU if name == "m.h5mu" and turn % 8 > 3 else H5AD), False
    with h5py.File(source, "r+") as file:
        if kind < 3:
            change = list(edits)[(turn * 3 + kind) % len(edits)]
            try:
                edit_file(file, change)
                must = edits[change]
            except OtherForm:
                change += " (not of this form)"
        must &= copy_group(file, zarr.open_group(path, mode="w", zarr_format=version))
    if kind == 3:
        change = spoil_metadata(path, turn, rng)
    elif kind == 4:
        change = spoil_file(path, folder, turn, rng)
    what = f"{name} as Zarr {version}: {change}"
    read, modality = (read_h5mu, "") if name == "m.h5mu" else (read_h5ad, "rna=")
    sound = partial(read, base / name)
    return try_conversion(what, path, read_zarr, sound, ("convert",) if must else (), modality)


def copy_group(source: h5py.Group, target: zarr.Group) -> bool:
    """Copy what Zarr can hold into a group, each axis in two chunks; whether that was all."""
    text = json.dumps(dict(source.attrs), default=lambda v: getattr(v, "tolist", v.__repr__)())
    target.attrs.update(json.loads(text))
    whole = True
    for name in source.keys() - UNREAD if isinstance(source, h5py.Group) else ():
        item = source[name]
        is_link = not isinstance(source.get(name, getlink=True), h5py.HardLink)
        if is_link or len(name) > LONGEST_NAME:  # no folder can be called so
            whole = False
        elif isinstance(item, h5py.Group):
            whole &= copy_group(item, target.create_group(name))
        else:
            texts = h5py.check_string_dtype(item.dtype)
            values = np.asarray(item.asstr()[()] if texts else item[()])
            values = values.astype(np.dtypes.StringDType()) if texts else values
            chunks = tuple(-(-size // 2) or 1 for size in values.shape) or "auto"
            try:
                whole &= copy_group(item, target.create_array(name, data=values, chunks=chunks))
            except ValueError:  # a type that Zarr does not know
                whole = False
    return whole


def spoil_metadata(path: Path, turn: int, rng: Random) -> str:
    found = rng.choice([file for file in sorted(path.rglob("*")) if file.name in NAMES])
    content, change = found.read_bytes(), METADATA[turn // 2 % len(METADATA)]
    try:
        content = edit_json(content, change)
    except (LookupError, TypeError):  # an edit that these metadata cannot have
        content, change = spoil.spoil_json(content, rng, 0.1)
    found.write_bytes(content)
    return f"{found.relative_to(path)}: {change}"


def spoil_file(path: Path, folder: Path, turn: int, rng: Random) -> str:
    outside, places = folder / "outside", sorted(path.rglob("*"))
    outside.mkdir()
    if turn % 3 == 0:
        found = rng.choice([place for place in places if place.is_file()])
        return f"{found.relative_to(path)}: {spoil_bytes(found, rng)}"
    found, how = rng.choice(places), REPLACED[turn % len(REPLACED)]
    replace_path(found, how, outside)
    return f"{found.relative_to(path)}: {how}"


def read_zarr(path: Path) -> Contents:
    group = zarr.open_group(path, mode="r")
    return read_modalities(group.get("mod", {"rna": group}))
