"""Values as people have them: counts that were computed, missing ones, normalised ones."""

from __future__ import annotations

from pathlib import Path

import anndata as ad
import mudata as md
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp

from clue_dist.errors import DataError
from clue_dist.store import layout
from clue_dist.store.reader import Store
from data_prep.check import check_store
from data_prep.cli.commands import main
from data_prep.convert import format_conversion
from data_prep.from_python import ConversionRequest, convert_cells
from data_prep.inspect import collect_facts, format_facts
from data_prep.readers.source import CategoryCodes
from tests.unit.prep_helpers import (
    assert_same_counts,
    convert_files,
    make_anndata,
    make_counts,
    read_counts,
    read_field,
    shrink_tasks,
    write_h5ad,
    write_mtx,
)


def test_texts_that_programs_write_for_missing_values() -> None:
    texts = ["T cell", "nan", "None", "<NA>", "NA", "", "Nanog+", None, float("nan")]
    codes = CategoryCodes.encode_values(pd.Series(texts, dtype=object))
    assert codes.names == ["Nanog+", "T cell"]
    assert codes.codes[:].tolist() == [1, -1, -1, -1, -1, -1, 0, -1, -1]
    assert codes.missing_texts == ("<NA>", "NA", "None", "nan")


def test_missing_texts_are_unknown_and_told(tmp_path: Path) -> None:
    counts = make_counts(6, 4)
    labels = pd.Categorical(["T", "nan", "T", "nan", "B", "B"])
    path = write_h5ad(tmp_path / "a.h5ad", counts, cell_type=labels, batch=["b", "None"] * 3)
    store = convert_files(tmp_path / "s.zarr", f"rna={path}")
    assert store.manifest.labels == ["B", "T"]
    assert store.manifest.batches == ["b"]
    assert read_field(store, "label")["c1"] is None
    told = format_conversion(store.manifest)
    assert "cells whose label is 'nan' have none" in told
    assert "cells whose batch is 'None' have none" in told


