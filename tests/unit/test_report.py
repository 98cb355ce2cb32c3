"""The report draws what was logged, shows what was embedded, and needs nothing outside itself."""

from __future__ import annotations

import json
import math
import re
import resource
import shutil
import subprocess
import threading
import warnings
from pathlib import Path

import anndata as ad
import mudata as md
import numpy as np
import pandas as pd
import pytest

from clue_dist.errors import ConfigError, StoreError
from clue_dist.inference.report import facts, figures, layouts, panels, write_report
from clue_dist.inference.report.facts import describe_weights, read_run_facts
from clue_dist.inference.report.layouts import compute_umap
from clue_dist.inference.report.panels import list_panels, read_metrics
from clue_dist.inference.report.profiles import ALL_OBSERVED, UNKNOWN, read_profiles


@pytest.fixture(autouse=True)
def quick_pictures(monkeypatch):
    """UMAP takes half a minute to compile, and a picture a tenth of a second to draw."""
    monkeypatch.setattr(layouts, "compute_umap", lambda latent: latent[:, :2])
    drawn = "clue_dist.inference.report.page.render_png"
    monkeypatch.setattr(drawn, lambda figure: b"\x89PNG")


@pytest.mark.parametrize("n_cells", [1, 2])
def test_one_cell_or_two_have_a_layout(n_cells):
    points = compute_umap(np.ones((n_cells, 5)))
    assert points.shape == (n_cells, 2)
    assert len(np.unique(points, axis=0)) == n_cells


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
    mdata = md.MuData(parts)
    mdata.obsm["X_clue"] = rng.normal(size=(40, 8)).astype("f4")
    for column in obs:
        mdata.obs[column] = obs[column].reindex(mdata.obs_names)
    mdata.uns["clue_dist"] = {"checkpoint": "step-00000080", "store": "test.zarr"}
    path = tmp_path / "o.h5mu"
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


def read_json(page, name):
    """What lies in the page as JSON: "data" of the run, "kept" of other inputs."""
    text = re.search(rf'<script type="application/json" id="{name}">(.*?)</script>', page, re.S)
    assert text is not None
    return json.loads(text[1])


def read_sections(page):
    return re.findall(r'<section id="([\w-]+)"', page)


def test_page_is_whole_and_stands_alone(run, embedding, tmp_path):
    scores = tmp_path / "scores.json"
    scores.write_text(json.dumps(SCORES))
    page = write_report(run, embedding, scores)
    assert page == run / "report" / "index.html"
    text = page.read_text()
    assert read_sections(text) == [
        *("weights", "scores-over-time", "losses", "embedding", "matching", "confusion"),
        "run",
    ]
    assert not re.search(r"(src|href)\s*=|@import|url\((?!#)|fetch\(|import\(", text)
    assert len(text) < 200_000
    for name in ("curves", "umap_joint_z_batch", "umap_modalities_modality"):
        assert (page.parent / f"{name}.png").read_bytes().startswith(b"\x89PNG")
    for cell in ("rna-adt", "1,234", "0.0712", "0.5000", "0.0813", "0.0081"):
        assert f">{cell}</td>" in text
    for cell in ("within type", "1,150", "0.2345", "without depth", "0.0999"):
        assert f">{cell}</td>" in text
    assert "{&#34;run&#34;: &#34;&lt;b&gt;&#34;}" in text
    assert "1 unreadable lines of metrics.jsonl" in text
    assert "<dt>logged steps</dt><dd>95</dd>" in text
    assert "<dt>epochs</dt><dd>9.5</dd>" in text


def test_sections_stay_when_others_are_added(run, embedding, tmp_path):
    scores = tmp_path / "scores.json"
    scores.write_text(json.dumps(SCORES))
    first = write_report(run, embedding).read_text()
    assert "matching" not in read_sections(first)
    embedding.unlink()
    both = write_report(run, scores=scores).read_text()
    assert {"embedding", "confusion", "matching"} <= set(read_sections(both))
    kept, before = (read_json(text, "kept")["sections"] for text in (both, first))
    assert kept["embedding"] == before["embedding"]
    scores.unlink()
    page = write_report(run)
    assert page.read_text() == both  # nothing is new, so that nothing changes
    assert (page.parent / "umap_joint_z_batch.png").exists()
    page.write_text(both.replace('"format":1', '"format":2'))  # of a later version
    assert "matching" not in read_sections(write_report(run).read_text())
    page.write_text(both.replace('"scores":', '"scores'))  # somebody has edited it
    assert "matching" not in read_sections(write_report(run).read_text())


