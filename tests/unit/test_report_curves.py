"""The report draws what was logged."""

from __future__ import annotations

import json
import math

import numpy as np
import pandas as pd
import pytest

from clue_dist.inference.report import figures, panels, write_report
from clue_dist.inference.report.panels import list_panels, read_metrics
from tests.unit.report_helpers import read_json

pytestmark = pytest.mark.usefixtures("quick_pictures")


def test_held_out_losses_are_shown_by_modality_and_term():
    steps = range(10, 200, 10)
    names = ("self/rna", "cross/rna", "self/adt", "contrastive/rna-adt", "mse/rna-adt", "d/rna")
    rows = [
        {"step": s, "split": "validation"} | {n: s + k for k, n in enumerate(names)} for s in steps
    ]
    noise = ("loss", "self", "cross", "mse", "cells_per_s", "data_wait", "lr")
    rows += [{"step": s, "split": "train"} | dict.fromkeys(noise, float(s)) for s in steps]
    found = list_panels(pd.DataFrame(rows))
    titles = {name: [panel.title for panel in group] for name, group in found.items()}
    assert titles == {
        "scores": [],
        "losses": [
            "rna, minus ELBO",
            "adt, minus ELBO",
            "InfoNCE",
            "distance of z (eq. 9)",
            "discriminator (eq. 12)",
        ],
        "speed": ["cells per second", "waiting for data"],
        # Not self and cross, whose noise is that of the loss.
        "batches": ["loss", "distance of z (eq. 9)", "learning rate"],
    }
    rna = found["losses"][0].curves
    assert [curve.name for curve in rna] == ["from itself (eq. 5)", "from all observed (eq. 8)"]
    assert [curve.values[0] for curve in rna] == [10, 11]


def test_scores_have_a_curve_for_each_pair_and_the_value_to_compare_with():
    rows = [
        {"step": s, "split": "validation", "score": 0.2, "foscttm/a-b": 0.1, "foscttm/a-c": 0.3}
        | {"mixing/a-b": 0.4, "islands": 1.5, "foscttm a-d": 0.5, "new/a": s}
        for s in (1, 2)
    ]
    found = list_panels(pd.DataFrame(rows))
    foscttm, mixing, islands = found["scores"]
    # The last has the name that an earlier version gave it.
    assert [curve.name for curve in foscttm.curves] == ["a-b", "a-c", "a-d"]
    assert (mixing.reference, islands.reference) == (0.5, 1.0)
    assert mixing.low < 0.4 < 0.5 < mixing.high
    assert [panel.title for panel in found["losses"]] == ["new"]
    unpaired = pd.DataFrame([{"step": 1, "split": "validation", "score": -5.0}])
    assert [panel.title for panel in list_panels(unpaired)["scores"]] == ["score"]


def test_numbers_that_are_not_finite_leave_the_page_whole(logged_run):
    with (logged_run / "metrics.jsonl").open("w") as file:
        for step, loss in ((1, math.inf), (2, math.nan), (3, 0.5)):
            file.write(json.dumps({"step": step, "loss": loss}) + "\n")
    (panel,) = read_json(write_report(logged_run).read_text(), "data")["panels"]["batches"]
    assert panel["curves"][0]["values"] == [0.5]


def test_a_long_run_has_curves_of_means():
    steps = np.arange(1, 10_001)
    frame = pd.DataFrame({"split": "train", "step": steps, "loss": steps % 2 * 1.0})
    frame.loc[0, "loss"] = 1e9
    (panel,) = list_panels(frame)["batches"]
    (curve,) = panel.curves
    assert len(curve.steps) <= panels.MOST_POINTS
    assert curve.steps[-1] == 10_000
    assert set(curve.values[1:]) <= {0.48, 0.5, 0.52}
    assert panel.high < 10  # the first steps do not flatten the rest


def test_metrics_of_a_resumed_run_count_once(logged_run):
    metrics, n_unreadable = read_metrics(logged_run / "metrics.jsonl")
    assert n_unreadable == 1
    assert len(metrics) == 22
    assert metrics.query("split == 'validation' and step == 80")["loss"].tolist() == [5.4]
    titles = [panel.title for group in list_panels(metrics).values() for panel in group]
    terms = ["FOSCTTM", "rna, minus ELBO", "loss", "loss", "distance of z (eq. 9)", "new"]
    assert titles == terms


def test_any_name_can_be_a_metric():
    frame = pd.DataFrame({"split": "train", "step": [1, 2], "$\\frac{1}{$": [1.0, 2.0]})
    drawn = figures.draw_panels(list_panels(frame)["batches"])
    assert figures.render_png(drawn).startswith(b"\x89PNG")


def test_a_damaged_line_of_metrics_is_left_out(logged_run):
    with (logged_run / "metrics.jsonl").open("ab") as file:
        file.write(b'\xff\n12\n{"step": 90, "loss": 1.0}\n')
    metrics, n_unreadable = read_metrics(logged_run / "metrics.jsonl")
    assert (n_unreadable, metrics["step"].max()) == (2, 95)
    assert 90 in set(metrics["step"])
