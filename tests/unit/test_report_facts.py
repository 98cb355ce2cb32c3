"""The report says how a run was started, what happened, and which weights are kept."""

from __future__ import annotations

import json

import pytest

from clue_dist.inference.report import facts, write_report
from clue_dist.inference.report.facts import describe_weights, read_run_facts
from clue_dist.inference.report.panels import read_metrics

pytestmark = pytest.mark.usefixtures("quick_pictures")


def test_which_weights_are_kept_and_why_is_said_truly(logged_run):
    def describe(*lines):
        (logged_run / "metrics.jsonl").write_text("\n".join(map(json.dumps, lines)))
        metrics, _ = read_metrics(logged_run / "metrics.jsonl")
        return " ".join(describe_weights(metrics, read_run_facts(logged_run)))

    assert "No weights are kept yet" in describe({"step": 5, "loss": 1.0})
    (logged_run / "best" / "step-00000966").mkdir(parents=True)
    (logged_run / "best" / "step-00000966" / "COMMIT.json").write_text("{}")
    assert "no validation scored cells" in describe({"step": 5, "loss": 1.0})
    assert "metrics.jsonl, which would say why these are kept, is not here" in describe()
    # As of a run of an earlier version, whose lines had the lowest score alone.
    looks = [
        {"step": s, "split": "validation", "score": score, "best": 0.0732, "best_step": s}
        for s, score in ((864, 0.0732), (966, 0.0735))
    ]
    text = describe(*looks)
    found = "their validation score, 0.0735, is 0.0003 above the lowest, of step 864. Of"
    assert f"The weights of step 966 are kept: {found}" in text
    assert "of step 864, with a standard error of 0.0007. Of" in describe(
        looks[0], looks[1] | {"error": 0.0007}
    )
    assert "of another moment" not in text
    looks[-1] |= {"score": 0.07, "foscttm/rna-adt": 0.07}
    text = describe(*looks)
    assert "their validation score, 0.0700, is the lowest of 2 validations" in text
    assert "The score is FOSCTTM of held-out cells" in text
    assert "holds best/step-00000966: it is of another moment" in describe(looks[0])


def test_the_page_says_how_the_run_was_started(logged_run):
    text = write_report(logged_run).read_text()
    assert "not recorded: the run is of an earlier version" in text
    attempt = {
        "step": 0,
        "total_steps": 100,
        "ranks": 2,
        "device": "cpu",
        "train_cells": {"rna+adt": 1900},
        "held_out_cells": {"rna+adt": 100},
        "time": "2026-01-01T10:00:00+0000",
        "command": "launch/train.py --set store=<b>",
        "host": "node1",
        "versions": {"torch": "2.13.0"},
    }
    later = attempt | {"step": 60, "ranks": 1}
    lines = [json.dumps(attempt), json.dumps(later), '{"step": 3, "to']
    (logged_run / "attempts.jsonl").write_text("\n".join(lines))
    text = write_report(logged_run).read_text()
    assert "<dt>began 2026-01-01T10:00:00+0000</dt>" in text
    assert "launch/train.py --set store=&lt;b&gt;; 2 ranks (cpu) on node1" in text
    assert "<dt>went on from step 60 2026-01-01T10:00:00+0000</dt>" in text
    assert "<dt>cells of rna+adt</dt><dd>1,900 trained on, 100 held out</dd>" in text
    assert "<dt>logged steps</dt><dd>95 of 100</dd>" in text
    assert "<dt>versions</dt><dd>torch 2.13.0</dd>" in text


def test_events_are_listed(logged_run):
    with (logged_run / "metrics.jsonl").open("w") as file:
        for event in ("loss spike", "settings changed"):
            line = {"step": 7, "split": "event", "event": event, "train.lr": "0.1 -> 0.2"}
            file.write(json.dumps(line) + "\n")
    metrics, _ = read_metrics(logged_run / "metrics.jsonl")
    assert facts.list_events(metrics) == [
        ("step 7", "loss spike: train.lr 0.1 -> 0.2"),
        ("step 7", "settings changed: train.lr 0.1 -> 0.2"),
    ]
    assert "2 events" in write_report(logged_run).read_text()
