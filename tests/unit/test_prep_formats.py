"""Every input format comes back out of the store exactly, whatever the sizes of tasks."""

from __future__ import annotations

import gzip
from collections.abc import Callable
from pathlib import Path

import anndata as ad
import h5py
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp

from clue_dist.errors import DataError
from data_prep import convert
from data_prep.conversion import counts as reading
from data_prep.readers import h5_file, sorted_entries
from data_prep.readers.matrix_market import MatrixMarketSource
from tests.benchmarks.hostile.hdf5 import OBJECTS
from tests.unit.prep_helpers import (
    anndata_of,
    build,
    codes_of,
    frame,
    held,
    same,
    write_10x,
    write_h5ad,
    write_h5mu,
    write_mtx,
)


@pytest.fixture(autouse=True)
def _small_tasks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Many tasks, parts and pieces, even for a few hundred cells."""
    monkeypatch.setattr(convert, "TASK_ENTRIES", 500)
    monkeypatch.setattr(sorted_entries, "PART_ENTRIES", 300)
    monkeypatch.setattr(reading, "PIECE_ENTRIES", 200)


@pytest.mark.parametrize(
    "form", [sp.csr_matrix, sp.csc_matrix, np.asarray], ids=["csr", "csc", "dense"]
)
@pytest.mark.parametrize("dtype", ["float32", "float64", "int32", "uint8", "int64"])
def test_h5ad(tmp_path: Path, form: object, dtype: str) -> None:
    counts = frame(150, 40)
    write_h5ad(tmp_path / "a.h5ad", counts, form, dtype)
    store = build(tmp_path / "s.zarr", f"rna={tmp_path / 'a.h5ad'}", block_cells=16)
    same(held(store, "rna"), counts)


def test_columns_as_before_anndata_0_8(tmp_path: Path) -> None:
    """A dataset of codes, which refers to its categories; -1 is unknown."""
    counts, batch = frame(50, 20), ["b", "a", None, "b", "c"] * 10
    symbols = pd.Categorical([f"symbol{j % 19}" for j in range(20)])
    table = anndata_of(counts, batch=pd.Categorical(batch), cell_type="T")
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
    store = build(tmp_path / "s.zarr", f"rna={tmp_path / 'a.h5ad'}", ids=["symbol"])
    assert codes_of(store, "batch") == dict(zip(counts.index, batch, strict=True))
    assert set(store.manifest.modalities["rna"].features) > {f"symbol{j}" for j in range(1, 19)}


def test_true_or_false_counts(tmp_path: Path) -> None:
    counts = (frame(50, 20) > 0).astype(int)
    write_h5ad(tmp_path / "a.h5ad", counts, sp.csr_matrix, "bool")
    store = build(tmp_path / "s.zarr", f"peaks={tmp_path / 'a.h5ad'}")
    same(held(store, "peaks"), counts)
    assert store.manifest.strata["peaks"].packed["peaks"].bits == 0  # binary: no counts on disk


def test_layer_and_raw(tmp_path: Path) -> None:
    counts, wide = frame(60, 20), frame(60, 30)
    adata = anndata_of(counts)
    adata.layers["counts"] = adata.X.copy()
    adata.raw = anndata_of(wide)
    adata.X = adata.X * 0.5
    adata.write_h5ad(tmp_path / "a.h5ad")
    given = f"rna={tmp_path / 'a.h5ad'}"
    same(held(build(tmp_path / "s.zarr", given, layers=("counts",)), "rna"), counts)
    same(held(build(tmp_path / "r.zarr", given, layers=("rna=raw.X",)), "rna"), wide)
    with pytest.raises(
        DataError, match=r"look like raw counts: counts, raw\.X; name one with `--layer`"
    ):
        build(tmp_path / "x.zarr", given)
    with pytest.raises(DataError, match=r"layers: counts, raw\.X"):
        build(tmp_path / "y.zarr", given, layers=("conuts",))


def test_h5mu_mosaic(tmp_path: Path) -> None:
    rna, adt = frame(120, 30).iloc[:90], frame(120, 10, seed=1, prefix="p").iloc[40:]
    path = write_h5mu(
        tmp_path / "m.h5mu", rna=anndata_of(rna, batch="b1"), adt=anndata_of(adt, cell_type="T")
    )
    store = build(tmp_path / "s.zarr", str(path))
    assert {n: s.n_cells for n, s in store.manifest.strata.items()} == {
        "rna+adt": 50,
        "rna": 40,
        "adt": 30,
    }
    same(held(store, "rna"), rna)
    same(held(store, "adt"), adt)
    assert codes_of(store, "batch") == {
        c: "b1" if c in rna.index else None for c in rna.index.union(adt.index)
    }
    assert codes_of(store, "label") == {
        c: "T" if c in adt.index else None for c in rna.index.union(adt.index)
    }
    only = build(tmp_path / "o.zarr", f"adt={path}")
    assert only.modalities == ["adt"]
    with pytest.raises(DataError, match="no such modality"):
        build(tmp_path / "x.zarr", f"atac={path}")


def test_h5mu_shared_obs(tmp_path: Path) -> None:
    import mudata

    mudata.set_options(pull_on_update=False)
    rna, adt = frame(20, 10), frame(30, 5, seed=1)
    whole = mudata.MuData({"rna": anndata_of(rna), "adt": anndata_of(adt)})
    whole.obs["batch"] = [f"b{int(name[1:]) % 3}" for name in whole.obs_names]
    whole.obs["rna:cell_type"] = [name if name in rna.index else np.nan for name in whole.obs_names]
    whole.write(tmp_path / "m.h5mu")
    store = build(tmp_path / "s.zarr", str(tmp_path / "m.h5mu"))
    assert codes_of(store, "batch") == {f"c{i}": f"b{i % 3}" for i in range(30)}
    assert codes_of(store, "label") == {f"c{i}": f"c{i}" if i < 20 else None for i in range(30)}


TYPES = ["Gene Expression"] * 20 + ["Antibody Capture"] * 6 + ["Peaks"] * 14


def _tenx(tmp_path: Path, form: str, counts: pd.DataFrame, types: list[str]) -> Path:
    if form == "h5":
        return write_10x(tmp_path / "a.h5", counts, types)
    return write_mtx(tmp_path / "folder", counts, types, zipped=form == "mtx.gz")


@pytest.mark.parametrize("form", ["h5", "mtx", "mtx.gz"])
def test_10x(tmp_path: Path, form: str) -> None:
    counts = frame(80, 40, density=0.5)
    path = _tenx(tmp_path, form, counts, TYPES)
    store = build(tmp_path / "s.zarr", str(path))
    for name, columns in {"rna": slice(0, 20), "adt": slice(20, 26), "atac": slice(26, 40)}.items():
        expected = counts.iloc[:, columns]
        same(held(store, name), expected[expected.sum(axis=1) > 0])
    gex = build(tmp_path / "g.zarr", f"gex={path}")
    same(held(gex, "gex"), counts.iloc[:, :20][counts.iloc[:, :20].sum(axis=1) > 0])
    with pytest.raises(DataError, match="no features of this kind"):
        build(tmp_path / "x.zarr", f"dense={path}")


def test_10x_names_that_repeat_take_their_id(tmp_path: Path) -> None:
    counts = frame(30, 4, prefix="ENSG")
    path = write_10x(tmp_path / "a.h5", counts, ["Gene Expression"] * 4, ["A", "B", "A", "C"])
    assert build(tmp_path / "s.zarr", str(path)).manifest.modalities["rna"].features == [
        "ENSG0",
        "B",
        "ENSG2",
        "C",
    ]


@pytest.mark.parametrize("n", [1, 2, 3])
def test_what_a_killed_worker_leaves_of_a_matrix_market_is_not_read(
    tmp_path: Path, n: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It dies when it is about to name the n-th folder, which is whole; the task is run again beside what is left."""
    counts, scratch, real, calls = (
        frame(60, 20),
        tmp_path / "scratch",
        Path.rename,
        iter(range(1, 99)),
    )

    def fatal(self: Path, target: Path) -> Path:
        if next(calls) == n:
            raise SystemExit
        return real(self, target)

    source = MatrixMarketSource(write_mtx(tmp_path / "folder", counts, ["-"] * 20), "rna")
    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", fatal)
        patch.setattr("shutil.rmtree", lambda *_, **__: None)  # the dead do not clean up
        with pytest.raises(SystemExit):
            source.prepare_part(0, scratch)
    assert any(scratch.iterdir())
    source.prepare_part(0, scratch)
    np.testing.assert_array_equal(source.read_rows(0, 60, scratch).toarray(), counts)