def test_cells_of_many_shards_come_from_many_spools(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(layout, "SHARD_BYTES", 1)
    shrink_tasks(monkeypatch)
    counts = make_counts(150, 10)
    labels = [f"type {i % 7}" for i in range(150)]
    path = write_h5ad(tmp_path / "a.h5ad", counts, cell_type=labels)
    store = convert_files(tmp_path / "s.zarr", f"rna={path}", block_cells=4)
    assert len([file for file in store.manifest.shards if "/obs/label/" in file]) == 3
    assert_same_counts(read_counts(store, "rna"), counts)
    assert read_field(store, "label") == dict(zip(counts.index, labels, strict=True))
    assert check_store(tmp_path / "s.zarr") == []


def test_one_count_above_one_among_spools_of_ones(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    values = (np.random.default_rng(0).random((60, 2000)) < 0.02).astype(float)
    values[-1, 1000] = 3
    file = _write_values(tmp_path / "a.h5ad", values)
    whole = convert_files(tmp_path / "whole.zarr", file)
    shrink_tasks(monkeypatch)
    store = convert_files(tmp_path / "s.zarr", file)
    assert store.fingerprint == whole.fingerprint
    counts = read_counts(store, "rna")
    assert [counts.loc[f"c{i}"].tolist() for i in range(60)] == values.tolist()


def _write_values(path: Path, values: np.ndarray) -> str:
    n_cells, n_features = values.shape
    cells, features = [f"c{i}" for i in range(n_cells)], [f"g{i}" for i in range(n_features)]
    return f"rna={write_h5ad(path, pd.DataFrame(values, cells, features), dtype='float64')}"


def test_counts_that_are_nearly_whole_are_rounded_and_told(tmp_path: Path) -> None:
    counts = make_counts(20, 10)
    computed = counts * 1.0000001 - 1e-9 * (counts == 0)
    given = _write_values(tmp_path / "a.h5ad", computed.to_numpy())
    store = convert_files(tmp_path / "s.zarr", given)
    assert_same_counts(read_counts(store, "rna"), counts)
    assert "a.h5ad: counts were rounded, by" in format_conversion(store.manifest)


def test_corrected_counts_are_rounded_on_request(tmp_path: Path) -> None:
    counts = make_counts(20, 10)
    given = _write_values(tmp_path / "a.h5ad", counts.to_numpy() * 0.93)
    with pytest.raises(DataError, match=r"--round[\s\S]*--kind rna=dense"):
        convert_files(tmp_path / "x.zarr", given)
    store = convert_files(tmp_path / "s.zarr", given, round_counts=True)
    assert_same_counts(read_counts(store, "rna"), (counts * 0.93).round())


@pytest.mark.parametrize(
    ("value", "advice"),
    [(np.nan, "--features union"), (-0.5, "--kind rna=dense"), (np.inf, "finite integers")],
)
def test_advice_fits_the_value(tmp_path: Path, value: float, advice: str) -> None:
    values = make_counts(20, 10).to_numpy().astype("float64")
    values[3, 2] = value
    with pytest.raises(DataError, match=advice):
        convert_files(tmp_path / "s.zarr", _write_values(tmp_path / "a.h5ad", values))


def test_a_column_that_tells_every_cell_apart_is_doubted(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    counts = make_counts(24, 10)
    path = write_h5ad(tmp_path / "a.h5ad", counts, depth=range(24), lane=["1", "2"] * 12)
    for column, is_doubted in (("depth", True), ("lane", False)):
        _convert(f"rna={path}", "--out", str(tmp_path / f"{column}.zarr"), "--batch-key", column)
        warning = "warning: 24 batches of 24 cells: does 'depth' of obs tell batches apart?"
        assert (warning in capsys.readouterr().out) == is_doubted


def test_two_modalities_need_values_of_their_own(tmp_path: Path) -> None:
    path = write_h5ad(tmp_path / "a.h5ad", make_counts(20, 10))
    with pytest.raises(DataError, match=r"two modalities are the same values[\s\S]*rna, adt"):
        convert_files(tmp_path / "s.zarr", f"rna={path}", f"adt={path}")
    table = ad.read_h5ad(path)
    by_columns = make_anndata(make_counts(20, 10), sp.csc_matrix)
    for cells in (
        *([f"rna={path}", f"adt={copy}"] for copy in _write_copies(tmp_path, make_counts(20, 10))),
        md.MuData({"rna": table, "adt": table}),
        md.MuData({"rna": table, "adt": table.copy()}),
        md.MuData({"rna": by_columns, "adt": by_columns.copy()}),
    ):
        with pytest.raises(DataError, match=r"two modalities are the same values[\s\S]*rna, adt"):
            convert_cells(cells, tmp_path / "s.zarr", ConversionRequest())
    # As spliced and unspliced counts have.
    other = write_h5ad(tmp_path / "other.h5ad", make_counts(20, 10, seed=1))
    store = convert_files(tmp_path / "o.zarr", f"rna={path}", f"adt={other}")
    assert store.manifest.modalities["adt"].features == store.manifest.modalities["rna"].features
    lists = []
    for name, features in (("rna", "g0 g1 g2 g3 g4 g5"), ("adt", "g6 g7 g8 g9")):
        (tmp_path / f"{name}.txt").write_text(features.replace(" ", "\n"))
        lists.append(f"{name}={tmp_path / f'{name}.txt'}")
    store = convert_files(tmp_path / "t.zarr", f"rna={path}", f"adt={path}", features=lists)
    assert store.manifest.modalities["adt"].features == ["g6", "g7", "g8", "g9"]


@pytest.mark.slow
def test_a_copy_is_found_in_another_order(tmp_path: Path) -> None:
    counts = make_counts(200, 10)
    path = write_h5ad(tmp_path / "a.h5ad", counts)
    for copy in _write_copies(tmp_path, counts.sample(frac=1, random_state=0).iloc[:, ::-1]):
        with pytest.raises(DataError, match="two modalities are the same values"):
            convert_files(tmp_path / "s.zarr", f"rna={path}", f"adt={copy}")
    # One count that differs, or one cell that only the first has, makes two modalities.
    changed = counts.copy()
    changed.iloc[3, 3] += 1
    for number, cells in enumerate((changed, counts[1:])):
        other = write_h5ad(tmp_path / f"{number}.h5ad", cells[::-1])
        store = convert_files(tmp_path / f"{number}.zarr", f"rna={path}", f"adt={other}")
        assert store.modalities == ["rna", "adt"]


def _write_copies(folder: Path, counts: pd.DataFrame) -> list[Path]:
    """Write the same counts in other files and formats."""
    by_rows = write_h5ad(folder / "rows.h5ad", counts)
    by_columns = write_h5ad(folder / "columns.h5ad", counts, sp.csc_matrix)
    matrix_market = write_mtx(folder / "mtx", counts, ["Antibody Capture"] * counts.shape[1])
    table = folder / "table.csv"
    counts.to_csv(table)
    return [by_rows, by_columns, matrix_market, table]


def _convert(*typed: str) -> None:
    """Call `data_prep convert` as a person does."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sys.argv", ["data_prep", "convert", *typed])
        main()


def test_column_that_no_file_has(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """It is refused, but where it is called as the column that is looked for anyway."""
    rna, adt = make_counts(6, 4), make_counts(6, 3, prefix="CD")
    files = (
        f"rna={write_h5ad(tmp_path / 'a.h5ad', rna, donor=['d1', 'd2'] * 3)}",
        f"adt={write_h5ad(tmp_path / 'b.h5ad', adt, plate=['p1', 'p2'] * 3)}",
    )
    out = ("--workers", "1", "--out", str(tmp_path / "s.zarr"))
    with pytest.raises(DataError, match=r"--batch-key adt=donor\n  got: columns: plate"):
        _convert(*files, "--batch-key", "adt=donor", *out)
    with pytest.raises(DataError, match="no such modality"):
        _convert(*files, "--batch-key", "atac=donor", *out)
    for flag, what in (("--batch-key", "batch"), ("--label-key", "label")):
        message = (
            rf"no input has the {what} column asked for\n  where: {flag} Donor\n"
            r"  got: columns: donor, plate\n(.|\n)*  fix: did you mean donor\?"
        )
        with pytest.raises(DataError, match=message):
            _convert(*files, flag, "Donor", *out)
        with pytest.raises(DataError, match=f"fix: leave {flag} out"):
            _convert(*files, flag, "xyz", *out)
    # Of several covariates each must be there, `batch` too, which alone is warned of below.
    for absent in ("kit", "batch"):
        with pytest.raises(DataError, match=f"no input has the {absent} column"):
            _convert(*files, "--batch-key", "donor", absent, *out)
    _convert(*files, "--batch-key", "nothing", "--batch-key", "rna=donor", *out)
    assert Store(tmp_path / "s.zarr").manifest.batches == ["d1", "d2"]
    defaults = ("--batch-key", "batch", "--label-key", "cell_type")
    _convert(*files, *defaults, *out[:-1], str(tmp_path / "t.zarr"))
    assert Store(tmp_path / "t.zarr").manifest.batches == []
    assert "warning: no input has the batch column" in capsys.readouterr().err


def test_column_that_some_files_have_is_read_there(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    files = (
        f"a:rna={write_h5ad(tmp_path / 'a.h5ad', make_counts(6, 4), donor=['d1', 'd2'] * 3)}",
        f"b:rna={write_h5ad(tmp_path / 'b.h5ad', make_counts(6, 4))}",
    )
    _convert(*files, "--batch-key", "donor", "--workers", "1", "--out", str(tmp_path / "s.zarr"))
    assert Store(tmp_path / "s.zarr").manifest.batches == ["d1", "d2"]
    assert "6 cells without batch" in capsys.readouterr().out


def test_levels_of_several_covariates_are_counted(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    obs = {"donor": ["d1", "d2", "d1"], "kit": ["v2", "v2", None]}
    rna = write_h5ad(tmp_path / "a.h5ad", make_counts(3, 4), **obs)
    out = tmp_path / "s.zarr"
    request = ConversionRequest(batch_key=["donor", "kit"])
    _convert(f"rna={rna}", "--out", str(out), *request.list_flags())
    facts = collect_facts(str(out))
    assert facts["covariates"] == {"donor": {"d1": 2, "d2": 1}, "kit": {"v2": 2}}
    assert "  donor        d1 2, d2 1\n  kit          v2 2\n" in format_facts(facts)
    assert "1 cell without kit" in capsys.readouterr().out


def test_kinds_like_bins(tmp_path: Path) -> None:
    files = [
        f"{name}={write_h5ad(tmp_path / f'{name}.h5ad', make_counts(6, 4, prefix=name))}"
        for name in "ab"
    ]
    out = ("--workers", "1", "--out", str(tmp_path / "s.zarr"))
    _convert(*files, "--kind", "a=rna", "b=adt", *out)
    modalities = Store(tmp_path / "s.zarr").manifest.modalities
    assert {name: row.kind for name, row in modalities.items()} == {"a": "rna", "b": "adt"}
