"""What wandb gets of a run, read back from its offline files; and what a report adds to it."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest
import wandb
import yaml

from clue_dist.checkpoint.wandb_run import open_wandb_run
from clue_dist.config import Config, LogConfig
from clue_dist.errors import ConfigError
from clue_dist.inference.report import write_report
from clue_dist.inference.report.wandb_tables import build_tables, list_summary, log_report
from clue_dist.ranks import Ranks
from clue_dist.train.sinks import Sinks
from tests.wandb_files import RecordedRun, read_recorded_run

GLOBAL = {"foscttm": 0.07, "match": 0.05, "recall10": None}
ENTRY = {
    "cells": 30,
    "global": GLOBAL,
    "within_batch": GLOBAL | {"foscttm": 0.08},
    "directed": {"global": GLOBAL},
    "mixing_cells": 20,
    "mixing": 0.4,
    "mixing_ilisi": 0.7,
    "transfer": 0.9,
}
JOINT = {"cells": 9, "store_cells": 20, "asw": 0.6, "kbet": None}
SCORES = {"rna->adt": ENTRY, "adt->rna": ENTRY, "joint": JOINT}
CONFUSION = {"queries": "rna", "keys": "adt", "labels": ["T", "B"], "counts": [[3, 0], [1, 2]]}


def train_run(run_folder: Path) -> None:
    """Log what a run logs, with its weights, as training does."""
    run_folder.mkdir()
    log = LogConfig(tensorboard=False, group="trials", name="first", artifacts=True, project="p")
    config = Config(log=log, seed=3)
    (run_folder / "config.json").write_text(config.to_json())
    (run_folder / "model.json").write_text("{}")
    for name in ("COMMIT.json", "weights.safetensors"):
        path = run_folder / "best" / "step-00000020" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(name)
    with Sinks(run_folder, config, 30, 0, Ranks()) as sinks:
        for step, score, best_step in ((10, 0.3, 10), (20, 0.1, 20), (30, 0.2, 20)):
            numbers = {"loss": score, "cells_per_s": 1.0, "data_wait": 0.0}
            sinks.write_numbers("train", step, numbers)
            choice = {"best_step": best_step, "best_score": min(score, 0.3), "error": 0.0}
            held_out = {"score": score, "foscttm/rna-adt": score}
            sinks.write_numbers("validation", step, held_out | choice)
        sinks.send_best_weights(20, 0.1)


@pytest.fixture(scope="module")
def recorded(tmp_path_factory: pytest.TempPathFactory) -> RecordedRun:
    """A run and its report, as wandb has recorded them."""
    with pytest.MonkeyPatch.context() as patch:
        for name in ("WANDB_MODE", "WANDB_RUN_ID", "WANDB_RUN_GROUP", "WANDB_PROJECT"):
            patch.delenv(name, raising=False)
        folder = tmp_path_factory.mktemp("wandb")
        patch.setenv("WANDB_DATA_DIR", str(folder))
        train_run(folder / "run")
        (folder / "scores.json").write_text(json.dumps(SCORES))
        time.sleep(1.1)  # wandb names its folders by the second
        page = write_report(folder / "run", scores=folder / "scores.json")
        log_report(folder / "run", page)
        wandb.teardown()  # its service may still be writing when a run is finished
    found = read_recorded_run(folder / "run")
    assert found.run_id == (folder / "run" / "wandb-id").read_text()
    return found


@pytest.mark.slow
def test_a_run_has_its_name_its_group_and_its_resolved_config(recorded: RecordedRun) -> None:
    assert (recorded.name, recorded.group, recorded.project) == ("first", "trials", "p")
    assert recorded.config["seed"] == 3
    assert recorded.config["train"]["lr"] == Config().train.lr


@pytest.mark.slow
def test_the_summary_holds_the_scores_of_the_weights_that_are_kept(recorded: RecordedRun) -> None:
    losses = [row["train/loss"] for row in recorded.history if "train/loss" in row]
    assert losses == [0.3, 0.1, 0.2]
    assert recorded.summary["best/step"] == 20
    assert recorded.summary["best/foscttm/rna-adt"] == 0.1
    assert recorded.summary["validation/score"] == 0.2  # the last one, as wandb itself does it


@pytest.mark.slow
def test_the_best_weights_are_an_artifact_where_that_is_asked_for(recorded: RecordedRun) -> None:
    weights = ("best/step-00000020/COMMIT.json", "best/step-00000020/weights.safetensors")
    assert sorted(recorded.artifacts["model"]) == [*weights, "config.json", "model.json"]


@pytest.mark.slow
def test_the_report_brings_its_tables_its_pictures_and_its_page(recorded: RecordedRun) -> None:
    (row,) = [row for row in recorded.history if "report/page/_type" in row]
    kinds = {
        name.removesuffix("/_type"): kind for name, kind in row.items() if name.endswith("_type")
    }
    assert kinds == {
        "report/matching": "table-file",
        "report/mixing": "table-file",
        "report/curves": "image-file",
        "report/page": "html-file",
    }
    assert row["_step"] == 30
    assert recorded.summary["test/foscttm/rna-adt"] == 0.07


@pytest.mark.slow
def test_a_run_of_a_sweep_is_the_one_that_the_agent_has_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("WANDB_MODE", raising=False)
    parameters = tmp_path / "parameters.yaml"
    parameters.write_text(yaml.safe_dump({"wandb_version": 1, "train.lr": {"value": 0.5}}))
    monkeypatch.setenv("WANDB_SWEEP_ID", "search")
    monkeypatch.setenv("WANDB_RUN_ID", "trial-7")
    monkeypatch.setenv("WANDB_SWEEP_PARAM_PATH", str(parameters))
    wandb.teardown()  # it keeps the environment that it first saw
    run = open_wandb_run(tmp_path, LogConfig(), {"seed": 3})
    assert (run.id, run.sweep_id) == ("trial-7", "search")
    assert (run.config["train.lr"], run.config["seed"]) == (0.5, 3)
    run.finish()
    wandb.teardown()
    assert (tmp_path / "wandb-id").read_text() == "trial-7"


def test_tables_hold_what_is_symmetric_once() -> None:
    sections = {"scores": SCORES, "embedding": {"confusions": [CONFUSION]}}
    tables = build_tables(sections)
    assert [row[:4] for row in tables["matching"][1]] == [
        ["rna-adt", "global", 30, 0.07],
        ["rna-adt", "within_batch", 30, 0.08],
        ["rna->adt", "global", 30, 0.07],
        ["adt->rna", "global", 30, 0.07],
    ]
    assert tables["mixing"][1] == [["rna-adt", 20, 0.4, 0.7, 0.9]]
    assert tables["labels"][1] == [
        ["rna", "adt", "T", "T", 3],
        ["rna", "adt", "B", "T", 1],
        ["rna", "adt", "B", "B", 2],
    ]
    assert build_tables({}) == {}
    assert list_summary(sections) == {
        "test/foscttm/rna-adt": 0.07,
        "test/match/rna-adt": 0.05,
        "test/mixing/rna-adt": 0.4,
        "test/joint/asw": 0.6,
    }


def test_a_run_that_does_not_log_to_wandb_is_not_sent(tmp_path: Path) -> None:
    config = Config(log=LogConfig(wandb="disabled"))
    (tmp_path / "config.json").write_text(config.to_json())
    with pytest.raises(ConfigError, match="the run does not log to wandb"):
        log_report(tmp_path, tmp_path / "index.html")