def test_old_genes_tsv(tmp_path: Path) -> None:
    counts = frame(30, 8)
    folder = write_mtx(tmp_path / "folder", counts, ["-"] * 8, zipped=False)
    lines = (folder / "features.tsv").read_text().splitlines()
    (folder / "genes.tsv").write_text(
        "".join("\t".join(line.split("\t")[:2]) + "\n" for line in lines)
    )
    (folder / "features.tsv").unlink()
    same(held(build(tmp_path / "s.zarr", f"rna={folder}"), "rna"), counts)
    with pytest.raises(DataError, match="write it as `rna=folder`"):
        build(tmp_path / "x.zarr", str(folder))


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        (
            "matrix coordinate integer general",
            "matrix array integer general",
            "not a Matrix Market header",
        ),
        (
            "matrix coordinate integer general",
            "matrix coordinate integer symmetric",
            "not a Matrix Market header",
        ),
        ("8 30 ", "30 8 ", "transposed"),
        ("8 30 ", "8 31 ", "does not fit its features and barcodes"),
        ("8 30 ", "eight 30 ", "sizes line is wrong"),
        ("\n1 1 ", "\n0 1 ", "feature 0, cell 1"),
        ("\n1 1 ", "\n9 1 ", "feature 9, cell 1"),
        ("\n1 1 ", "\n1 31 ", "feature 1, cell 31"),
        ("\n1 1 5", "\n1 1 five", "not `feature cell count`"),
        ("\n1 1 5", "\n1 1 5 5", "cannot be read to its end|not `feature cell count`"),
        ("\n1 1 5", "", "ends early or late"),
        ("\n1 1 5", "\n1 1 -5", "counts must be raw"),
    ],
)
def test_wrong_matrix_market(tmp_path: Path, old: str, new: str, message: str) -> None:
    counts = frame(30, 8, density=1)
    counts.iloc[0, 0] = 5
    folder = write_mtx(tmp_path / "folder", counts, ["-"] * 8, zipped=False)
    text = (folder / "matrix.mtx").read_text()
    assert old in text
    (folder / "matrix.mtx").write_text(text.replace(old, new, 1))
    with pytest.raises(DataError, match=message):
        build(tmp_path / "s.zarr", f"rna={folder}")


