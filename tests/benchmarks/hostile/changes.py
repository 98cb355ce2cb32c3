"""Changes of an HDF5 file by name, each with whether it must be refused."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import Any

import h5py
import numpy as np

from tests.benchmarks.hostile.spoil import CANARY

CELLS, GENES = 40, 20
Change = Callable[[h5py.File, np.random.Generator], object]


class NotHere(Exception):
    """A change that this form of a matrix cannot have."""


def _x(file: h5py.File) -> Any:
    return file["X"] if "X" in file else file["mod/rna/X"] if "mod" in file else file["matrix"]


def _root(file: h5py.File) -> Any:
    return file["mod/rna"] if "mod" in file else file


def _data(file: h5py.File) -> h5py.Dataset:
    x = _x(file)
    return x if isinstance(x, h5py.Dataset) else x["data"]


def _sparse(file: h5py.File) -> Any:
    x = _x(file)
    if isinstance(x, h5py.Dataset):
        raise NotHere
    return x


def _set(value: Any, share: float = 0.01) -> Change:
    """Some values of the matrix, of a type that holds them."""

    def change(file: h5py.File, rng: np.random.Generator) -> None:
        data = _data(file)
        values = data[()].astype(np.result_type(data.dtype, np.min_scalar_type(value)))
        values.reshape(-1)[rng.integers(values.size, size=max(1, int(share * values.size)))] = value
        _put(data, values)

    return change


def _put(old: h5py.Dataset, values: Any, **options: Any) -> None:
    """Other values of any type in the place of a dataset, with its attributes."""
    parent, name, kept = old.parent, old.name, dict(old.attrs)
    del parent[name]
    parent.create_dataset(name, data=values, **options).attrs.update(kept)


def _typed(dtype: str) -> Change:
    return lambda file, rng: _put(_data(file), _data(file)[()].astype(dtype))


def _of(name: str, change: Callable[[np.ndarray], Any]) -> Change:
    return lambda file, rng: _put(_sparse(file)[name], change(_sparse(file)[name][:]))


def _at(place: int, value: Any) -> Callable[[np.ndarray], Any]:
    def change(values: np.ndarray) -> np.ndarray:
        values = values.astype(np.int64)
        values[place] = value
        return values

    return change


def _unsorted(file: h5py.File, rng: np.random.Generator) -> None:
    x = _sparse(file)
    indptr, indices, data = (x[name][:] for name in ("indptr", "indices", "data"))
    for lo, hi in pairwise(indptr):
        order = rng.permutation(hi - lo)
        indices[lo:hi], data[lo:hi] = indices[lo:hi][order], data[lo:hi][order]
    x["indices"][:], x["data"][:] = indices, data


def _repeated(value: int) -> Change:
    """Every entry twice, in its row or column; each count is `value`."""

    def change(file: h5py.File, rng: np.random.Generator) -> None:
        x = _sparse(file)
        indptr, indices = x["indptr"][:], x["indices"][:]
        lengths = np.diff(indptr)
        twice = [np.tile(indices[lo : lo + n], 2) for lo, n in zip(indptr, lengths, strict=False)]
        values = np.concatenate(twice)
        _put(x["indices"], values)
        _put(x["data"], np.full(len(values), value, np.int32))
        _put(x["indptr"], np.concatenate([[0], np.cumsum(2 * lengths)]).astype(indptr.dtype))

    return change


def _zeros_stored(file: h5py.File, rng: np.random.Generator) -> None:
    data = _sparse(file)["data"]
    values = data[:]
    values[rng.random(len(values)) < 0.2] = 0
    data[:] = values


def _names(frame_: str, change: Callable[[list[str]], Any]) -> Change:
    """Names of cells (obs) or features (var)."""

    def put(file: h5py.File, rng: np.random.Generator) -> None:
        table = _root(file)[frame_]
        index = table[table.attrs["_index"]]
        _put(index, np.array(change(index.asstr()[:].tolist()), object), dtype=h5py.string_dtype())

    return put


def _attribute(of: str, key: str, value: Any) -> Change:
    def put(file: h5py.File, rng: np.random.Generator) -> None:
        part = _x(file) if of == "X" else _root(file)[of]
        part.attrs[key] = value

    return put


def _delete(name: str) -> Change:
    def delete(file: h5py.File, rng: np.random.Generator) -> None:
        if name.startswith("X/"):
            _sparse(file)
        del _root(file)[name]

    return delete


def _codes(change: Callable[[np.ndarray], Any]) -> Change:
    return lambda file, rng: _put(
        _root(file)["obs/batch/codes"], change(_root(file)["obs/batch/codes"][:])
    )


def _older(change: Callable[[np.ndarray], Any]) -> Change:
    """A categorical column as a dataset of codes that refers to its categories."""

    def put(file: h5py.File, rng: np.random.Generator) -> None:
        obs = _root(file)["obs"]
        codes, categories = obs["batch/codes"][:], obs["batch/categories"].asstr()[:]
        del obs["batch"]
        obs.create_dataset("__categories/batch", data=categories, dtype=h5py.string_dtype())
        obs.create_dataset("batch", data=change(codes)).attrs["categories"] = obs[
            "__categories/batch"
        ].ref

    return put


def _mapping(file: h5py.File, rng: np.random.Generator) -> None:
    """As many members as there are cells."""
    obs = _root(file)["obs"]
    del obs["batch"]
    group = obs.create_group("batch")
    group.attrs.update({"encoding-type": "dict", "encoding-version": "0.1.0"})
    for cell in range(CELLS):
        group[f"m{cell}"] = cell


MATRIX: dict[str, tuple[Change, bool]] = {
    "NaN": (_set(np.nan), True),
    "infinite": (_set(np.inf), True),
    "negative": (_set(-1), True),
    "fractions": (_set(0.5), True),
    "nearly whole": (_set(1 + 1e-6), True),
    "counts above 2^24": (_set(2**24 + 1), True),
    "counts of 2^62": (_set(2**62), True),
    "counts of 2^64 - 1": (_set(2**64 - 1), True),
    "counts as texts": (lambda file, rng: _put(_data(file), _data(file)[()].astype("S8")), True),
    "complex counts": (_typed("complex64"), True),
    "half precision": (_typed("f2"), False),
    "big-endian": (_typed(">f4"), False),
    "big-endian integers": (_typed(">i8"), False),
    "bytes": (_typed("i1"), False),
    "unsigned 64 bits": (_typed("u8"), False),
    "long doubles": (_typed("longdouble"), False),
    "one value less": (_of("data", lambda v: v[:-1]), True),
    "one index less": (_of("indices", lambda v: v[:-1]), True),
    "one value more": (_of("data", lambda v: np.append(v, 1)), False),
    "values with two axes": (_of("data", lambda v: v[:, None]), True),
    "indices beyond the last": (_of("indices", _at(3, 10**6)), True),
    "indices beyond 32 bits": (_of("indices", _at(3, 2**40)), True),
    "negative indices": (_of("indices", _at(3, -1)), True),
    "fractional indices": (_of("indices", lambda v: v + 0.5), True),
    "indices as texts": (_of("indices", lambda v: v.astype("S4")), True),
    "unsorted": (_unsorted, False),
    "every entry twice": (_repeated(3), False),
    "entries whose sum is too large": (_repeated(2**24), True),
    "entries whose sum overflows": (_repeated(2**31 - 1), True),
    "zeros that are stored": (_zeros_stored, False),
    "indptr that falls": (_of("indptr", _at(5, 10**6)), True),
    "a negative indptr": (_of("indptr", _at(1, -5)), True),
    "indptr that does not begin at 0": (_of("indptr", _at(0, 3)), True),
    "an absurd end": (_of("indptr", _at(-1, 2**50)), True),
    "an end too early": (_of("indptr", lambda v: np.append(v[:-1], v[-2])), False),
    "an indptr too short": (_of("indptr", lambda v: v[:-1]), True),
    "an indptr too long": (_of("indptr", lambda v: np.append(v, v[-1])), True),
    "no indptr": (_of("indptr", lambda v: v[:0]), True),
    "a fractional indptr": (_of("indptr", lambda v: v + 0.5), True),
}
H5AD: dict[str, tuple[Change, bool]] = {
    **MATRIX,
    "another encoding": (_attribute("X", "encoding-type", "rec-array"), False),
    "CSR called CSC": (_attribute("X", "encoding-type", "csc_matrix"), False),
    "CSC called CSR": (_attribute("X", "encoding-type", "csr_matrix"), False),
    "an encoding that names code": (_attribute("X", "encoding-type", CANARY), False),
    "a version from the future": (_attribute("X", "encoding-version", "99.0.0"), False),
    "a shape too large": (_attribute("X", "shape", np.array([10**12, 10**12])), False),
    "a shape too small": (_attribute("X", "shape", np.array([3, 3])), False),
    "a negative shape": (_attribute("X", "shape", np.array([-40, -20])), False),
    "a fractional shape": (_attribute("X", "shape", np.array([40.5, 20.5])), False),
    "a shape of text": (_attribute("X", "shape", "40x20"), False),
    "no X": (_delete("X"), True),
    "no data": (_delete("X/data"), True),
    "no indices": (_delete("X/indices"), True),
    "no indptr at all": (_delete("X/indptr"), True),
    "no obs": (_delete("obs"), True),
    "no var": (_delete("var"), True),
    "no names of cells": (_delete("obs/_index"), True),
    "no names of features": (_delete("var/_index"), True),
    "no codes of a column": (_delete("obs/batch/codes"), True),
    "no categories of a column": (_delete("obs/batch/categories"), True),
    "a cell twice": (_names("obs", lambda n: [n[1], *n[1:]]), True),
    "all cells alike": (_names("obs", lambda n: ["same"] * len(n)), True),
    "a feature twice": (_names("var", lambda n: [n[1], *n[1:]]), True),
    "a cell less": (_names("obs", lambda n: n[:-1]), True),
    "a feature more": (_names("var", lambda n: [*n, "more"]), True),
    "no cells": (_names("obs", lambda n: []), True),
    "an endless name of a cell": (_names("obs", lambda n: ["x" * 5_000_000, *n[1:]]), True),
    "a cell of 5,000 letters": (_names("obs", lambda n: ["x" * 5000, *n[1:]]), True),
    "an endless name of a feature": (_names("var", lambda n: ["x" * 5_000_000, *n[1:]]), False),
    "names like paths": (_names("obs", lambda n: [f"../../{x}" for x in n]), False),
    "names in other scripts": (_names("obs", lambda n: [f"細胞🧬{x}" for x in n]), False),
    "cells without names": (_names("obs", lambda n: ["", *n[1:]]), False),
    "features without names": (_names("var", lambda n: ["", *n[1:]]), False),
    "a column as before anndata 0.8": (_older(lambda v: v), False),
    "such a column's codes beyond its categories": (_older(lambda v: v + 100), True),
    "a column that is a mapping": (_mapping, True),
    "codes beyond the categories": (_codes(lambda v: v + 100), True),
    "codes below none": (_codes(lambda v: v - 100), True),
    "fractional codes": (_codes(lambda v: v + 0.5), True),
    "codes as texts": (_codes(lambda v: v.astype("S4")), True),
    "fewer codes than cells": (_codes(lambda v: v[:-3]), True),
    "more codes than cells": (_codes(lambda v: np.append(v, v)), True),
    "codes with two axes": (_codes(lambda v: v[:, None]), True),
    "an index that is not there": (_attribute("obs", "_index", "nowhere"), True),
    "an index that is a number": (_attribute("obs", "_index", 3), True),
    "an index that leads out": (_attribute("obs", "_index", "../var/_index"), True),
    "no list of columns": (_attribute("obs", "column-order", 7), False),
    "columns that are not there": (
        _attribute("obs", "column-order", np.array(["x", "y"], "S")),
        False,
    ),
}


def _modalities(value: Any) -> Change:
    return lambda file, rng: file["mod"].attrs.__setitem__("mod-order", value)


def _moved(old: str, new: str) -> Change:
    def change(file: h5py.File, rng: np.random.Generator) -> None:
        file.move(old, new)
        if "mod-order" in file["mod"].attrs:
            del file["mod"].attrs["mod-order"]

    return change


def _whole(name: str, value: Any) -> Change:
    def change(file: h5py.File, rng: np.random.Generator) -> None:
        del file[name]
        if value is not None:
            file[name] = value

    return change


H5MU: dict[str, tuple[Change, bool]] = {
    "no modalities": (_whole("mod", None), True),
    "modalities that are a number": (_whole("mod", 7), True),
    "a modality that is a number": (_whole("mod/adt", 7), True),
    "a modality less than told": (_whole("mod/adt", None), True),
    "a modality that is the file": (_whole("mod/adt", h5py.SoftLink("/")), True),
    "a modality twice": (_modalities(np.array(["rna", "rna"], object)), True),
    "a modality that is not there": (_modalities(np.array(["rna", "atac"], object)), True),
    "an order that leads out": (_modalities(np.array(["../../rna", "/etc/passwd"], object)), True),
    "an order of NUL": (_modalities(np.bytes_(b"a\0b")), True),
    "an order of numbers": (_modalities(np.array([1, 2])), True),
    "an order that is a number": (_modalities(7), True),
    "an order of nothing": (_modalities(h5py.Empty("f")), True),
    "no order": (_moved("mod/rna", "mod/gex"), False),
    "a name that says nothing": (_moved("mod/rna", "mod/xyz"), True),
    "a name with a slash": (_moved("mod/rna", "mod/a/rna"), True),
    "a name of dots": (_moved("mod/rna", "mod/..rna"), True),
    "a name of 300 letters": (_moved("mod/rna", "mod/rna_" + "x" * 300), True),
    "a name with spaces": (_moved("mod/rna", "mod/rna counts"), True),
    "the name that is reserved": (_moved("mod/rna", "mod/obs"), True),
    "no shared obs": (_whole("obs", None), False),
    "a shared obs that is a number": (_whole("obs", 7), False),
    "no cells shared": (_names("obs", lambda n: [f"other{x}" for x in n]), False),
    "all cells alike": (_names("obs", lambda n: ["same"] * len(n)), True),
    "NaN in one modality": (_set(np.nan), True),
    "negative in one modality": (_set(-3), True),
}


def _matrix(name: str, change: Callable[[np.ndarray], Any]) -> Change:
    return lambda file, rng: _put(file["matrix"][name], change(file["matrix"][name][:]))


TENX: dict[str, tuple[Change, bool]] = {
    **MATRIX,
    "no matrix": (_whole("matrix", None), True),
    "no features": (_whole("matrix/features", None), True),
    "features that are a number": (_whole("matrix/features", 7), True),
    "no barcodes": (_whole("matrix/barcodes", None), True),
    "no shape": (_whole("matrix/shape", None), True),
    "no feature types": (_whole("matrix/features/feature_type", None), True),
    "a feature type less": (_matrix("features/feature_type", lambda v: v[:-1]), True),
    "a name less": (_matrix("features/name", lambda v: v[:-1]), True),
    "an id more": (_matrix("features/id", lambda v: np.append(v, b"more")), True),
    "all ids and names alike": (
        lambda file, rng: [
            _put(file[f"matrix/features/{n}"], np.array([b"same"] * GENES)) for n in ("id", "name")
        ],
        True,
    ),
    "ids that are numbers": (_matrix("features/id", lambda v: np.arange(len(v))), False),
    "names that are no UTF-8": (
        _matrix("features/name", lambda v: np.array([b"\xff%d" % i for i in range(GENES)])),
        True,
    ),
    "types that say nothing": (
        _matrix("features/feature_type", lambda v: np.array([b"?"] * len(v))),
        True,
    ),
    "barcodes that are no UTF-8": (
        _matrix("barcodes", lambda v: np.array([b"\xff%d" % i for i in range(CELLS)])),
        True,
    ),
    "barcodes that are numbers": (_matrix("barcodes", lambda v: np.arange(len(v))), False),
    "a barcode twice": (_matrix("barcodes", lambda v: np.append(v[1], v[1:])), True),
    "a barcode less": (_matrix("barcodes", lambda v: v[:-1]), True),
    "barcodes with two axes": (_matrix("barcodes", lambda v: v[:, None]), True),
    "a turned shape": (_matrix("shape", lambda v: v[::-1]), True),
    "an absurd shape": (_matrix("shape", lambda v: np.array([10**12, 10**12])), True),
    "a fractional shape": (_matrix("shape", lambda v: v + 0.5), True),
    "a shape of one": (_matrix("shape", lambda v: v[:1]), True),
    "a negative shape": (_matrix("shape", lambda v: -v), True),
}