def test_what_is_symmetric_stands_once(run, tmp_path):
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
    text = write_report(run, scores=scores).read_text()
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


def test_sections_of_other_weights_say_so(run, embedding, tmp_path):
    assert "Of other weights" not in write_report(run, embedding).read_text()
    scores = tmp_path / "scores.json"
    scores.write_text(json.dumps(SCORES | {"about": {"checkpoint": "step-00000040"}}))
    text = write_report(run, scores=scores).read_text()
    assert text.count("Of other weights") == 1
    assert "made with step-00000040, while the run keeps step 80 now" in text


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
    assert [curve.name for curve in foscttm.curves] == [
        "a-b",
        "a-c",
        "a-d",
    ]  # the last is earlier's
    assert (mixing.reference, islands.reference) == (0.5, 1.0)
    assert mixing.low < 0.4 < 0.5 < mixing.high
    assert [panel.title for panel in found["losses"]] == ["new"]
    unpaired = pd.DataFrame([{"step": 1, "split": "validation", "score": -5.0}])
    assert [panel.title for panel in list_panels(unpaired)["scores"]] == ["score"]


def test_numbers_that_are_not_finite_leave_the_page_whole(run):
    with (run / "metrics.jsonl").open("w") as file:
        for step, loss in ((1, math.inf), (2, math.nan), (3, 0.5)):
            file.write(json.dumps({"step": step, "loss": loss}) + "\n")
    (panel,) = read_json(write_report(run).read_text(), "data")["panels"]["batches"]
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


def test_which_weights_are_kept_and_why_is_said_truly(run):
    def describe(*lines):
        (run / "metrics.jsonl").write_text("\n".join(map(json.dumps, lines)))
        metrics, _ = read_metrics(run / "metrics.jsonl")
        return " ".join(describe_weights(metrics, read_run_facts(run)))

    assert "No weights are kept yet" in describe({"step": 5, "loss": 1.0})
    (run / "best" / "step-00000966").mkdir(parents=True)
    (run / "best" / "step-00000966" / "COMMIT.json").write_text("{}")
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


def test_the_page_says_how_the_run_was_started(run):
    text = write_report(run).read_text()
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
    (run / "attempts.jsonl").write_text("\n".join(lines))
    text = write_report(run).read_text()
    assert "<dt>began 2026-01-01T10:00:00+0000</dt>" in text
    assert "launch/train.py --set store=&lt;b&gt;; 2 ranks (cpu) on node1" in text
    assert "<dt>went on from step 60 2026-01-01T10:00:00+0000</dt>" in text
    assert "<dt>cells of rna+adt</dt><dd>1,900 trained on, 100 held out</dd>" in text
    assert "<dt>logged steps</dt><dd>95 of 100</dd>" in text
    assert "<dt>versions</dt><dd>torch 2.13.0</dd>" in text


def test_events_are_listed(run):
    with (run / "metrics.jsonl").open("w") as file:
        for event in ("loss spike", "settings changed"):
            line = {"step": 7, "split": "event", "event": event, "train.lr": "0.1 -> 0.2"}
            file.write(json.dumps(line) + "\n")
    metrics, _ = read_metrics(run / "metrics.jsonl")
    assert facts.list_events(metrics) == [
        ("step 7", "loss spike: train.lr 0.1 -> 0.2"),
        ("step 7", "settings changed: train.lr 0.1 -> 0.2"),
    ]
    assert "2 events" in write_report(run).read_text()


def test_labels_pass_from_one_modality_to_another(tmp_path):
    """A modality in which two types lie together confuses these two, in one direction alone."""
    draws = np.random.default_rng(0)
    labels = np.repeat(["A", "B", "C"], 40)
    corners = np.array([[1, 0, 0], [0, 1, 0], [0, 0.6, 0.8]])
    apart = np.repeat(corners, 40, axis=0) + draws.normal(scale=0.02, size=(120, 3))
    together = np.repeat(corners[[0, 1, 1]], 40, axis=0) + draws.normal(scale=0.02, size=(120, 3))
    obs = pd.DataFrame({"cell_type": labels}, index=[f"c{i}" for i in range(120)])
    parts = {
        name: ad.AnnData(obs=obs.copy(), obsm={"X_clue": z})
        for name, z in (("rna", apart), ("adt", together))
    }
    md.MuData(parts).write(tmp_path / "o.h5mu")
    alone = read_profiles(tmp_path / "o.h5mu").alone
    assert alone is not None
    first, second = layouts.list_confusions(alone)
    assert (first.queries, first.keys, first.labels) == ("rna", "adt", ["A", "B", "C"])
    assert first.counts[0] == [40, 0, 0]
    assert first.counts[1][0] == first.counts[2][0] == 0  # B or C: adt tells them apart no better
    assert second.counts[1:] == [[0, 40, 0], [0, 40, 0]]  # all lie at B of rna
    assert first.n_cells == 120
    assert second.accuracy == pytest.approx(sum(second.counts[k][k] for k in range(3)) / 120)


