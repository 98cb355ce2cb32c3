"""A run that has logged, its embedding and scores, and what a page holds."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import anndata as ad
import mudata as md
import numpy as np
import pandas as pd


def write_logged_run(folder: Path) -> Path:
    """Write what the report reads of a run whose last line of metrics is cut off."""
    folder.mkdir(parents=True)
    lines = [
        {
            "step": s,
            "epoch": s / 10,
            "split": "train",
            "loss": 5.0 - s / 100,
            "mse": 0.1,
            "new": s * 2,
        }
        for s in range(0, 100, 5)
    ]
    held_out = [(40, 5.5, 0.26), (80, 5.5, 0.22), (80, 5.4, 0.21)]  # the last after a resume
    lines += [
        {
            "step": s,
            "split": "validation",
            "loss": v,
            "foscttm/rna-adt": f,
            "self/rna": f,
            "score": f,
            "lowest_score": 0.21,
            "lowest_step": 80,
            "best_step": s,
        }
        for s, v, f in held_out
    ]
    text = "\n".join(json.dumps(line) for line in lines) + '\n{"step": 85, "lo'
    (folder / "metrics.jsonl").write_text(text)
    (folder / "config.json").write_text('{"run": "<b>"}')
    return folder


def write_embedding(path: Path) -> Path:
    """Write the z of 40 cells with RNA, of which 30 have proteins, too."""
    rng = np.random.default_rng(0)
    obs = pd.DataFrame(
        {"batch": pd.Categorical(["a", "b"] * 20), "cell_type": ["T", "B", None, "T"] * 10},
        index=[f"c{i}" for i in range(40)],
    )
    parts = {
        m: ad.AnnData(
            obs=obs.iloc[:n].copy(), obsm={"X_clue": rng.normal(size=(n, 4)).astype("f4")}
        )
        for m, n in (("rna", 40), ("adt", 30))
    }
    mdata = md.MuData(parts)
    mdata.obsm["X_clue"] = rng.normal(size=(40, 8)).astype("f4")
    for column in obs:
        mdata.obs[column] = obs[column].reindex(mdata.obs_names)
    mdata.uns["clue_dist"] = {"checkpoint": "step-00000080", "store": "test.zarr"}
    mdata.write(path)
    return path


SCORES = {
    "rna->adt": {
        "cells": 1234,
        "global": {"foscttm": 0.0712, "match": 0.05, "recall10": 0.4},
        "within_batch": {"foscttm": 0.0813, "match": 0.06, "recall10": None},
        "within_type": {"cells": 1150, "types": 9, "foscttm": 0.2345},
        "without_depth": {"cells": 1234, "foscttm": 0.0999},
        "chance": {"global": {"foscttm": 0.5, "match": 0.0008, "recall10": 0.0081}},
    },
    "about": {"run": "r"},
}


def read_json(page: str, name: str) -> Any:
    """What lies in the page as JSON: "data" of the run, "kept" of other inputs."""
    text = re.search(rf'<script type="application/json" id="{name}">(.*?)</script>', page, re.S)
    assert text is not None
    return json.loads(text[1])


def read_sections(page: str) -> list[str]:
    """Names of the sections that a page shows."""
    return re.findall(r'<section id="([\w-]+)"', page)