@pytest.mark.parametrize("name", ["matrix.mtx.gz", "barcodes.tsv.gz", "features.tsv.gz"])
@pytest.mark.parametrize("kept", [0, 10_000])
def test_damaged_gzip(tmp_path: Path, name: str, kept: int) -> None:
    """Damage at the start of a file or behind its first lines."""
    path = write_mtx(tmp_path / "folder", frame(30, 8), ["-"] * 8) / name
    path.write_bytes(
        path.read_bytes()[:kept] + gzip.compress(b"")[:10] + b"\x07"
    )  # no such type of block
    with pytest.raises(DataError, match="cannot be read"):
        build(tmp_path / "s.zarr", f"rna={path.parent}")


def _flat(file: h5py.File) -> None:
    del file["X"]
    file["X"] = np.ones(20)


def _bare(file: h5py.File) -> None:
    del file["X"]
    file.create_group("X")


def _shapeless(file: h5py.File) -> None:
    del file["X"].attrs["shape"]


def _astray(file: h5py.File) -> None:
    file["obs/batch/codes"][3] = 5


def _texts(file: h5py.File) -> None:
    """In chunks, and not compressed: on disk they are addresses."""
    n = len(file["X/data"])
    del file["X/data"]
    file.create_dataset(
        "X/data", data=np.array(["x"] * n, object), dtype=h5py.string_dtype(), chunks=(16,)
    )


def _references(file: h5py.File) -> None:
    n = len(file["X/data"])
    del file["X/data"]
    file.create_dataset("X/data", data=[file.ref] * n, dtype=h5py.ref_dtype, chunks=(16,))


def _just_astray(file: h5py.File) -> None:
    file["obs/batch/codes"][3] = 2  # as many as there are categories


