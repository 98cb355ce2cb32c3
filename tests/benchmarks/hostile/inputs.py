"""Malformed h5ad, h5mu, 10x and Matrix Market inputs: each is refused, or converted into what it holds, counts, batches
and cell types.

What it holds is asked of others: anndata, SciPy, h5py. Where they cannot read it, it must be what was there before.
"""

from __future__ import annotations

import gzip
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import anndata as ad
import h5py
import numpy as np
import pandas as pd
import scipy.io
import scipy.sparse as sp
from anndata.io import read_elem

from clue_dist.errors import ClueError
from clue_dist.store.reader import Store
from data_prep.options import FIELDS
from tests.benchmarks.hostile.changes import CELLS, GENES, H5AD, H5MU, TENX
from tests.benchmarks.hostile.hdf5 import hdf5, in_bytes
from tests.benchmarks.hostile.market import MTX, file_of
from tests.benchmarks.hostile.trial import Trial, command, wrong
from tests.unit.prep_helpers import (
    make_anndata,
    make_counts,
    read_counts,
    read_field,
    write_10x,
    write_h5ad,
    write_h5mu,
    write_mtx,
)

FORMS: dict[str, Any] = {"csr": sp.csr_matrix, "csc": sp.csc_matrix, "dense": np.asarray}
TYPES = ["Gene Expression"] * 14 + ["Antibody Capture"] * 6
Tables = dict[str, pd.DataFrame]  # cells x features, by modality


@dataclass(frozen=True)
class Holds:
    """What an input holds. fields: "batch", "label" of each cell by its barcode, where the input has them."""

    tables: Tables
    fields: dict[str, dict[str, str | None]] = field(default_factory=dict)


def ready(base: Path) -> None:
    counts = make_counts(CELLS, GENES)
    obs = {"batch": pd.Categorical([f"b{i % 3}" for i in range(CELLS)]), "cell_type": ["T"] * CELLS}
    for name, form in FORMS.items():
        write_h5ad(base / f"{name}.h5ad", counts, form, **obs)
    proteins = make_counts(CELLS, 6, 1, "p")
    write_h5mu(
        base / "m.h5mu", rna=make_anndata(counts, **obs), adt=make_anndata(proteins.iloc[10:])
    )
    write_10x(base / "a.h5", counts, TYPES)
    write_mtx(base / "mtx", counts, TYPES, zipped=False)
    (base / "zipped").mkdir()
    for path in (base / "mtx").iterdir():
        (base / "zipped" / f"{path.name}.gz").write_bytes(gzip.compress(path.read_bytes()))


# --- what is tried ---


def converted(words: list[str], folder: Path, before: Holds, after: Callable[[], Holds]) -> None:
    """Convert; the store must hold what other readers find, where they find anything."""
    out = folder / "out.zarr"
    try:
        command("convert", *words, "--out", out, "--workers", 1)
    except ClueError:
        if out.exists():
            wrong("refused, but the store is there")
        raise
    store, expected = Store(out), _read(after) or before
    problems = [
        p
        for m in store.modalities
        if (p := _difference(read_counts(store, m), expected.tables.get(m)))
    ]
    for name, values in expected.fields.items():
        served = {cell: value for cell, value in read_field(store, name).items() if cell in values}
        others = [
            f"{cell}: {value}, not {values[cell]}"
            for cell, value in served.items()
            if value != values[cell]
        ]
        problems += [f"{len(others)} other values of {name}, {others[0]}"] if others else []
    if problems:
        wrong("; ".join(problems))
    command("check", out)


def _read(read: Callable[[], Holds]) -> Holds | None:
    try:
        return read()
    except Exception:  # noqa: BLE001  a reader that is not ours may fail as it likes
        return None


def _difference(got: pd.DataFrame, expected: pd.DataFrame | None) -> str | None:
    """Cells without counts are dropped; names of features are those of the files but where they repeat."""
    if expected is None:
        return "a modality that was not in the file"
    want = expected[expected.to_numpy().any(axis=1)]
    if got.shape != want.shape or set(got.index) != set(want.index):
        return f"{got.shape[0]} x {got.shape[1]}, not {want.shape[0]} x {want.shape[1]}, or other cells"
    if set(got.columns) == set(want.columns):
        want = want[got.columns]
    values = want.loc[got.index].to_numpy()
    return None if np.allclose(got.to_numpy(), values, rtol=1e-6, atol=0) else "other values"


def read_h5ad(path: Path) -> Holds:
    return _of_anndata({"rna": ad.read_h5ad(path)})


def read_h5mu(path: Path) -> Holds:
    with h5py.File(path) as file:
        given = {name: read_elem(file["mod"][name]) for name in file["mod"]}
        for name, one in given.items():
            for column in one.obs:
                own = file[f"mod/{name}/obs/{column}"]
                if (
                    "categories" in own.attrs
                ):  # as before anndata 0.8, which `read_elem` leaves as codes
                    names = file[own.attrs["categories"]].asstr()[:]
                    one.obs[column] = pd.Categorical.from_codes(own[:], names)
        return _of_anndata(given)


