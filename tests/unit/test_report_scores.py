"""The report has a table of scores, and says what they are of."""

from __future__ import annotations

import json
import re

import pytest

from clue_dist.inference.report import write_report
from tests.unit.report_helpers import SCORES

pytestmark = pytest.mark.usefixtures("quick_pictures")


def test_what_is_symmetric_stands_once(logged_run, tmp_path):
    entry = SCORES["rna->adt"] | {
        "mixing": 0.41,
        "mixing_ilisi": 0.7,
        "mixing_cells": 1234,
        "transfer": 0.875,
    }
    entries = {
        name: entry | {"directed": {"global": {"foscttm": score, "match": 0.3, "recall10": 0.2}}}
        for name, score in (("rna->adt", 0.0611), ("adt->rna", 0.0813001))
    }
    joint = {
        "cells": 10,
        "store_cells": 20,
        "islands": {"rna": 3.5, "rna+adt": 0.25},
        "worst_island": "rna",
        "ilisi": 0.625,
        "kbet": None,
    }
    scores = tmp_path / "scores.json"
    scores.write_text(json.dumps({**entries, "joint": joint, "about": {}}))
    text = write_report(logged_run, scores=scores).read_text()
    shown = text[: text.index('<script type="application/json"')]
    for number in ("0.0712", "0.4100", "0.7000", "0.8750", "0.6250", "3.5000"):
        assert shown.count(number) == 1 + (number == "0.0712")  # once more as a headline
    rows = re.findall(r"<tr><td>(.*?)</td><td>(.*?)</td>", shown)
    assert rows == [
        ("rna-adt", "global"),
        ("rna-adt", "within batch"),
        ("rna-adt", "within type"),
        ("rna-adt", "without depth"),
        ("rna → adt", "global"),
        ("adt → rna", "global"),
        ("rna-adt", "1,234"),
    ]
    assert "<dt>kBET acceptance</dt><dd>unknown</dd>" in shown


def test_scores_of_training_cells_are_called_so(logged_run, tmp_path):
    scores = tmp_path / "scores.json"
    for seen in (False, True):
        scores.write_text(json.dumps(SCORES | {"about": {"seen_in_training": seen}}))
        text = write_report(logged_run, scores=scores).read_text()
        assert ("The model was trained on this store" in text) == seen


def test_scores_without_pairs_say_so_and_have_no_table_of_matching(logged_run, tmp_path):
    scores = tmp_path / "scores.json"
    joint = {"cells": 90, "store_cells": 90, "accuracy": 0.875}
    scores.write_text(json.dumps({"joint": joint, "about": {"has_pairs": False}}))
    text = write_report(logged_run, scores=scores).read_text()
    assert "matching is left out" in text
    assert "0.8750" in text
    assert "<th>among</th>" not in text