@pytest.mark.parametrize(
    ("damage", "told"),
    [
        (_flat, ("not one of cells x features", "a.h5ad: X", r"shape \(20,\)", "two axes")),
        (_shapeless, ("not one of cells x features", "a.h5ad: X", "no shape", "two axes")),
        (
            _bare,
            (
                "a form this reader does not know",
                "a.h5ad: X",
                "a group that says no enc.*",
                "array, CSR or CSC",
            ),
        ),
        (
            _astray,
            ("outside its categories", "a.h5ad: obs/batch", "codes 0 to 5", r"-1 \(unknown\) to 1"),
        ),
        (_texts, ("values that are no numbers", "a.h5ad: X/data", "object", "counts")),
        (_references, ("values that are no numbers", "a.h5ad: X/data", "object", "counts")),
        (
            _just_astray,
            ("outside its categories", "a.h5ad: obs/batch", "codes 0 to 2", r"-1 \(unknown\) to 1"),
        ),
    ],
)
def test_damaged_h5ad(
    tmp_path: Path, damage: Callable[[h5py.File], None], told: tuple[str, ...]
) -> None:
    path = write_h5ad(tmp_path / "a.h5ad", frame(20, 8), batch=pd.Categorical(["a", "b"] * 10))
    with h5py.File(path, "r+") as file:
        damage(file)
    what, where, got, expected = told
    message = f"{what}\n  where: {where}\n  got: {got}\n  expected: {expected}\n  fix: write the file again"
    with pytest.raises(DataError, match=message):
        build(tmp_path / "s.zarr", f"rna={path}")


def test_groups_that_share_groups_are_refused_at_once(tmp_path: Path) -> None:
    """Ten groups, in so many places that reading them all would never end."""
    path = write_h5ad(tmp_path / "a.h5ad", frame(20, 8), batch=pd.Categorical(["a", "b"] * 10))
    with h5py.File(path, "r+") as file:
        OBJECTS["groups that share groups"](file, "obs/batch", tmp_path)
    with pytest.raises(DataError, match="groups within groups without an end"):
        build(tmp_path / "s.zarr", f"rna={path}")


def test_codes_outside_the_categories_that_modalities_share(tmp_path: Path) -> None:
    import mudata

    whole = mudata.MuData({"rna": anndata_of(frame(20, 8))})
    whole.obs["batch"] = pd.Categorical(["a", "b"] * 10)
    whole.write(tmp_path / "m.h5mu")
    with h5py.File(tmp_path / "m.h5mu", "r+") as file:
        _astray(file)
    with pytest.raises(DataError, match=r"outside its categories\n  where: m\.h5mu: obs/batch"):
        build(tmp_path / "s.zarr", str(tmp_path / "m.h5mu"))


def test_a_layer_that_is_no_matrix_is_not_proposed_for_counts(tmp_path: Path) -> None:
    path = write_h5ad(tmp_path / "a.h5ad", frame(20, 8) + 0.5)
    with h5py.File(path, "r+") as file:
        file["layers/flat"] = np.ones(20)
    with pytest.raises(DataError, match="counts must be raw") as caught:
        build(tmp_path / "s.zarr", f"rna={path}")
    assert "flat" not in str(caught.value)


def test_categories_of_whole_floats_are_those_of_integers(tmp_path: Path) -> None:
    """As a column becomes that lacks some values; 1.5 is a category, but of no cell."""
    import mudata

    counts, numbers = frame(20, 8), np.array([0.0, 1.0, 2.0, np.nan] * 5)
    expected = {f"c{i}": None if np.isnan(x) else str(int(x)) for i, x in enumerate(numbers)}
    floats = pd.Categorical(numbers, [1.5, 2.0, 1.0, 0.0])
    path = write_h5ad(tmp_path / "a.h5ad", counts, batch=floats)
    assert codes_of(build(tmp_path / "s.zarr", f"rna={path}"), "batch") == expected
    whole = mudata.MuData({"rna": anndata_of(counts)})
    whole.obs["batch"] = floats
    whole.write(tmp_path / "m.h5mu")
    assert codes_of(build(tmp_path / "t.zarr", str(tmp_path / "m.h5mu")), "batch") == expected


