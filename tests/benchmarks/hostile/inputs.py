"""Malformed h5ad, h5mu and 10x inputs: refused, or converted into what they hold.

What an input holds, counts, batches and cell types, is asked of others: anndata, SciPy, h5py. Where
they cannot read it, it must be what was there before.
"""

import gzip
import shutil
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from random import Random
from typing import Any

import anndata as ad
import h5py
import numpy as np
import pandas as pd
import scipy.sparse as sp
from anndata.io import read_elem

from clue_dist.errors import ClueError
from clue_dist.kinds import suggest_kind
from clue_dist.store.reader import Store
from data_prep.options import FIELDS
from tests.benchmarks.hostile.hdf5 import CELLS, H5AD, H5MU, TENX, spoil_hdf5
from tests.benchmarks.hostile.trial import Trial, WrongValues, run_data_prep
from tests.unit import prep_helpers as prep

FORMS: dict[str, Any] = {"csr": sp.csr_matrix, "csc": sp.csc_matrix, "dense": np.asarray}
TYPES = {"Gene Expression": "rna", "Antibody Capture": "adt"}


@dataclass(frozen=True)
class Contents:
    """What an input holds."""

    tables: dict[str, pd.DataFrame]  # cells x features, by modality
    fields: dict[str, dict[str, str | None]] = field(
        default_factory=dict
    )  # "batch", "label" by cell


def make_sound(base: Path) -> None:
    """The same cells in every format."""
    counts, proteins = prep.make_counts(CELLS, 20), prep.make_counts(CELLS, 6, 1, "p")
    batch = pd.Categorical([f"b{i % 3}" for i in range(CELLS)])
    obs = {"batch": batch, "cell_type": ["T"] * CELLS}
    for name, form in FORMS.items():
        prep.write_h5ad(base / f"{name}.h5ad", counts, form, **obs)
    tables = {"rna": prep.make_anndata(counts, **obs), "adt": prep.make_anndata(proteins.iloc[10:])}
    prep.write_h5mu(base / "m.h5mu", **tables)
    types = [kind for kind, n in zip(TYPES, (14, 6), strict=True) for _ in range(n)]
    prep.write_10x(base / "a.h5", counts, types)
    prep.write_mtx(base / "mtx", counts, types, zipped=False)
    (base / "zipped").mkdir()
    for path in (base / "mtx").iterdir():
        (base / "zipped" / f"{path.name}.gz").write_bytes(gzip.compress(path.read_bytes()))


# --- what is tried ---


def try_conversion(
    what: str,
    path: Path,
    read: Callable[[Path], Contents],
    sound: Callable[[], Contents],
    must_refuse: Iterable[str],
    name: str = "",
    options: Iterable[str] = (),
) -> Trial:
    """Convert an input: the store must hold what other readers find, or what was there before."""

    def convert() -> None:
        out, expected = path.with_name("out.zarr"), None
        try:
            run_data_prep("convert", f"{name}{path}", *options, "--out", out, "--workers", 1)
        except ClueError:
            if out.exists():
                raise WrongValues("refused, but the store is there") from None
            raise
        with suppress(Exception):  # a reader that is not ours may fail as it likes
            expected = read(path)
        if problems := list(compare_store(Store(out), expected or sound())):
            raise WrongValues("; ".join(problems))
        run_data_prep("check", out)

    return Trial(what, {"convert": convert}, must_refuse)


def compare_store(store: Store, expected: Contents) -> Iterator[str]:
    """How a store differs from what it must hold."""
    for modality in store.modalities:
        # A modality whose name tells its kind, as "rna counts" does, is called by that.
        names = [name for name in expected.tables if modality in (name, suggest_kind(name))]
        if names:
            yield from compare_tables(prep.read_counts(store, modality), expected.tables[names[0]])
        else:
            yield "a modality that was not in the file"
    for name, values in expected.fields.items():
        served = prep.read_field(store, name)
        others = [cell for cell in served.keys() & values if served[cell] != values[cell]]
        if others:
            first = f"{served[others[0]]}, not {values[others[0]]}"
            yield f"{len(others)} other values of {name}, {first}"


