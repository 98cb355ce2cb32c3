"""Columns of obs that a store keeps: their types, whatever the inputs, and what comes out."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import mudata as md
import numpy as np
import pandas as pd
import pytest

from clue_dist.errors import DataError
from clue_dist.inference.cells.store_cells import StoreCells
from clue_dist.inference.file_order import restore_file_order
from clue_dist.store.manifest import Manifest
from clue_dist.store.reader import Store
from clue_dist.store.seen_cells import identify_cells, share_cells
from data_prep import inspect
from data_prep.append import append_cells
from data_prep.check import check_store
from data_prep.cli.commands import main
from data_prep.cli.inputs import parse_inputs
from data_prep.jobs.workers import ThreadPool
from data_prep.options import ReadingOptions
from data_prep.planned_cells import ConversionOptions
from data_prep.split import SplitRule, split_store
from tests.fakes import FakeTrainedModel
from tests.stores import make_store
from tests.unit.prep_helpers import convert_files, make_anndata, make_counts, write_h5ad

N = 40
RNA = make_counts(N, 12)
OBS: dict[str, Any] = {
    "batch": np.tile(["a", "b"], N // 2),
    "donor": pd.Categorical(np.tile(["d1", "d2", None, "d1"], N // 4)),
    "note": [f"note {i}" for i in range(N)],
    "age": np.arange(N) - 3,
    "visits": pd.array([None, *range(1, N)], "Int64"),
    "share": np.where(np.arange(N) % 5 == 0, np.nan, np.linspace(0, 1, N)),
    "treated": np.arange(N) % 3 == 0,
    "smoker": pd.array([None, *(i % 2 == 0 for i in range(1, N))], "boolean"),
    "nothing": np.full(N, np.nan),
}


def read_obs(store: Store) -> pd.DataFrame:
    """What an embedding of a store would have in obs, by barcode."""
    return StoreCells(store, FakeTrainedModel(store.manifest.modalities)).read_obs()


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    folder = tmp_path_factory.mktemp("kept")
    path = write_h5ad(folder / "rna.h5ad", RNA, **OBS)
    return convert_files(folder / "s.zarr", f"rna={path}", block_cells=4, kept_obs=("all",))


def test_every_column_comes_out_with_its_type_and_its_missing_values(store: Store) -> None:
    obs = read_obs(store).loc[RNA.index]
    kinds = {name: column.kind for name, column in store.manifest.obs_columns.items()}
    assert kinds == {
        "age": "integer",
        "donor": "category",
        "note": "category",
        "nothing": "category",
        "share": "number",
        "smoker": "boolean",
        "treated": "boolean",
        "visits": "integer",
    }
    assert obs["age"].dtype == np.int64
    assert obs["treated"].dtype == bool
    for name, values in OBS.items():
        expected = pd.Series(values, RNA.index)
        assert (obs[name].isna() == expected.isna()).all(), name
        known = expected.notna()
        assert obs[name][known].tolist() == expected[known].tolist(), name


def test_inspect_names_the_columns_that_a_store_keeps(store: Store) -> None:
    text = inspect.format_facts(inspect.collect_facts(store.root))
    line = next(line for line in text.splitlines() if line.startswith("kept columns"))
    for fact in ("age (integer)", "donor (2 categories)", "share (number)", "smoker (boolean)"):
        assert fact in line


def test_kept_columns_are_part_of_the_store(store: Store, tmp_path: Path) -> None:
    assert check_store(store.root) == []
    plain = convert_files(
        tmp_path / "plain.zarr", f"rna={store.root.parent / 'rna.h5ad'}", block_cells=4
    )
    assert plain.fingerprint != store.fingerprint
    assert "obs_columns" not in json.loads((tmp_path / "plain.zarr/manifest.json").read_text())
    # The cells are the same all the same: a model of one has seen the other.
    other = OBS | {"age": np.arange(N)}
    path = write_h5ad(tmp_path / "other.h5ad", RNA, **other)
    changed = convert_files(
        tmp_path / "other.zarr", f"rna={path}", block_cells=4, kept_obs=("all",)
    )
    assert changed.fingerprint != store.fingerprint
    assert share_cells(identify_cells(changed.manifest), identify_cells(store.manifest))


def test_a_manifest_without_kept_columns_is_what_it_was(tmp_path: Path) -> None:
    manifest = make_store(tmp_path / "s.zarr", {"rna": 20}, {"rna": 9}).manifest
    content = manifest.model_dump(mode="json")
    del content["obs_columns"]
    assert Manifest.model_validate(content).compute_fingerprint() == manifest.fingerprint


def test_named_columns_alone_are_kept(store: Store, tmp_path: Path) -> None:
    source = f"rna={store.root.parent / 'rna.h5ad'}"
    some = convert_files(tmp_path / "s.zarr", source, kept_obs=("share", "donor"))
    assert list(some.manifest.obs_columns) == ["share", "donor"]
    with pytest.raises(DataError, match="no input has a column") as caught:
        convert_files(tmp_path / "t.zarr", source, kept_obs=("dnoor",))
    assert "donor" in str(caught.value.expected)


def test_files_that_differ_meet_in_a_type_that_holds_both(tmp_path: Path) -> None:
    first, second = RNA[:20], RNA[20:]
    a = write_h5ad(
        tmp_path / "a.h5ad", first, dose=np.arange(20), mixed=np.arange(20), only=["x"] * 20
    )
    b = write_h5ad(tmp_path / "b.h5ad", second, dose=np.full(20, 0.5), mixed=["t"] * 20)
    store = convert_files(tmp_path / "s.zarr", f"rna={a}", f"rna={b}", kept_obs=("all",))
    columns = store.manifest.obs_columns
    assert {name: column.kind for name, column in columns.items()} == {
        "dose": "number", "mixed": "category", "only": "category"
    }  # fmt: skip
    obs = read_obs(store).loc[RNA.index]
    assert obs["dose"].tolist() == [*map(float, range(20)), *[0.5] * 20]
    assert obs["mixed"].tolist() == [*map(str, range(20)), *["t"] * 20]
    assert obs["only"].isna().tolist() == [False] * 20 + [True] * 20


def test_columns_of_a_mudata_come_once(tmp_path: Path) -> None:
    rna, adt = make_anndata(RNA, age=np.arange(N)), make_anndata(make_counts(30, 6, 1, "p"))
    adt.obs["age"], adt.obs["quality"] = np.arange(30) + 100, np.arange(30) / 7
    with md.set_options(pull_on_update=False):
        mdata = md.MuData({"rna": rna, "adt": adt})
        mdata.obs["site"] = ["s1"] * 10 + ["s2"] * (N - 10)
        mdata.obs["rna:age"], mdata.obs["adt:quality"] = np.arange(N), np.arange(N) / 7
        mdata.write(tmp_path / "m.h5mu")
    store = convert_files(tmp_path / "s.zarr", str(tmp_path / "m.h5mu"), kept_obs=("all",))
    assert list(store.manifest.obs_columns) == ["age", "quality", "site"]
    obs = read_obs(store).loc[RNA.index]
    assert obs["age"].tolist() == list(range(N))  # the modality that was named first says it
    assert obs["quality"].notna().sum() == 30
    assert obs["site"].tolist() == ["s1"] * 10 + ["s2"] * (N - 10)


def test_cells_that_are_added_fill_the_columns_of_the_store(store: Store, tmp_path: Path) -> None:
    source = f"rna={store.root.parent / 'rna.h5ad'}"
    grown = convert_files(tmp_path / "s.zarr", source, block_cells=4, kept_obs=("donor", "share"))
    more = make_counts(10, 12, 5, cells="new")
    path = write_h5ad(tmp_path / "more.h5ad", more, donor=["d0"] * 9 + ["d1"], extra=np.arange(10))
    append_cells(
        parse_inputs([f"rna={path}"], ReadingOptions()),
        grown.root,
        ConversionOptions(),
        ThreadPool(1),
    )
    after = Store(grown.root)
    assert after.manifest.obs_columns["donor"].categories == ["d1", "d2", "d0"]
    obs = read_obs(after)
    assert obs.loc[more.index, "donor"].tolist() == ["d0"] * 9 + ["d1"]
    assert obs.loc[more.index, "share"].isna().all()
    assert obs.loc["c1", "donor"] == "d2"
    wrong = write_h5ad(tmp_path / "wrong.h5ad", make_counts(5, 12, 6, cells="w"), share=["x"] * 5)
    with pytest.raises(DataError, match="holds other values"):
        append_cells(
            parse_inputs([f"rna={wrong}"], ReadingOptions()),
            grown.root,
            ConversionOptions(),
            ThreadPool(1),
        )


def test_parts_of_a_store_keep_its_columns_and_are_cut_by_them(
    store: Store, tmp_path: Path
) -> None:
    outs = tmp_path / "train.zarr", tmp_path / "test.zarr"
    split_store(store.root, SplitRule("donor", test_names=("d1",)), *outs)
    whole, parts = read_obs(store), [read_obs(Store(out)) for out in outs]
    assert set(parts[1]["donor"]) == {"d1"}
    joined = pd.concat(parts).loc[whole.index]
    assert joined["note"].tolist() == whole["note"].tolist()
    assert joined["age"].tolist() == whole["age"].tolist()


def test_the_command_keeps_all_columns_or_those_that_are_named(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = f"rna={store.root.parent / 'rna.h5ad'}"
    words = ["convert", source, "--out", str(tmp_path / "s.zarr"), "--keep-obs"]
    monkeypatch.setattr("sys.argv", ["data_prep", *words, "all", "donor"])
    with pytest.raises(DataError, match="all columns, or some"):
        main()
    monkeypatch.setattr("sys.argv", ["data_prep", *words, "donor", "age"])
    main()
    assert list(Manifest.read(tmp_path / "s.zarr").obs_columns) == ["donor", "age"]


def test_an_embedding_gets_the_order_and_the_barcodes_of_a_file(
    store: Store, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    import anndata as ad

    obs = read_obs(store)
    table = ad.AnnData(obs=obs, obsm={"X_clue": np.arange(N, dtype=np.float32)[:, None]})
    path = store.root.parent / "rna.h5ad"
    same = restore_file_order(table, str(path))
    assert same.obs_names.tolist() == RNA.index.tolist()
    assert same.obs["age"].tolist() == OBS["age"].tolist()
    assert same.obsm["X_clue"][:, 0].tolist() == obs.index.get_indexer(RNA.index).tolist()
    assert capsys.readouterr().err == ""

    for other, message in (("gone.h5ad", "no such file"), (store.root, "order of its own")):
        with pytest.raises(DataError, match=message):
            restore_file_order(table, str(other))

    (tmp_path / "cells.txt").write_text("c5\nelsewhere\nc3\n")
    some = restore_file_order(table, str(tmp_path / "cells.txt"))
    assert some.obs["age"].tolist() == [2, pd.NA, 0]
    assert np.isnan(some.obsm["X_clue"][:, 0]).tolist() == [False, True, False]
    said = capsys.readouterr().err
    assert "NaN for 1 cell of" in said
    assert "left out: 38 embedded cells that" in said

    prefixed = ad.AnnData(obs=obs.set_axis("lane1:" + obs.index), obsm=dict(table.obsm))
    assert restore_file_order(prefixed, f"lane1:{path}").obs_names.equals(same.obs_names)
    with pytest.raises(DataError, match="no cell of the file"):
        restore_file_order(prefixed, str(path))
