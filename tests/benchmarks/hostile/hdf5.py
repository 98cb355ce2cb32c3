"""HDF5 files that were changed: by edits, at some object, in their bytes."""

from collections.abc import Callable, Iterable
from contextlib import suppress
from functools import partial
from pathlib import Path
from random import Random
from typing import Any

import h5py
import numpy as np

from tests.benchmarks.hostile.changes import evaluate, list_edits, spoil_bytes

CELLS = 40
H5AD, H5MU = list_edits("matrix", "h5ad"), list_edits("h5mu")
TENX = list_edits("matrix", "10x")
OBJECTS, ATTRIBUTES = (list(list_edits(group)) for group in ("objects", "attributes"))
TEXT = h5py.string_dtype()
VIEW = h5py.VirtualLayout((100,), "f4")
VIEW[:] = h5py.VirtualSource("/nowhere/else.h5", "x", (100,))


class OtherForm(Exception):
    """An edit that this form of a matrix cannot have."""


def find_place(file: h5py.File, path: str) -> str:
    """The name of an object in this form of a file: `X` is the matrix, `data` its values."""
    root, first = "mod/rna/" if "mod" in file else "", path.partition("/")[0]
    matrix = "matrix" if "matrix" in file else f"{root}X"
    dense = isinstance(file.get(matrix), h5py.Dataset)
    if path.startswith("X/") and dense:
        raise OtherForm
    if first == "data":
        return matrix if dense else f"{matrix}/data"
    return path.replace("X", matrix, 1) if first == "X" else root * (first in ("obs", "var")) + path


def edit_file(file: h5py.File, edit: str) -> None:
    """Carry out an edit.

    Raises:
        OtherForm: this form of a file cannot have it.
    """
    for part in [] if edit in COLUMNS else edit.split(" & "):
        path, _, expression = part.removeprefix("del ").partition(" = ")
        path, _, new = path.partition(" -> ")
        name, _, attribute = path.partition("@")
        place = find_place(file, name)
        if new:
            file.move(place, evaluate(new))
            file["mod"].attrs.pop("mod-order", None)
        elif attribute:
            file[place].attrs[attribute] = evaluate(expression)
        elif expression:
            put_values(file, place, expression)
        else:
            del file[place]
    if edit in COLUMNS:
        COLUMNS[edit](file[find_place(file, "obs")])


def put_values(file: h5py.File, place: str, expression: str) -> None:
    """Put anything in the place of an object, with the attributes it had; texts are decoded."""
    found, before = file[place], None
    if isinstance(found, h5py.Dataset):
        before = found.asstr()[()] if h5py.check_string_dtype(found.dtype) else found[()]
    kept = dict(found.attrs)
    values = evaluate(expression, before, file=file, **WORDS)
    if isinstance(values, list) or getattr(values, "dtype", None) == np.dtype(object):
        values = np.array(values, TEXT)
    del file[place]
    file[place] = values
    if isinstance(file[place], h5py.Dataset):
        file[place].attrs.update(kept)


def split_entries(values: np.ndarray, file: h5py.File) -> list[np.ndarray]:
    """The values of each row, or column, of a sparse matrix."""
    return np.split(values, file[find_place(file, "X/indptr")][1:-1])


WORDS: dict[str, Any] = {  # the entries of a row in another order, or twice
    "turned": lambda v, file: np.concatenate([part[::-1] for part in split_entries(v, file)]),
    "twice": lambda v, file: np.concatenate([np.tile(p, 2) for p in split_entries(v, file)]),
}


def age_column(obs: h5py.Group, shift: int) -> None:
    """A categorical column as a dataset of codes that refers to its categories."""
    codes, categories = obs["batch/codes"][:], obs["batch/categories"].asstr()[:]
    del obs["batch"]
    obs["__categories/batch"] = np.array(categories, TEXT)
    obs["batch"] = codes + shift
    obs["batch"].attrs["categories"] = obs["__categories/batch"].ref


def map_column(obs: h5py.Group) -> None:
    """A column that is a mapping, with as many members as there are cells."""
    del obs["batch"]
    group = obs.create_group("batch")
    group.attrs.update({"encoding-type": "dict", "encoding-version": "0.1.0"})
    for cell in range(CELLS):
        group[f"m{cell}"] = cell


COLUMNS: dict[str, Callable[[h5py.Group], None]] = {
    "a column as before anndata 0.8, codes + 0": partial(age_column, shift=0),
    "a column as before anndata 0.8, codes + 100": partial(age_column, shift=100),
    "a column that is a mapping": map_column,
}


def share_groups(file: h5py.File) -> h5py.Group:
    """Few groups, that are reached in 30^8 ways."""
    below = file.create_group(None)
    for _ in range(7):
        group = file.create_group(None)
        for number in range(30):
            group[f"g{number}"] = below
        below = group
    return below


def spoil_object(file: h5py.File, rng: Random, folder: Path) -> str:
    """One object becomes another, or loses or changes an attribute; what was done."""
    names: list[str] = []
    file.visit(names.append)
    # What the conversion reads, most of all.
    rest = ("obsm", "uns", "varm", "obsp", "varp")
    name = rng.choice([found for found in names if not found.startswith(rest)])
    kept = dict(file[name].attrs)
    if kept and rng.random() < 0.4:
        key, how = rng.choice(list(kept)), rng.choice(ATTRIBUTES)
        if rng.random() < 0.4:
            del file[name].attrs[key]
            return f"{name} without its {key}"
        file[name].attrs[key] = evaluate(how)
        return f"{name}: {key} = {how}"
    how, outside = rng.choice(OBJECTS), str(folder / "outside.h5")
    with h5py.File(outside, "w") as other:
        file.copy(name, other, "moved")
    del file[name]
    makers = {"create": file.create_dataset, "group": file.create_group, "link": file.__setitem__}
    words = {word: partial(maker, name) for word, maker in makers.items()}
    words |= {"file": file, "name": name, "outside": outside, "share_groups": share_groups}
    evaluate(how, TEXT=TEXT, VIEW=VIEW, **words)
    with suppress(KeyError, OSError, RuntimeError):  # a link to nothing has no attributes
        if rng.random() < 0.5 and name in file:
            file[name].attrs.update(kept)
    return f"{name}: {how}"


def spoil_hdf5(
    path: Path, edits: dict[str, bool], number: int, rng: Random, folder: Path
) -> tuple[str, Iterable[str]]:
    """An edit, a change of any object, or of the file's bytes: what it was, what must refuse it."""
    kind = number % 5
    if kind == 4:
        return spoil_bytes(path, rng), ()
    with h5py.File(path, "r+") as file:
        if kind == 3:
            return spoil_object(file, rng, folder), ()
        edit = list(edits)[(number // 5 * 3 + kind) % len(edits)]
        try:
            edit_file(file, edit)
        except OtherForm:
            return f"{edit} (not of this form)", ()
    return edit, ("convert",) if edits[edit] else ()