def compare_tables(found: pd.DataFrame, expected: pd.DataFrame) -> Iterator[str]:
    """How tables differ; cells without counts are dropped, names of features may be made unique."""
    wanted = expected[expected.to_numpy().any(axis=1)]
    if found.shape != wanted.shape or set(found.index) != set(wanted.index):
        yield f"{found.shape}, not {wanted.shape}, or other cells"
        return
    if set(found.columns) == set(wanted.columns):
        wanted = wanted[found.columns]
    values = wanted.loc[found.index].to_numpy()
    # Counts that are nearly whole are rounded.
    if not np.allclose(found.to_numpy(), values, rtol=1e-5, atol=1e-3):
        yield "other values"


# --- what other readers find ---


def read_h5ad(path: Path) -> Contents:
    return list_contents({"rna": ad.read_h5ad(path)})


def read_h5mu(path: Path) -> Contents:
    with h5py.File(path) as file:
        return read_modalities(file["mod"])


def read_modalities(groups: Any) -> Contents:
    """Read AnnData in groups of HDF5 or Zarr, by modality.

    What else lies in a modality is not converted, and may lead in a circle.
    """
    modalities = {}
    for name in groups:
        group = groups[name]
        cells = ad.AnnData(*(read_elem(group[part]) for part in ("X", "obs", "var")))
        for column in cells.obs:
            codes = group["obs"][column]
            # As before anndata 0.8, which `read_elem` leaves as codes.
            if "categories" in codes.attrs:
                names = codes.file[codes.attrs["categories"]].asstr()[:]
                cells.obs[column] = pd.Categorical.from_codes(codes[:], names)
        modalities[name] = cells
    return list_contents(modalities)


def list_contents(modalities: dict[str, ad.AnnData]) -> Contents:
    """What is known of a cell is what one of its modalities says; no two say it here."""
    tables, fields = {}, dict[str, dict[str, str | None]]()
    for modality, cells in modalities.items():
        values = cells.X.toarray() if sp.issparse(cells.X) else np.asarray(cells.X)
        names = cells.obs_names.astype(str)
        tables[modality] = pd.DataFrame(values.astype(np.float64), names, cells.var_names)
        for name, column in FIELDS.items():
            if column in cells.obs:
                fields.setdefault(name, {}).update(list_texts(cells.obs[column]))
    return Contents(tables, fields)


def list_texts(column: pd.Series) -> dict[str, str | None]:
    """By cell; whole numbers are written without a point, what is empty or NaN is unknown."""
    values = [None if pd.isna(value) or value == "" else value for value in column]
    whole = all(value is None or (isinstance(value, float) and value % 1 == 0) for value in values)
    texts = (None if v is None else str(int(v) if whole else v) for v in values)
    return dict(zip(map(str, column.index), texts, strict=True))


def read_10x(path: Path) -> Contents:
    with h5py.File(path) as file:
        group = file["matrix"]
        arrays = tuple(group[name][:] for name in ("data", "indices", "indptr"))
        types, barcodes = group["features/feature_type"].asstr()[:], group["barcodes"].asstr()[:]
        matrix = sp.csr_matrix(arrays, shape=(len(barcodes), len(types)))
        return split_types(matrix, barcodes, types)


def split_types(matrix: sp.csr_matrix, barcodes: np.ndarray, types: np.ndarray) -> Contents:
    """Counts by modality, which the types of features tell."""
    table = pd.DataFrame(matrix.toarray(), barcodes.astype(str))
    return Contents({name: table.loc[:, types == kind] for kind, name in TYPES.items()})


# --- one input ---


def spoil_input(format_: str, base: Path, folder: Path, number: int, rng: Random) -> Trial:
    """A file of a format: an h5ad, sparse or dense, an h5mu or a 10x file of two modalities."""
    turn, form = divmod(number, 3)
    name, edits, read, number, modality = {
        "h5ad": (f"{list(FORMS)[form]}.h5ad", H5AD, read_h5ad, turn, "rna="),
        "h5mu": ("m.h5mu", H5MU if form else H5AD, read_h5mu, number, ""),
        "10x": ("a.h5", TENX, read_10x, number, ""),
    }[format_]
    path = Path(shutil.copy(base / name, folder))
    change, must_refuse = spoil_hdf5(path, edits, number, rng, folder)
    sound = partial(read, base / name)
    return try_conversion(f"{name}: {change}", path, read, sound, must_refuse, modality)
