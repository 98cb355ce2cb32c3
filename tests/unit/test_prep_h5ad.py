"""AnnData and MuData come back out of the store exactly, whatever the sizes of tasks."""

from __future__ import annotations

from pathlib import Path

import anndata as ad
import h5py
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp

from clue_dist.errors import DataError
from tests.unit.prep_helpers import (
    assert_same_counts,
    convert_files,
    make_anndata,
    make_counts,
    read_counts,
    read_field,
    write_h5ad,
    write_h5mu,
)

pytestmark = pytest.mark.usefixtures("small_tasks")


@pytest.mark.parametrize(
    "form", [sp.csr_matrix, sp.csc_matrix, np.asarray], ids=["csr", "csc", "dense"]
)
@pytest.mark.parametrize("dtype", ["float32", "float64", "int32", "uint8", "int64"])
def test_h5ad(tmp_path: Path, form: object, dtype: str) -> None:
    counts = make_counts(150, 40)
    write_h5ad(tmp_path / "a.h5ad", counts, form, dtype)
    store = convert_files(tmp_path / "s.zarr", f"rna={tmp_path / 'a.h5ad'}", block_cells=16)
    assert_same_counts(read_counts(store, "rna"), counts)


def test_columns_as_before_anndata_0_8(tmp_path: Path) -> None:
    """A dataset of codes, which refers to its categories; -1 is unknown."""
    counts, batch = make_counts(50, 20), ["b", "a", None, "b", "c"] * 10
    symbols = pd.Categorical([f"symbol{j % 19}" for j in range(20)])
    table = make_anndata(counts, batch=pd.Categorical(batch), cell_type="T")
    table.var["symbol"] = symbols
    table.write_h5ad(tmp_path / "a.h5ad")
    with h5py.File(tmp_path / "a.h5ad", "r+") as file:
        for name, column in (("obs", "batch"), ("var", "symbol")):
            codes, categories = (file[name][column][part][:] for part in ("codes", "categories"))
            del file[name][column]
            file[name].create_dataset(
                f"__categories/{column}", data=categories, dtype=h5py.string_dtype()
            )
            file[name].create_dataset(column, data=codes)
            file[name][column].attrs["categories"] = file[name]["__categories"][column].ref
    store = convert_files(tmp_path / "s.zarr", f"rna={tmp_path / 'a.h5ad'}", ids=["symbol"])
    assert read_field(store, "batch") == dict(zip(counts.index, batch, strict=True))
    assert set(store.manifest.modalities["rna"].features) > {f"symbol{j}" for j in range(1, 19)}


def test_true_or_false_counts(tmp_path: Path) -> None:
    counts = (make_counts(50, 20) > 0).astype(int)
    write_h5ad(tmp_path / "a.h5ad", counts, sp.csr_matrix, "bool")
    store = convert_files(tmp_path / "s.zarr", f"peaks={tmp_path / 'a.h5ad'}")
    assert_same_counts(read_counts(store, "peaks"), counts)
    assert store.manifest.strata["peaks"].packed["peaks"].bits == 0  # binary: no counts on disk


def test_layer_and_raw(tmp_path: Path) -> None:
    counts, wide = make_counts(60, 20), make_counts(60, 30)
    adata = make_anndata(counts)
    adata.layers["counts"] = adata.X.copy()
    adata.raw = make_anndata(wide)
    adata.X = adata.X * 0.5
    adata.write_h5ad(tmp_path / "a.h5ad")
    given = f"rna={tmp_path / 'a.h5ad'}"
    assert_same_counts(
        read_counts(convert_files(tmp_path / "s.zarr", given, layers=("counts",)), "rna"), counts
    )
    assert_same_counts(
        read_counts(convert_files(tmp_path / "r.zarr", given, layers=("rna=raw.X",)), "rna"), wide
    )
    with pytest.raises(
        DataError, match=r"`--layer NAME` .*, one of counts, raw\.X, which look like raw counts"
    ):
        convert_files(tmp_path / "x.zarr", given)
    with pytest.raises(DataError, match=r"layers: counts, raw\.X"):
        convert_files(tmp_path / "y.zarr", given, layers=("conuts",))


