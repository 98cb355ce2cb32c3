"""The report draws what was logged, shows what was embedded, and needs nothing outside itself."""

from __future__ import annotations

import base64
import json
import re
import resource
import warnings
from pathlib import Path

import anndata as ad
import mudata as md
import numpy as np
import pandas as pd
import pytest

from clue_dist.errors import ConfigError, StoreError
from clue_dist.inference import figures
from clue_dist.inference.profiles import UNKNOWN, read_metrics, read_profiles
from clue_dist.inference.report import write_report


@pytest.fixture
def run(tmp_path):
    folder = tmp_path / "runs" / "demo"
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


@pytest.fixture
def embedding(tmp_path):
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
    path = tmp_path / "o.h5mu"
    md.MuData(parts).write(path)
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


def test_page_is_whole_and_stands_alone(run, embedding, tmp_path):
    scores = tmp_path / "scores.json"
    scores.write_text(json.dumps(SCORES))
    page = write_report(run, embedding, scores)
    assert page == run / "report" / "index.html"
    text = page.read_text()
    names = ["curves", "umap_modality", "umap_batch", "umap_cell_type"]
    images = dict(re.findall(r"<img alt='(\w+)'[^>]*base64,([^']+)'", text))
    assert list(images) == names
    for name, data in images.items():
        png = base64.b64decode(data)
        assert png.startswith(b"\x89PNG")
        assert png == (page.parent / f"{name}.png").read_bytes()
    assert not re.search(r"(src|href)=['\"](?!data:)", text)
    for cell in ("rna → adt", "1,234", "0.0712", "0.5000", "0.0813", "0.0081"):
        assert f">{cell}</td>" in text
    for cell in ("within type", "1,150", "0.2345", "without depth", "0.0999"):
        assert f">{cell}</td>" in text
    assert "UMAP of 70 profiles of o.h5mu, each a cell seen through one modality alone" in text
    assert "{&quot;run&quot;: &quot;&lt;b&gt;&quot;}" in text
    assert (
        "95 steps; 9.5 epochs; kept are the weights of step 80, of validation score 0.2100; "
        "lowest validation score 0.2100 at step 80; "
        "1 unreadable lines" in text
    )


def test_a_joint_embedding_is_called_one(run, tmp_path):
    z = np.random.default_rng(0).normal(size=(30, 4))
    ad.AnnData(obs=pd.DataFrame(index=[f"c{i}" for i in range(30)]), obsm={"X_clue": z}).write_h5ad(
        tmp_path / "o.h5ad"
    )
    text = write_report(run, tmp_path / "o.h5ad").read_text()
    assert "each a cell seen through everything observed in it" in text
    assert "one modality alone" not in text


def test_curves_come_in_the_order_in_which_they_are_read():
    logged = [
        "data_wait",
        "cells_per_s",
        "lr",
        "epoch",
        "contrastive",
        "d",
        "mse",
        "cross",
        "self",
        "loss",
        "score",
        "best",
        "best_step",
        "best_score",
        "lowest_score",
        "lowest_step",
        "error",
    ]
    frame = pd.DataFrame({"split": "train", "step": [1, 2]} | {name: [1.0, 1.0] for name in logged})
    expected = [
        "loss",
        "self",
        "cross",
        "mse",
        "contrastive",
        "d",
        "score",
        "lr",
        "cells_per_s",
        "data_wait",
    ]
    assert figures.list_curves(frame) == expected
    expected[expected.index("score")] = "foscttm/rna-adt"  # whose mean the score is
    expected.insert(expected.index("foscttm/rna-adt") + 1, "mixing/rna-adt")
    expected.insert(expected.index("self") + 1, "self/rna")
    for name in ("foscttm/rna-adt", "mixing/rna-adt", "self/rna"):
        frame[name] = [0.3, 0.2]
    assert figures.list_curves(frame) == expected
    # As earlier versions called it.
    frame["foscttm rna-adt"] = frame.pop("foscttm/rna-adt")
    expected[expected.index("foscttm/rna-adt")] = "foscttm rna-adt"
    assert figures.list_curves(frame) == expected


def test_the_score_of_the_kept_weights_is_not_the_lowest_one(run):
    """As of a run of an earlier version, whose lines had the lowest score alone."""
    validations = [
        {"step": s, "split": "validation", "score": score, "best": 0.0732, "best_step": s}
        for s, score in ((864, 0.0732), (966, 0.0735))
    ]
    (run / "metrics.jsonl").write_text("\n".join(map(json.dumps, validations)))
    text = write_report(run).read_text()
    assert "kept are the weights of step 966, of validation score 0.0735; " in text
    assert "lowest validation score 0.0732 at step 864" in text


