"""Differential analysis: groups that decode differently are told apart, others are not."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

from clue_dist import progress
from clue_dist.errors import ConfigError
from clue_dist.inference import differential
from clue_dist.inference.cells import StoreCells
from clue_dist.inference.differential import (
    DifferentialChoices,
    compare_groups,
    write_differences,
)
from clue_dist.inference.load_model import TrainedModel
from clue_dist.store.reader import Store
from tests.stores import make_store
from tests.unit.impute_helpers import make_trained


@pytest.fixture(scope="module")
def store(tmp_path_factory) -> Store:
    folder = tmp_path_factory.mktemp("store")
    return make_store(
        folder / "s.zarr", cells={"rna": 40, "adt": 20}, features={"rna": 6, "adt": 4}
    )


@pytest.fixture(scope="module")
def trained(store) -> TrainedModel:
    return make_trained(store)


class GroupedCells(StoreCells):
    """Groups that follow from what the model expects: above or below the median of rna-0."""

    group: np.ndarray

    def read_obs(self) -> pd.DataFrame:
        return super().read_obs().assign(group=self.group)


@pytest.fixture(scope="module")
def cells(store, trained) -> GroupedCells:
    cells = GroupedCells(store, trained)
    model = trained.model
    means = []
    for cell_slice in cells.slice_cells(4096):
        posterior = model.encode_batch(cells.read_slice(cell_slice))
        means.append(posterior.joint_mean[:, 0])
    z = torch.cat(means)
    decoder = model.get_decoder("rna")
    code, library = torch.zeros(60, 1, dtype=torch.int64), torch.full((60, 1), 1e4)
    first = decoder.likelihood.compute_mean(decoder.compute_parameters(z, code, library))[:, 0]
    high = (first > first[:40].median()).numpy()
    # Cells of proteins alone have no group.
    cells.group = np.array([["low", "high"][int(h)] for h in high[:40]] + [None] * 20, object)
    return cells


def compare(trained, cells, **choices):
    return compare_groups(trained, cells, DifferentialChoices("rna", "group", **choices))


def test_the_feature_that_made_the_groups_marks_one_of_them(trained, cells):
    tables = compare(trained, cells, pairs=500)
    assert list(tables) == ["high", "low"]
    high = tables["high"]
    assert sorted(high.index) == [f"rna-{i}" for i in range(6)]
    assert high["lfc_mean"].is_monotonic_decreasing
    first = high.loc["rna-0"]
    assert first["lfc_mean"] > 0
    assert first["mean"] > first["mean_others"]
    assert first["bayes_factor"] == pytest.approx(
        np.log((500 * first["probability"] + 1) / (500 * (1 - first["probability"]) + 1))
    )
    # The other way round, but for what is drawn.
    assert tables["low"].loc["rna-0", "lfc_mean"] == pytest.approx(-first["lfc_mean"], rel=0.4)


def test_pairs_that_are_compared_are_counted(trained, cells, monkeypatch, capsys):
    monkeypatch.setattr(progress, "PATIENCE", 0.0)
    monkeypatch.setattr(progress, "has_spectator", lambda: False)
    monkeypatch.setattr(differential, "VALUES_AT_ONCE", 40 * 6)  # 40 pairs at once
    compare(trained, cells, pairs=100)
    assert "comparing pairs: 200 of 200, " in capsys.readouterr().err


def test_a_reference_and_features_are_chosen(trained, cells):
    tables = compare(trained, cells, reference="low", features=["rna-2", "rna-0"], pairs=50)
    assert list(tables) == ["high"]
    assert sorted(tables["high"].index) == ["rna-0", "rna-2"]


def test_a_feature_has_the_same_row_whichever_others_are_asked_for(trained, cells):
    whole, some = (
        compare(trained, cells, features=features, pairs=50)["high"]
        for features in (None, ["rna-2", "rna-0"])
    )
    pd.testing.assert_frame_equal(some, whole.loc[some.index])


def test_one_group_and_one_feature_need_no_list(trained, cells):
    tables = compare(trained, cells, groups="high", features="rna-0", pairs=9)
    assert {name: list(table.index) for name, table in tables.items()} == {"high": ["rna-0"]}


def test_groups_may_be_numbers(trained, cells, monkeypatch):
    expected = compare(trained, cells, groups="high", reference="low", pairs=9)["high"]
    numbers = np.array([{"low": 0, "high": 1}.get(name) for name in cells.group], object)
    monkeypatch.setattr(cells, "group", numbers)
    for groups in (1, [1]):
        tables = compare(trained, cells, groups=groups, reference=0, pairs=9)
        pd.testing.assert_frame_equal(tables["1"], expected)
    monkeypatch.setattr(cells, "group", numbers.astype(float))  # NaN, where there is none
    for groups in (1, [1.0]):
        tables = compare(trained, cells, groups=groups, reference=0.0, pairs=9)
        pd.testing.assert_frame_equal(tables["1"], expected)


def test_a_group_that_is_named_twice_is_compared_once(trained, cells):
    once, twice = (
        compare(trained, cells, groups=groups, pairs=9)
        for groups in (["high", "low"], ["high", "low", "high"])
    )
    assert list(once) == list(twice)
    pd.testing.assert_frame_equal(once["high"], twice["high"])


def test_the_same_seed_gives_the_same_table(trained, cells):
    first, second, other = (compare(trained, cells, pairs=50, seed=s)["high"] for s in (0, 0, 1))
    pd.testing.assert_frame_equal(first, second)
    assert not first.equals(other)


@pytest.mark.parametrize(
    ("choices", "message"),
    [
        ({"groups": ["middle"]}, r"no cell of a group(.|\n)*`groups`"),
        ({"reference": "middle"}, r"no cell of a group(.|\n)*`reference`"),
        ({"groups": "high", "reference": "high"}, "no group but the reference"),
        ({"groups": []}, "nothing to compare with"),
        ({"from_": ["adt"]}, "nothing to compare with"),
        ({"from_": ["adt"], "groups": ["high"]}, "no cell of a group"),
        ({"from_": ["atac"]}, "no such modality"),
        ({"features": ["rna-9"]}, "no such feature"),
        ({"features": [9]}, "no such feature"),
        ({"pairs": 0}, "where: --pairs, in Python"),
        ({"pairs": 0.5}, "where: --pairs, in Python"),
        ({"least_change": -0.1}, "where: --least-change, in Python"),
        ({"least_change": float("nan")}, "where: --least-change, in Python"),
        ({"seed": -1}, "where: --seed, in Python"),
    ],
)
def test_what_cannot_be_compared_is_refused(trained, cells, choices, message):
    with pytest.raises(ConfigError, match=message):
        compare(trained, cells, **choices)


def test_a_column_that_is_not_there_is_refused(trained, cells):
    for groupby, fix in (("leiden", ""), (["group"], "(.|\n)*did you mean group")):
        with pytest.raises(ConfigError, match=f"no such column{fix}"):
            compare_groups(trained, cells, DifferentialChoices("rna", groupby))


@pytest.mark.parametrize("name", ["markers.csv", "markers.csv.gz", "markers.parquet"])
def test_the_tables_of_all_groups_make_one_file(tmp_path: Path, name: str) -> None:
    if name.endswith("parquet"):
        pytest.importorskip("pyarrow")
    features = pd.Index(["CD4", "CD8"], name="feature")
    tables = {group: pd.DataFrame({"lfc_mean": [1.5, -0.5]}, index=features) for group in "BT"}
    write_differences(tables, tmp_path / name)
    read = pd.read_parquet if name.endswith("parquet") else pd.read_csv
    table = read(tmp_path / name)
    assert list(table.columns) == ["group", "feature", "lfc_mean"]
    assert table["group"].tolist() == ["B", "B", "T", "T"]
    assert table["feature"].tolist() == ["CD4", "CD8"] * 2
    with pytest.raises(ConfigError, match="says its format"):
        write_differences(tables, tmp_path / "markers.txt")