def test_inputs_that_are_not(tmp_path: Path) -> None:
    (tmp_path / "text.h5ad").write_text("no HDF5")
    (tmp_path / "empty").mkdir()
    write_h5ad(tmp_path / "a.h5ad", frame(5, 5))
    cut = (tmp_path / "a.h5ad").read_bytes()
    (tmp_path / "cut.h5ad").write_bytes(cut[: len(cut) // 2])
    cases = {
        "rna=nothing.h5ad": "does not exist",
        "": "not an input",
        f"rna={tmp_path / 'text.h5ad'}": "not a readable HDF5 file",
        f"rna={tmp_path / 'cut.h5ad'}": "not a readable HDF5 file",
        f"rna={tmp_path / 'empty'}": "no Matrix Market input",
        f"{tmp_path / 'a.h5ad'}": "write it as `rna=a.h5ad`",
        f"mystery={tmp_path / 'a.h5ad'}": "--kind mystery=rna",
    }
    for given, message in cases.items():
        with pytest.raises(DataError, match=message):
            build(tmp_path / "s.zarr", given)


def test_layers_and_kinds_of_no_modality_are_refused(tmp_path: Path) -> None:
    adata = anndata_of(frame(20, 8))
    adata.layers["counts"] = adata.X.copy()
    adata.write_h5ad(tmp_path / "a.h5ad")
    given, tenx = (
        f"rna={tmp_path / 'a.h5ad'}",
        write_10x(tmp_path / "b.h5", frame(20, 8), ["Gene Expression"] * 8),
    )
    out = tmp_path / "s.zarr"
    with pytest.raises(DataError, match=r"where: --layer\n  got: rnaa\n  expected: rna"):
        build(out, given, layers=("rnaa=counts",))
    with pytest.raises(DataError, match=r"where: --kind\n  got: foo\n  expected: rna"):
        build(out, given, kinds={"foo": "rna"})
    for layers in (("counts", "other"), ("rna=counts", "rna=other")):
        with pytest.raises(DataError, match="two layers"):
            build(out, given, layers=layers)
    with pytest.raises(DataError, match="no input has layers"):
        build(out, str(tenx), layers=("counts",))


def test_dense_kind_keeps_any_float(tmp_path: Path) -> None:
    values = pd.DataFrame(
        np.random.default_rng(0).normal(size=(40, 6)).astype("float32"),
        [f"c{i}" for i in range(40)],
        list("abcdef"),
    )
    values.iloc[3] = 0  # an all-zero cell is a measurement here
    ad.AnnData(values).write_h5ad(tmp_path / "a.h5ad")
    store = build(tmp_path / "s.zarr", f"x={tmp_path / 'a.h5ad'}", kinds={"x": "dense"})
    same(held(store, "x"), values)
    values.iloc[7, 2] = np.nan
    ad.AnnData(values).write_h5ad(tmp_path / "b.h5ad")
    with pytest.raises(DataError, match="cell 'c7', feature 'c'"):
        build(tmp_path / "t.zarr", f"x={tmp_path / 'b.h5ad'}", kinds={"x": "dense"})


def test_real_cells(tmp_path: Path) -> None:
    import mudata

    path = Path(__file__).parents[3] / "shared" / "data" / "hao_mosaic.h5mu"
    if not path.exists():
        pytest.skip(f"no real cells at {path}")
    whole = mudata.read(path)
    store = build(tmp_path / "s.zarr", str(path))
    for name, part in whole.mod.items():
        same(held(store, name), part.to_df())
    assert codes_of(store, "label") == whole.obs["cell_type"].astype(str).to_dict()


@pytest.mark.parametrize(
    "options", [{"chunks": (7,)}, {"chunks": (64,), "compression": "gzip"}, {}, {"dtype": ">i4"}]
)
def test_a_stretch_of_a_dataset_is_what_hdf5_reads(
    tmp_path: Path, options: dict[str, object]
) -> None:
    values = np.arange(1, 101, dtype=np.int32)
    with h5py.File(tmp_path / "a.h5", "w") as file:
        file.create_dataset("x", data=values, **options)
        hollow = file.create_dataset("y", (100,), "int32", chunks=(10,))
        hollow[30:] = values[30:]  # the chunks before were never written
    with h5py.File(tmp_path / "a.h5") as file:
        for lo, hi in ((0, 100), (3, 5), (6, 8), (14, 77), (95, 100), (40, 40), (90, 200)):
            np.testing.assert_array_equal(h5_file.read_stretch(file["x"], lo, hi), values[lo:hi])
            np.testing.assert_array_equal(h5_file.read_stretch(file["y"], lo, hi), file["y"][lo:hi])


def test_a_file_that_ends_within_its_data(tmp_path: Path) -> None:
    path = write_h5ad(tmp_path / "a.h5ad", frame(4000, 60, density=0.9))
    size = path.stat().st_size
    with path.open("r+b") as file:
        file.truncate(size // 2)
    with pytest.raises(DataError, match=r"a\.h5ad") as caught:
        build(tmp_path / "s.zarr", f"rna={path}")
    assert "damaged" in str(caught.value) or "HDF5" in str(caught.value)