def test_h5mu_mosaic(tmp_path: Path) -> None:
    rna, adt = make_counts(120, 30).iloc[:90], make_counts(120, 10, seed=1, prefix="p").iloc[40:]
    path = write_h5mu(
        tmp_path / "m.h5mu", rna=make_anndata(rna, batch="b1"), adt=make_anndata(adt, cell_type="T")
    )
    store = convert_files(tmp_path / "s.zarr", str(path))
    assert {n: s.n_cells for n, s in store.manifest.strata.items()} == {
        "rna+adt": 50,
        "rna": 40,
        "adt": 30,
    }
    assert_same_counts(read_counts(store, "rna"), rna)
    assert_same_counts(read_counts(store, "adt"), adt)
    assert read_field(store, "batch") == {
        c: "b1" if c in rna.index else None for c in rna.index.union(adt.index)
    }
    assert read_field(store, "label") == {
        c: "T" if c in adt.index else None for c in rna.index.union(adt.index)
    }
    only = convert_files(tmp_path / "o.zarr", f"adt={path}")
    assert only.modalities == ["adt"]
    with pytest.raises(DataError, match="no such modality"):
        convert_files(tmp_path / "x.zarr", f"atac={path}")


def test_h5mu_shared_obs(tmp_path: Path) -> None:
    import mudata

    mudata.set_options(pull_on_update=False)
    rna, adt = make_counts(20, 10), make_counts(30, 5, seed=1)
    whole = mudata.MuData({"rna": make_anndata(rna), "adt": make_anndata(adt)})
    whole.obs["batch"] = [f"b{int(name[1:]) % 3}" for name in whole.obs_names]
    whole.obs["rna:cell_type"] = [name if name in rna.index else np.nan for name in whole.obs_names]
    whole.write(tmp_path / "m.h5mu")
    store = convert_files(tmp_path / "s.zarr", str(tmp_path / "m.h5mu"))
    assert read_field(store, "batch") == {f"c{i}": f"b{i % 3}" for i in range(30)}
    assert read_field(store, "label") == {f"c{i}": f"c{i}" if i < 20 else None for i in range(30)}


def test_categories_of_whole_floats_are_those_of_integers(tmp_path: Path) -> None:
    """As a column becomes that lacks some values; 1.5 is a category, but of no cell."""
    import mudata

    counts, numbers = make_counts(20, 8), np.array([0.0, 1.0, 2.0, np.nan] * 5)
    expected = {f"c{i}": None if np.isnan(x) else str(int(x)) for i, x in enumerate(numbers)}
    floats = pd.Categorical(numbers, [1.5, 2.0, 1.0, 0.0])
    path = write_h5ad(tmp_path / "a.h5ad", counts, batch=floats)
    assert read_field(convert_files(tmp_path / "s.zarr", f"rna={path}"), "batch") == expected
    whole = mudata.MuData({"rna": make_anndata(counts)})
    whole.obs["batch"] = floats
    whole.write(tmp_path / "m.h5mu")
    assert (
        read_field(convert_files(tmp_path / "t.zarr", str(tmp_path / "m.h5mu")), "batch")
        == expected
    )


def test_dense_kind_keeps_any_float(tmp_path: Path) -> None:
    values = pd.DataFrame(
        np.random.default_rng(0).normal(size=(40, 6)).astype("float32"),
        [f"c{i}" for i in range(40)],
        list("abcdef"),
    )
    values.iloc[3] = 0  # an all-zero cell is a measurement here
    ad.AnnData(values).write_h5ad(tmp_path / "a.h5ad")
    store = convert_files(tmp_path / "s.zarr", f"x={tmp_path / 'a.h5ad'}", kinds={"x": "dense"})
    assert_same_counts(read_counts(store, "x"), values)
    values.iloc[7, 2] = np.nan
    ad.AnnData(values).write_h5ad(tmp_path / "b.h5ad")
    with pytest.raises(DataError, match="cell 'c7', feature 'c'"):
        convert_files(tmp_path / "t.zarr", f"x={tmp_path / 'b.h5ad'}", kinds={"x": "dense"})


def test_real_cells(tmp_path: Path) -> None:
    import mudata

    path = Path(__file__).parents[3] / "shared" / "data" / "hao_mosaic.h5mu"
    if not path.exists():
        pytest.skip(f"no real cells at {path}")
    whole = mudata.read(path)
    store = convert_files(tmp_path / "s.zarr", str(path))
    for name, part in whole.mod.items():
        assert_same_counts(read_counts(store, name), part.to_df())
    assert read_field(store, "label") == whole.obs["cell_type"].astype(str).to_dict()