def test_metrics_of_a_resumed_run_count_once(run):
    metrics, n_unreadable = read_metrics(run / "metrics.jsonl")
    assert n_unreadable == 1
    assert len(metrics) == 22
    assert metrics.query("split == 'validation' and step == 80")["loss"].tolist() == [5.4]
    assert figures.list_curves(metrics) == ["loss", "self/rna", "mse", "foscttm/rna-adt", "new"]


def test_curves_show_the_numbers_of_both_splits(run):
    metrics, _ = read_metrics(run / "metrics.jsonl")
    panel = {ax.get_title("left"): ax for ax in figures.draw_curves(metrics).axes}
    train, validation = panel["loss"].lines
    assert (len(train.get_xdata()), train.get_ydata()[-1]) == (20, pytest.approx(4.05))
    assert validation.get_ydata().tolist() == [5.5, 5.4]
    for title in ("held-out FOSCTTM rna-adt", "held-out minus ELBO self (eq. 13) rna"):
        assert [len(line.get_xdata()) for line in panel[title].lines] == [2]


def test_a_run_without_metrics_has_a_report_too(run):
    (run / "metrics.jsonl").unlink()
    assert "Nothing was logged" in write_report(run).read_text()


def test_profiles_are_scaled_sampled_and_named(embedding):
    everything = read_profiles(embedding)
    assert len(everything.z) == 70
    np.testing.assert_allclose(np.linalg.norm(everything.z, axis=1), 1)
    assert everything.modality.tolist() == ["rna"] * 40 + ["adt"] * 30
    assert everything.batch[:3].tolist() == ["a", "b", "a"]
    assert everything.cell_type[:3].tolist() == ["T", "B", UNKNOWN]
    some, again, other = (read_profiles(embedding, most=20, seed=s) for s in (1, 1, 2))
    assert len(some.z) == 20
    np.testing.assert_array_equal(some.z, again.z)
    assert not np.array_equal(some.z, other.z)


def test_profiles_of_one_table_leave_out_what_was_not_observed(tmp_path):
    z = np.ones((6, 2), "f4")
    alone = z.copy()
    alone[4:] = np.nan
    table = ad.AnnData(
        obs=pd.DataFrame(index=list("abcdef")),
        obsm={"X_clue": z, "X_clue_rna": alone, "X_clue_adt": z},
    )
    table.write_h5ad(tmp_path / "o.h5ad")
    profiles = read_profiles(tmp_path / "o.h5ad")
    assert sorted(profiles.modality) == ["adt"] * 6 + ["rna"] * 4
    assert set(profiles.batch) == {UNKNOWN}
    del table.obsm["X_clue_rna"], table.obsm["X_clue_adt"]
    table.write_h5ad(tmp_path / "joint.h5ad")
    assert read_profiles(tmp_path / "joint.h5ad").modality.tolist() == ["all observed"] * 6


def test_legends_stay_readable():
    names = np.array(
        [f"type-{i % 60}" for i in range(6000)] + ["type-2"] * 50 + [UNKNOWN] * 9,
        dtype=object,
    )
    groups = figures.group_legend(names)
    assert len(groups) == figures.MOST_LEGEND
    assert groups.index("type-2") < groups.index("type-10")
    assert UNKNOWN not in groups
    for n in (3, 20, 36):
        assert len(set(figures.choose_colours(n))) == n
    figure = figures.draw_scatter(
        np.random.default_rng(0).normal(size=(len(names), 2)), names, "cell type"
    )
    labels = [t.get_text() for t in figure.legends[0].get_texts()]
    assert labels == [*groups, "24 others"]


@pytest.mark.parametrize(
    "label",
    ["$\\frac{1}{$", "CD4$+$ $", "_hidden", "two\nlines", "\\alpha", "{0}", "β-cell 细胞", ""],
)
def test_any_name_can_stand_in_a_picture(label):
    names = np.array([label] * 5 + ["other"] * 5, dtype=object)
    figure = figures.draw_scatter(np.random.default_rng(0).normal(size=(10, 2)), names, label)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # the font lacks some of the letters
        assert figures.render_png(figure).startswith(b"\x89PNG")
    shown = [text.get_text() for text in figure.legends[0].get_texts()]
    assert sorted(shown) == sorted([label, "other"])