def _of_anndata(given: dict[str, ad.AnnData]) -> Holds:
    """What is known of a cell is what one of its modalities says; no two say it here."""
    tables, fields = (
        {name: _table(one) for name, one in given.items()},
        dict[str, dict[str, str | None]](),
    )
    for field_, column in FIELDS.items():
        for one in given.values():
            if column in one.obs:
                fields.setdefault(field_, {}).update(_texts(one.obs[column]))
    return Holds(tables, fields)


def _table(given: ad.AnnData) -> pd.DataFrame:
    values = given.X.toarray() if sp.issparse(given.X) else np.asarray(given.X)
    return pd.DataFrame(values.astype(np.float64), given.obs_names.astype(str), given.var_names)


def _texts(column: pd.Series) -> dict[str, str | None]:
    """By cell; whole numbers are written without a point, what is empty or NaN is unknown."""
    values = [None if pd.isna(value) or value == "" else value for value in column]
    whole = all(value is None or (isinstance(value, float) and value % 1 == 0) for value in values)
    return {
        str(cell): None if value is None else str(int(value) if whole else value)
        for cell, value in zip(column.index, values, strict=True)
    }


def read_10x(path: Path) -> Holds:
    with h5py.File(path) as file:
        group = file["matrix"]
        data, indices, indptr = (group[name][:] for name in ("data", "indices", "indptr"))
        types = group["features/feature_type"].asstr()[:]
        barcodes = group["barcodes"].asstr()[:]
        return by_type(
            sp.csr_matrix((data, indices, indptr), shape=(len(barcodes), len(types))),
            barcodes,
            types,
        )


def read_mtx(folder: Path) -> Holds:
    files = {path.name.partition(".")[0]: path for path in folder.iterdir()}
    lines = {
        name: pd.read_csv(files[name], sep="\t", header=None, quoting=3)
        for name in ("features", "barcodes")
    }
    matrix = sp.csr_matrix(scipy.io.mmread(files["matrix"]).T)
    return by_type(matrix, lines["barcodes"][0].to_numpy(), lines["features"][2].to_numpy())


def by_type(matrix: sp.csr_matrix, barcodes: np.ndarray, types: np.ndarray) -> Holds:
    table = pd.DataFrame(matrix.toarray(), barcodes.astype(str))
    names = {"Gene Expression": "rna", "Antibody Capture": "adt"}
    return Holds({name: table.loc[:, types == type_] for type_, name in names.items()})


# --- one input ---


def h5ad(base: Path, folder: Path, number: int, rng: np.random.Generator) -> Trial:
    form = list(FORMS)[number % 3]
    path = Path(shutil.copy(base / f"{form}.h5ad", folder / "a.h5ad"))
    told, must = hdf5(path, H5AD, number // 3, rng, folder)
    before = read_h5ad(base / f"{form}.h5ad")
    tried = partial(converted, [f"rna={path}"], folder, before, lambda: read_h5ad(path))
    return Trial(f"h5ad, {form}: {told}", {"convert": tried}, must)


def h5mu(base: Path, folder: Path, number: int, rng: np.random.Generator) -> Trial:
    path = Path(shutil.copy(base / "m.h5mu", folder / "m.h5mu"))
    told, must = hdf5(path, H5MU if number % 3 else H5AD, number, rng, folder)
    tried = partial(
        converted, [str(path)], folder, read_h5mu(base / "m.h5mu"), lambda: read_h5mu(path)
    )
    return Trial(f"h5mu: {told}", {"convert": tried}, must)


def tenx(base: Path, folder: Path, number: int, rng: np.random.Generator) -> Trial:
    path = Path(shutil.copy(base / "a.h5", folder / "a.h5"))
    told, must = hdf5(path, TENX, number, rng, folder)
    tried = partial(converted, [str(path)], folder, read_10x(base / "a.h5"), lambda: read_10x(path))
    return Trial(f"10x: {told}", {"convert": tried}, must)


def mtx(base: Path, folder: Path, number: int, rng: np.random.Generator) -> Trial:
    zipped = number % 3 == 2
    path = Path(shutil.copytree(base / ("zipped" if zipped else "mtx"), folder / "mtx"))
    files = {p.name.partition(".")[0]: p for p in path.iterdir()}
    if number % 4 == 3:
        name = ("matrix", "matrix", "features", "barcodes")[rng.integers(4)]
        told, must = f"{name}: {in_bytes(files[name], rng, folder)}", frozenset[str]()
    elif number % 8 == 6:
        told, must = file_of(files, rng, folder), frozenset({"convert"})
    else:
        told = list(MTX)[(number - number // 4) % len(MTX)]
        name, change, refuse = MTX[told]
        content = files[name].read_bytes()
        text = change(gzip.decompress(content) if zipped else content)
        files[name].write_bytes(gzip.compress(text) if zipped else text)
        must = frozenset({"convert"} if refuse else ())
    tried = partial(converted, [str(path)], folder, read_mtx(base / "mtx"), lambda: read_mtx(path))
    return Trial(f"mtx{', gzipped' if zipped else ''}: {told}", {"convert": tried}, must)