def test_points_can_be_coloured_by_what_tells_them_apart(embedding):
    embedded = read_profiles(embedding)
    assert embedded.joint is not None
    assert embedded.alone is not None
    titles = [c.title for c in layouts.list_colourings(embedded.joint)]
    assert titles == ["cell type", "batch", "observed"]
    modality, *_, pattern = layouts.list_colourings(embedded.alone)
    assert (modality.names, pattern.names) == (["adt", "rna"], ["rna", "rna+adt"])
    assert len(modality.codes) == 70
    cell_type, *_ = layouts.list_colourings(embedded.joint)
    assert cell_type.rest == UNKNOWN
    assert cell_type.codes.count(-1) == 10


def test_progress_is_announced(run, embedding, capsys):
    write_report(run, embedding)
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == "reading o.h5mu ..."
    assert any(line.startswith("UMAP of 70 points, modalities") for line in lines)


def test_a_slow_step_says_that_it_goes_on(monkeypatch):
    monkeypatch.setattr(layouts, "_SILENCE", 0.01)
    lines, spoken = [], threading.Event()

    def print_error(line):
        lines.append(line)
        if "so far" in line:
            spoken.set()

    monkeypatch.setattr(layouts, "print_error", print_error)
    with layouts.announce_progress("waiting"):
        assert spoken.wait(30)
    assert lines[0] == "waiting ..."
    assert "so far" in lines[1]


def test_a_joint_embedding_is_called_one(run, tmp_path):
    z = np.random.default_rng(0).normal(size=(30, 4))
    ad.AnnData(obs=pd.DataFrame(index=[f"c{i}" for i in range(30)]), obsm={"X_clue": z}).write_h5ad(
        tmp_path / "o.h5ad"
    )
    text = write_report(run, tmp_path / "o.h5ad").read_text()
    assert "each a cell seen through everything observed in it" in text
    assert "one modality alone" not in text
    assert "confusion" not in read_sections(text)


CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="Chromium is not installed")
def test_a_browser_draws_every_panel_and_fits_a_phone(run, embedding, tmp_path):
    page = write_report(run, embedding)
    text = page.read_text()
    # What the page is as wide as once everything is drawn, and what a pointer is told.
    probe = """<script>
      const svg = document.querySelector("svg"), box = svg.getBoundingClientRect();
      const place = { clientX: box.right - 12, clientY: box.top + 50 };
      svg.dispatchEvent(new PointerEvent("pointermove", place));
      const said = [document.documentElement.scrollWidth, TIP.innerText];
      for (const button of document.querySelectorAll("#layouts .controls button")) button.click();
      for (const button of document.querySelectorAll("#confusions button")) button.click();
      document.title = [...said, document.querySelector("#layouts p").textContent].join("|");
    </script></body>"""
    page.write_text(text.replace("</body>", probe))
    command = [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--dump-dom"]
    command += ["--disable-dev-shm-usage"]  # which is small in a container
    command += [f"--user-data-dir={tmp_path / 'profile'}", "--window-size=500,2000"]
    done = subprocess.run([*command, page.as_uri()], capture_output=True, text=True, timeout=300)
    n_panels = sum(map(len, read_json(text, "data")["panels"].values()))
    assert f'data-drawn="{n_panels}"' in done.stdout
    assert done.stdout.count("<figure>") == n_panels > 3
    assert '<canvas aria-label="UMAP"' in done.stdout
    title = re.search(r"<title>(.*?)</title>", done.stdout, re.S)
    assert title is not None
    width, tip, note = title[1].split("|")
    assert int(width) <= 500  # nothing sticks out: Chromium's own least width is 500
    assert tip.split("\n") == ["step 80", "rna-adt 0.21"]
    assert note.startswith("70 points, each a cell seen through one modality alone")


def test_metrics_of_a_resumed_run_count_once(run):
    metrics, n_unreadable = read_metrics(run / "metrics.jsonl")
    assert n_unreadable == 1
    assert len(metrics) == 22
    assert metrics.query("split == 'validation' and step == 80")["loss"].tolist() == [5.4]
    titles = [panel.title for group in list_panels(metrics).values() for panel in group]
    terms = ["FOSCTTM", "rna, minus ELBO", "loss", "loss", "distance of z (eq. 9)", "new"]
    assert titles == terms


def test_a_run_without_metrics_has_a_report_too(run):
    (run / "metrics.jsonl").unlink()
    assert "Nothing was logged" in write_report(run).read_text()


def test_profiles_are_scaled_sampled_and_named(embedding):
    everything = read_profiles(embedding).alone
    assert len(everything.z) == 70
    np.testing.assert_allclose(np.linalg.norm(everything.z, axis=1), 1)
    assert everything.modality.tolist() == ["rna"] * 40 + ["adt"] * 30
    assert everything.batch[:3].tolist() == ["a", "b", "a"]
    assert everything.cell_type[:3].tolist() == ["T", "B", UNKNOWN]
    assert everything.pattern[:40].tolist() == ["rna+adt"] * 30 + ["rna"] * 10
    assert everything.cell[[0, 39, 40]].tolist() == [0, 39, 0]
    joint = read_profiles(embedding).joint
    assert set(joint.modality) == {ALL_OBSERVED}
    assert joint.pattern.tolist() == everything.pattern[:40].tolist()
    some, again, other = (read_profiles(embedding, most=20, seed=s).alone for s in (1, 1, 2))
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
    profiles = read_profiles(tmp_path / "o.h5ad").alone
    assert sorted(profiles.modality) == ["adt"] * 6 + ["rna"] * 4
    assert set(profiles.batch) == {UNKNOWN}
    assert set(read_profiles(tmp_path / "o.h5ad").joint.pattern) == {"adt+rna", "adt"}
    # The key of the variances begins alike; the file says which modalities it has.
    table.obsm["X_clue_var"] = z
    table.uns["clue_dist"] = {"modalities": ["rna", "adt"]}
    table.write_h5ad(tmp_path / "o.h5ad")
    assert set(read_profiles(tmp_path / "o.h5ad").alone.modality) == {"adt", "rna"}
    del table.obsm["X_clue_var"]
    del table.obsm["X_clue_rna"], table.obsm["X_clue_adt"]
    table.write_h5ad(tmp_path / "joint.h5ad")
    embedded = read_profiles(tmp_path / "joint.h5ad")
    assert embedded.alone is None
    assert embedded.joint.modality.tolist() == [ALL_OBSERVED] * 6


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
    drawn = figures.draw_panels(list_panels(frame)["batches"])
    assert figures.render_png(drawn).startswith(b"\x89PNG")


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
    resource.setrlimit(resource.RLIMIT_FSIZE, (15_000, limit[1]))
    try:
        with pytest.raises(StoreError, match="the disk is full or refuses to be written"):
            write_report(run, embedding)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    assert read_folder(page.parent) == before
    write_report(run)
    assert set(read_folder(page.parent)) == set(before)
    assert sorted(path.name for path in run.iterdir()) == ["config.json", "metrics.jsonl", "report"]


def test_scores_of_training_cells_are_called_so(run, tmp_path):
    scores = tmp_path / "scores.json"
    for seen in (False, True):
        scores.write_text(json.dumps(SCORES | {"about": {"seen_in_training": seen}}))
        text = write_report(run, scores=scores).read_text()
        assert ("The model was trained on this store" in text) == seen


def test_scores_without_pairs_say_so_and_have_no_table_of_matching(run, tmp_path):
    scores = tmp_path / "scores.json"
    joint = {"cells": 90, "store_cells": 90, "accuracy": 0.875}
    scores.write_text(json.dumps({"joint": joint, "about": {"has_pairs": False}}))
    text = write_report(run, scores=scores).read_text()
    assert "matching is left out" in text
    assert "0.8750" in text
    assert "<th>among</th>" not in text


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
    for text in ('{"rna->adt": {}}', "[1]", '{"run": "atlas"}'):
        (tmp_path / "bad.json").write_text(text)
        with pytest.raises(ConfigError, match="scores cannot be read"):
            write_report(run, scores=tmp_path / "bad.json")
