"""The parts of a conversion that decide on numbers, each called by itself."""

from __future__ import annotations

import numpy as np
import pytest

from clue_dist.store import layout
from clue_dist.store.rows import COUNT_BITS
from data_prep.conversion import scatter
from data_prep.conversion.scatter import choose_task_entries
from data_prep.conversion.spool import FAR_BINARY_GAP, FAR_GAP, measure_rows
from data_prep.convert import describe_conversion
from data_prep.options import FeatureChoice, ObsColumns
from data_prep.planned_cells import ConversionOptions


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        (0, 10),
        (500, 10),  # fifty tasks
        (1500, 30),
        (3000, 60),
        (10_000, 60),  # more tasks, of the same size
        (60_000, 60),  # a thousand tasks
        (90_000, 90),
        (900_000, 200),
    ],
)
def test_tasks_grow_where_inputs_are_large(
    monkeypatch: pytest.MonkeyPatch, values: int, expected: int
) -> None:
    monkeypatch.setattr(scatter, "TASK_ENTRIES", 10)
    monkeypatch.setattr(scatter, "LARGEST_TASK_ENTRIES", 200)
    assert choose_task_entries(values) == expected


def test_a_spool_knows_the_lengths_of_rows_in_both_codes() -> None:
    far = FAR_BINARY_GAP
    rest = np.array([far, far - 1, 7, far + 1, far, far, 300, 2], np.uint16)
    lengths = np.array([[9, 2, 1], [3, 0, 0], [8, 3, 0]], np.uint32)  # codes, far gaps, high counts
    starts = np.array([[0, 0], [9, 4], [12, 4], [20, 7]])
    # The numbers 2 and 3 of `rest` are a high count of the first row: its place and itself.
    both = [[9, 2, 1, 1], [3, 0, 0, 0], [8, 3, 0, 3]]
    assert measure_rows(np.zeros(20, np.uint8), rest, lengths, starts, COUNT_BITS).tolist() == both
    codes = np.array([1, FAR_GAP, far, FAR_GAP - 1, far, FAR_GAP + 1], np.uint8)
    lengths = np.array([[3, 1, 0], [0, 0, 0], [3, 1, 0]], np.uint32)
    starts = np.array([[0, 0], [3, 1], [3, 1], [6, 2]])
    both = [[3, 2, 0, 1], [0, 0, 0, 0], [3, 2, 0, 1]]
    assert measure_rows(codes, rest[:2], lengths, starts, 0).tolist() == both


def test_whatever_decides_a_store_is_told_of_its_conversion() -> None:
    plain = describe_conversion([], ConversionOptions(), None)
    options = {"seed": 0, "block_cells": layout.BLOCK_CELLS, "codec": "balanced", "kinds": {}}
    assert plain["options"] == options
    assert plain["columns"] == ObsColumns().by_field
    assert plain["features_from"] is None
    for changed, told in (
        (ConversionOptions(seed=3), {"seed": 3}),
        (ConversionOptions(round_counts=True), {"round": True}),
        (ConversionOptions(pairing="core"), {"pairing": "core"}),
        (ConversionOptions(kinds={"x": "adt"}), {"kinds": {"x": "adt"}}),
        (ConversionOptions(kept_cells={"rna": "adt"}), {"kept": {"rna": "adt"}}),
    ):
        assert describe_conversion([], changed, None) == plain | {"options": options | told}
    choice = FeatureChoice(top_features=7)
    chosen = describe_conversion([], ConversionOptions(feature_choices={"rna": choice}), None)
    assert chosen["features"] == {"rna": choice.describe_identity()}
