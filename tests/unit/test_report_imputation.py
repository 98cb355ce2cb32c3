"""The report compares imputed values with what was measured in the same cells."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import anndata as ad
import numpy as np
import pandas as pd
import pytest

from clue_dist.errors import ConfigError
from clue_dist.inference.report import write_report
from clue_dist.inference.report.imputation import compare_imputation, correlate_rows
from clue_dist.store.reader import Store
from clue_dist.store.seen_cells import identify_cells
from tests.stores import make_store

SIZES = {"rna+adt": 60, "adt": 20, "rna": 15}


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    path = tmp_path_factory.mktemp("store") / "s.zarr"
    return make_store(path, cells=SIZES, features={"rna": 12, "adt": 6})


def read_counts(store: Store, modality: str) -> pd.DataFrame:
    """The counts of all cells with a modality, by barcode."""
    parts = []
    for reader in store.segments.values():
        if modality in reader.modalities:
            positions = np.arange(reader.segment.n_cells)
            rows = reader.read_rows(modality, positions)
            counts = rows if isinstance(rows, np.ndarray) else rows.to_scipy().toarray()
            parts.append(pd.DataFrame(counts, reader.read_metadata(positions).barcodes))
    frame = pd.concat(parts)
    frame.columns = store.manifest.modalities[modality].features
    return frame


def write_answer(path: Path, values: pd.DataFrame, **about: Any) -> Path:
    uns = {"modality": "adt", "from": ["rna"], "unit": "counts", "library_size": "own"} | about
    layers = {"lower": values.to_numpy() - 0.5, "upper": values.to_numpy() + 0.5}
    answer = ad.AnnData(values.astype("float32"), layers=layers, uns={"clue_dist": uns})
    answer.write_h5ad(path)
    return path


def test_values_that_are_the_truth_are_right_in_every_unit(store: Store, tmp_path: Path) -> None:
    counts = read_counts(store, "adt")
    shares = counts.div(np.maximum(counts.sum(axis=1), 1), axis=0)
    units = {
        ("counts", "own"): counts,
        ("counts", 500.0): shares * 500,
        ("counts per 10,000", ""): shares * 1e4,
        ("ln(1 + counts per 10,000)", ""): np.log1p(shares * 1e4),
    }
    for (unit, size), values in units.items():
        # Some of the cells and features, in an order of their own.
        part = values.sample(50, random_state=1).iloc[:, ::-1].iloc[:, :5]
        path = write_answer(tmp_path / "i.h5ad", part, unit=unit, library_size=size, interval=0.9)
        section = compare_imputation(path, str(store.root), frozenset())
        assert (section["cells"], section["features"]) == (50, 5)
        assert dict(section["facts"]) == {
            "correlation per feature, median": "1.0000",
            "correlation per cell, median": "1.0000",
            "RMSE": "0.0000",
            "inside the 90% intervals": "1.0000",
        }
        assert not section["seen"]
        for feature in section["shown"]:
            assert feature["truth"] == pytest.approx(feature["imputed"], abs=2e-3)
        json.dumps(section)


def test_values_that_are_wrong_are_told_by_feature(store: Store, tmp_path: Path) -> None:
    values = read_counts(store, "adt")
    values["adt-0"] = values["adt-0"].max() - values["adt-0"]
    values["adt-1"] += 9
    path = write_answer(tmp_path / "i.h5ad", values)
    section = compare_imputation(path, str(store.root), frozenset(identify_cells(store.manifest)))
    assert section["seen"]
    names = [feature["name"] for feature in section["shown"]]
    assert names[-1] == "adt-0"  # the best first
    assert section["shown"][-1]["correlation"] < 0
    inside = float(dict(section["facts"])["inside the 0% intervals"])
    assert 0.6 < inside < 0.85  # one feature is outside for every cell, one for most


def test_cells_without_imputed_values_are_left_out(store: Store, tmp_path: Path) -> None:
    values = read_counts(store, "adt").astype(float)
    values.iloc[3] = np.nan
    path = write_answer(tmp_path / "i.h5ad", values)
    section = compare_imputation(path, str(store.root), frozenset())
    assert section["cells"] == len(values) - 1
    assert dict(section["facts"])["RMSE"] == "0.0000"


def test_the_section_stays_and_says_what_it_is(store: Store, tmp_path: Path) -> None:
    run = tmp_path / "run"
    run.mkdir()
    (run / "config.json").write_text("{}")
    path = write_answer(tmp_path / "i.h5ad", read_counts(store, "adt"), **{"from": ["rna", "adt"]})
    text = write_report(run, imputed=path, truth=str(store.root)).read_text()
    assert "Imputed adt against what was measured" in text
    assert "these are denoised values" in text
    assert "The model was trained on these cells" not in text
    path.unlink()
    assert "Imputed adt against" in write_report(run).read_text()


def test_what_cannot_be_compared_is_said(store: Store, tmp_path: Path) -> None:
    run = tmp_path / "run"
    run.mkdir()
    (run / "config.json").write_text("{}")
    with pytest.raises(ConfigError, match="give both, or neither"):
        write_report(run, imputed=tmp_path / "i.h5ad")
    with pytest.raises(ConfigError, match="no imputed values here"):
        compare_imputation(tmp_path / "i.h5ad", str(store.root), frozenset())
    (tmp_path / "i.h5ad").write_text("no HDF5")
    with pytest.raises(ConfigError, match="cannot be read"):
        compare_imputation(tmp_path / "i.h5ad", str(store.root), frozenset())
    values = read_counts(store, "adt")
    path = write_answer(tmp_path / "i.h5ad", values.set_axis([f"x{i}" for i in range(80)]))
    with pytest.raises(ConfigError, match="has too few of the cells"):
        compare_imputation(path, str(store.root), frozenset())


def test_a_constant_row_has_no_correlation() -> None:
    first = np.array([[1.0, 2.0, 3.0], [1.0, 1.0, 1.0], [1.0, 2.0, 3.0]])
    second = np.array([[2.0, 4.0, 6.0], [1.0, 2.0, 3.0], [3.0, 2.0, 1.0]])
    np.testing.assert_allclose(correlate_rows(first, second), [1, np.nan, -1])
