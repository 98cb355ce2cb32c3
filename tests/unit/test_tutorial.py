"""The tutorial runs, on small simulated cells; its page has the text and the code of the script."""

from __future__ import annotations

import sys
import tempfile
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import mudata
import numpy as np
import pytest

import clue_dist
from data_prep.fetch import split_mosaic
from data_prep.simulate import SimulationSpec, build_mudata
from tests.notebook import (
    LONGEST_OUTPUT,
    PAGE,
    TUTORIAL,
    NotebookCell,
    read_notebook,
    render_page,
    run_notebook,
    shorten_output,
)

SPEC = SimulationSpec((("rna", "rna", 60), ("adt", "adt", 24)), cells=800, batches=2)
MARKERS = ["cd3.1", "cd14", "cd19"]  # proteins that the tutorial draws
FAST = {
    "train.epochs": 4,
    "model.latent": 8,
    "model.trunk.members": 1,
    "model.trunk.hidden": 16,
    "model.decoder.hidden": 16,
    "log.tensorboard": False,
}


def write_cells(folder: Path) -> None:
    """Write simulated cells where the tutorial reads real ones."""
    cells = build_mudata(SPEC)
    proteins = cells["adt"].var_names.to_list()
    cells["adt"].var_names = MARKERS + proteins[len(MARKERS) :]
    cells.update()
    folder.mkdir(parents=True)
    for part, name in zip(split_mosaic(cells), ("train", "test"), strict=True):
        part.write(folder / f"{name}.h5mu")


class FastPlane:
    """Stands for UMAP, whose compilation takes longer than all else that the tutorial does."""

    def __init__(self, **settings: object) -> None:
        assert settings

    def fit_transform(self, profiles: np.ndarray) -> np.ndarray:
        centred = profiles - profiles.mean(axis=0)
        return centred @ np.linalg.svd(centred, full_matrices=False)[2][:2].T


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_the_tutorial_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_cells(tmp_path / "data/pbmc")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(clue_dist, "fit", partial(clue_dist.fit, settings=FAST))
    monkeypatch.setitem(sys.modules, "umap", SimpleNamespace(UMAP=FastPlane))
    names: dict[str, Any] = {}
    with mudata.set_options(pull_on_update=None):  # what the tutorial sets ends with it
        shown = list(run_notebook(read_notebook(TUTORIAL), names))
    n_test = names["test"].n_obs
    assert names["plane"].shape == (2 * n_test, 2)
    assert np.isfinite(names["plane"]).all()
    assert names["imputed"].shape == (n_test, 24)
    assert (names["imputed"].X >= 0).all()
    assert names["correlations"].dropna().between(-1, 1).all()
    assert list(names["pairs"]["cell"]) == list(names["test"]["rna"].obs_names)
    assert set(names["partners"]["partner"]) <= set(names["train"]["adt"].obs_names)
    for pairs in (names["pairs"], names["partners"]):
        assert pairs["confidence"].between(0, 1).all()
    assert list(names["labels"].index) == list(names["test"]["adt"].obs_names)
    assert names["labels"]["confidence"].between(0, 1).all()
    assert names["report"].is_file()
    page = render_page(shown, tmp_path / "figures")
    assert "Run runs/pbmc" in page
    pictures = sorted((tmp_path / "figures").iterdir())
    assert [path.name for path in pictures] == [f"figure-{n}.png" for n in (1, 2, 3)]
    assert all(path.stat().st_size > 10_000 for path in pictures)


def test_the_page_is_made_of_the_script() -> None:
    """`python -m tests.notebook` writes it again."""
    page, place = PAGE.read_text(), 0
    for cell in read_notebook(TUTORIAL):
        place = page.find(cell.text, place)
        assert place >= 0, cell.text
        place += len(cell.text)


def test_a_cell_shows_what_it_prints_its_last_value_and_its_figures(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(
        "# ---\n# jupyter: x\n# ---\n\n# %% [markdown]\n# # Title\n#\n# Text.\n\n# %%\n"
        "import matplotlib.pyplot as plt\nprint('printed')\nplt.plot([1, 2])\nvalue = 3\nvalue\n"
    )
    cells = read_notebook(script)
    assert cells[0] == NotebookCell("# Title\n\nText.", is_code=False)
    names: dict[str, Any] = {}
    text = render_page(list(run_notebook(cells, names)), tmp_path / "figures")
    assert names["value"] == 3
    assert "```text\nprinted\n3\n```\n\n![" in text
    assert (tmp_path / "figures/figure-1.png").read_bytes().startswith(b"\x89PNG")


def test_long_outputs_lose_their_middle() -> None:
    text = "\n".join(f"line {i}" for i in range(100))
    lines = shorten_output(text).splitlines()
    assert len(lines) == LONGEST_OUTPUT + 1
    assert [lines[0], lines[LONGEST_OUTPUT // 2], lines[-1]] == ["line 0", "...", "line 99"]
    assert shorten_output(f"{tempfile.gettempdir()}/tmp3p6/cells.zarr: x") == "cells.zarr: x"