def test_any_name_can_be_a_metric():
    frame = pd.DataFrame({"split": "train", "step": [1, 2], "$\\frac{1}{$": [1.0, 2.0]})
    assert figures.render_png(figures.draw_curves(frame)).startswith(b"\x89PNG")


def read_folder(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_a_report_is_replaced_as_a_whole_or_not_at_all(run, embedding, tmp_path):
    page = write_report(run, embedding)
    before = read_folder(page.parent)
    (run / "metrics.jsonl").write_text('{"step": 1, "loss": 3.0}\n{"step": 2, "loss": 1.0}\n')
    (tmp_path / "bad.json").write_text("{")
    with pytest.raises(ConfigError, match="scores cannot be read"):
        write_report(run, embedding, tmp_path / "bad.json")
    assert read_folder(page.parent) == before
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (40_000, limit[1]))
    try:
        with pytest.raises(StoreError, match="the disk is full or refuses to be written"):
            write_report(run, embedding)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    assert read_folder(page.parent) == before
    write_report(run)
    assert sorted(read_folder(page.parent)) == ["curves.png", "index.html"]
    assert sorted(path.name for path in run.iterdir()) == ["config.json", "metrics.jsonl", "report"]


def test_a_page_says_whether_z_is_one_space_where_it_was_scored(run, tmp_path):
    scores = tmp_path / "scores.json"
    scores.write_text(json.dumps(SCORES))
    assert "One space" not in write_report(run, scores=scores).read_text()
    mixing = {"mixing": 0.41, "mixing_ilisi": 0.7, "mixing_cells": 1234, "transfer": 0.875}
    joint = {
        "cells": 10,
        "store_cells": 20,
        "islands": {"rna": 3.5, "rna+adt": 0.25},
        "worst_island": "rna",
        "ilisi": 0.625,
        "kbet": None,
    }
    entry = SCORES["rna->adt"] | mixing
    scores.write_text(json.dumps(SCORES | {"rna->adt": entry, "adt->rna": entry, "joint": joint}))
    text = write_report(run, scores=scores).read_text()
    assert (
        "<p>rna and adt, 1,234 cells: mixing 0.4100 (0.5 is perfect), iLISI 0.7000, "
        "label transfer 0.8750.</p><p>joint z, 10 of the store&#x27;s 20 cells; "
        "islands by pattern (1 is none): rna 3.5000 (the worst), rna+adt 0.2500; "
        "iLISI of batches 0.6250, kBET acceptance unknown.</p>"
    ) in text


def test_scores_of_training_cells_are_called_so(run, tmp_path):
    scores = tmp_path / "scores.json"
    for seen in (False, True):
        scores.write_text(json.dumps(SCORES | {"about": {"seen_in_training": seen}}))
        text = write_report(run, scores=scores).read_text()
        assert ("The model was trained on this store" in text) == seen


def test_a_run_is_called_by_its_name_wherever_it_is_typed(run, monkeypatch):
    monkeypatch.chdir(run)
    assert "<h1>demo</h1>" in write_report(Path(".")).read_text()


def test_a_damaged_line_of_metrics_is_left_out(run):
    with (run / "metrics.jsonl").open("ab") as file:
        file.write(b'\xff\n12\n{"step": 90, "loss": 1.0}\n')
    metrics, n_unreadable = read_metrics(run / "metrics.jsonl")
    assert (n_unreadable, metrics["step"].max()) == (2, 95)
    assert 90 in set(metrics["step"])


def test_what_is_not_there_is_said(run, tmp_path):
    with pytest.raises(ConfigError, match="no run here"):
        write_report(tmp_path / "nowhere")
    (tmp_path / "store.zarr").mkdir()
    with pytest.raises(ConfigError, match=r"no run here[\s\S]*no config\.json"):
        write_report(tmp_path / "store.zarr")
    assert list((tmp_path / "store.zarr").iterdir()) == []
    with pytest.raises(ConfigError, match="no embedding here"):
        write_report(run, tmp_path / "nowhere.h5mu")
    for ending in ("h5mu", "h5ad", "zarr"):
        (tmp_path / f"text.{ending}").write_text("no HDF5")
        with pytest.raises(ConfigError, match="embedding cannot be read"):
            write_report(run, tmp_path / f"text.{ending}")
    (tmp_path / "bad.json").write_text('{"rna->adt": {}}')
    with pytest.raises(ConfigError, match="scores cannot be read"):
        write_report(run, scores=tmp_path / "bad.json")
