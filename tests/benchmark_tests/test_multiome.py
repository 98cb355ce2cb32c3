"""The benchmark of multiome cells: what it simulates, its stages, what it reads of them."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import anndata as ad
import numpy as np
import pytest
from scipy.stats import rankdata

from tests.benchmarks.cells import Shape, make_model
from tests.benchmarks.command_cost import read_children_cpu, read_largest_process, read_training
from tests.benchmarks.multiome import __main__ as multiome
from tests.benchmarks.multiome import simulate
from tests.benchmarks.multiome.__main__ import Multiome
from tests.benchmarks.multiome.simulate import PROGRAMS, Lane, draw_counts, plan_lanes, write_lane


def plan_multiome(*words: str) -> Multiome:
    return Multiome(["--json", "x.json", *words])


def make_small_models() -> dict[str, Any]:
    rng = np.random.default_rng(0)
    shapes = Shape("rna", 0, 60, 20, False), Shape("atac", 0, 90, 30, True)
    return {shape.name: make_model(shape, rng) for shape in shapes}


def test_only_the_last_lane_is_for_tests_and_no_other_has_its_cells() -> None:
    lanes = plan_lanes(60, 10, 2)
    assert [lane.source for lane in lanes] == [0, 1, 0, 1, 0, 2]
    assert [lane.is_test for lane in lanes] == [False] * 5 + [True]
    for n_cells in (10, 65):
        with pytest.raises(ValueError, match="two or more"):
            plan_lanes(n_cells, 10, 2)


def test_drawn_cells_have_the_features_of_their_programs() -> None:
    rng, shares = np.random.default_rng(1), np.repeat(np.eye(PROGRAMS)[:2], 2_000, axis=0)
    for name, model in make_small_models().items():
        counts = draw_counts(model, shares, rng)
        assert counts.has_sorted_indices
        assert (counts.data == 1).all() == (name == "atac")
        found = np.stack([counts[:2_000].mean(0).A1, counts[2_000:].mean(0).A1])
        chances = np.diff(model.cumulated[:2], prepend=0)
        for program in range(2):
            # Rank by rank, as the most frequent peaks are open in all cells.
            ranks = [rankdata(values) for values in (found[program], *chances)]
            like = np.corrcoef(ranks)[0, 1:]
            assert like[program] > 0.95 > like[1 - program]


def test_both_files_of_a_lane_have_the_same_cells(tmp_path: Path) -> None:
    models = make_small_models()
    for lane in (Lane(0, 0, False), Lane(1, 1, True)):
        write_lane(lane, 30, models, tmp_path)
    first, second = (ad.read_h5ad(Lane(0, 0, False).find_file(tmp_path, m)) for m in models)
    held_out = ad.read_h5ad(Lane(1, 1, True).find_file(tmp_path, "rna"))
    assert first.shape == (30, 60)
    assert second.shape == (30, 90)
    assert first.obs.equals(second.obs)
    assert set(first.obs[simulate.HELD_OUT]) == {simulate.TRAIN}
    assert set(held_out.obs[simulate.HELD_OUT]) == {simulate.TEST}
    assert (first.X != held_out.X).nnz > 0


def test_stages_go_on_from_what_others_left(tmp_path: Path) -> None:
    plan = plan_multiome("--quick", "--threads", "1")
    assert [case[0] for case in plan.list_cases()] == list(multiome.STAGES)

    def list_words(stage: str) -> list[str]:
        return [str(word) for word in plan.list_command(stage, lambda name: tmp_path / name)]

    lanes = [word for word in list_words("convert") if word.startswith("lane")]
    assert len(lanes) == 8
    assert lanes[:2] == [
        f"lane000:{name}={tmp_path}/simulate/source0-{name}.h5ad" for name in simulate.FEATURES
    ]
    assert f"store={tmp_path}/split/train.zarr" in list_words("train")
    assert f"{tmp_path}/split/test.zarr" in list_words("evaluate")
    assert f"{tmp_path}/convert/cells.zarr" in list_words("embed")
    assert list_words("estimate")[-1] == f"{tmp_path}/embed/z.zarr"
    split = list_words("split")
    for part in ("train", "test"):
        assert split[split.index(f"--out-{part}") + 1] == f"{tmp_path}/split/{part}.zarr"


def test_epochs_are_those_of_the_steps_asked_for() -> None:
    plan = plan_multiome("--cells", "50000", "--lane", "10000", "--steps", "200")
    settings = dict(word.split("=") for word in plan.list_settings())
    assert float(settings["train.epochs"]) * 40_000 / 512 == pytest.approx(200)
    assert settings["train.validate_every"] == "50"


def test_speed_is_the_median_of_what_was_logged(tmp_path: Path) -> None:
    lines = [
        {"step": 20 * i, "split": "train", "cells_per_s": speed}
        for i, speed in enumerate((5.0, 1.0, 3.0))
    ]
    lines.insert(1, {"step": 20, "split": "validation", "score": 0.1})
    (tmp_path / "metrics.jsonl").write_text("\n".join(map(json.dumps, lines)))
    assert read_training(tmp_path) == {"steps": 40, "cells_per_s": 3.0}


def test_scores_are_those_of_the_pair_and_of_the_joint_z() -> None:
    matched = {"foscttm": 0.1, "recall10": 0.2, "match": 0.01}
    scores = {"rna->atac": {"cells": 9, "global": matched, "mixing": 0.4}, "joint": {}}
    assert multiome.read_scores(scores) == matched | {"scored_cells": 9, "mixing": 0.4}
    labelled = scores | {"joint": {"accuracy": 0.9}}
    assert multiome.read_scores(labelled)["label_accuracy"] == 0.9


def test_the_largest_process_of_each_stage_is_judged() -> None:
    plan = plan_multiome()
    records = [
        {"method": stage, "data_set": "500000", "fold": 0, "rss_mib": 5000.0 * (stage == "train")}
        for stage in multiome.STAGES[:-1]
    ]
    bars = list(plan.judge(records))
    assert [bar["holds"] for bar in bars] == [True, True, True, False, True, True, None]
    assert bars[3]["name"] == "train, 500,000 cells: GB of the largest process"


def test_time_and_memory_of_a_command_are_those_of_what_it_started() -> None:
    before = read_children_cpu()
    program = "import os, sys; data = bytearray(2**26); print(1, flush=True); sys.stdin.read()"
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen([sys.executable, "-S", "-c", program], **pipes) as process:
        process.stdout.readline()
        (largest,) = read_largest_process()
        process.stdin.close()
    assert largest > 64
    assert read_children_cpu() > before
