"""The report is one page that needs nothing outside itself, and is replaced as a whole."""

from __future__ import annotations

import json
import re
import resource
import shutil
import subprocess
import threading
from pathlib import Path

import pytest

from clue_dist.errors import ConfigError, StoreError
from clue_dist.inference.report import layouts, write_report
from tests.unit.report_helpers import SCORES, read_json, read_sections

pytestmark = pytest.mark.usefixtures("quick_pictures")


def test_page_is_whole_and_stands_alone(logged_run, embedding_file, tmp_path):
    scores = tmp_path / "scores.json"
    scores.write_text(json.dumps(SCORES))
    page = write_report(logged_run, embedding_file, scores)
    assert page == logged_run / "report" / "index.html"
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


def test_sections_stay_when_others_are_added(logged_run, embedding_file, tmp_path):
    scores = tmp_path / "scores.json"
    scores.write_text(json.dumps(SCORES))
    first = write_report(logged_run, embedding_file).read_text()
    assert "matching" not in read_sections(first)
    embedding_file.unlink()
    both = write_report(logged_run, scores=scores).read_text()
    assert {"embedding", "confusion", "matching"} <= set(read_sections(both))
    kept, before = (read_json(text, "kept")["sections"] for text in (both, first))
    assert kept["embedding"] == before["embedding"]
    scores.unlink()
    page = write_report(logged_run)
    assert page.read_text() == both  # nothing is new, so that nothing changes
    assert (page.parent / "umap_joint_z_batch.png").exists()
    page.write_text(both.replace('"format":1', '"format":2'))  # of a later version
    assert "matching" not in read_sections(write_report(logged_run).read_text())
    page.write_text(both.replace('"scores":', '"scores'))  # somebody has edited it
    assert "matching" not in read_sections(write_report(logged_run).read_text())


def test_sections_of_other_weights_say_so(logged_run, embedding_file, tmp_path):
    assert "Of other weights" not in write_report(logged_run, embedding_file).read_text()
    scores = tmp_path / "scores.json"
    scores.write_text(json.dumps(SCORES | {"about": {"checkpoint": "step-00000040"}}))
    text = write_report(logged_run, scores=scores).read_text()
    assert text.count("Of other weights") == 1
    assert "made with step-00000040, while the run keeps step 80 now" in text


def test_progress_is_announced(logged_run, embedding_file, capsys):
    write_report(logged_run, embedding_file)
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


CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="Chromium is not installed")
def test_a_browser_draws_every_panel_and_fits_a_phone(logged_run, embedding_file, tmp_path):
    page = write_report(logged_run, embedding_file)
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


def test_a_run_without_metrics_has_a_report_too(logged_run):
    (logged_run / "metrics.jsonl").unlink()
    assert "Nothing was logged" in write_report(logged_run).read_text()


def read_folder(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_a_report_is_replaced_as_a_whole_or_not_at_all(logged_run, embedding_file, tmp_path):
    page = write_report(logged_run, embedding_file)
    before = read_folder(page.parent)
    (logged_run / "metrics.jsonl").write_text(
        '{"step": 1, "loss": 3.0}\n{"step": 2, "loss": 1.0}\n'
    )
    (tmp_path / "bad.json").write_text("{")
    with pytest.raises(ConfigError, match="scores cannot be read"):
        write_report(logged_run, embedding_file, tmp_path / "bad.json")
    assert read_folder(page.parent) == before
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (15_000, limit[1]))
    try:
        with pytest.raises(StoreError, match="the disk is full or refuses to be written"):
            write_report(logged_run, embedding_file)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    assert read_folder(page.parent) == before
    write_report(logged_run)
    assert set(read_folder(page.parent)) == set(before)
    assert sorted(path.name for path in logged_run.iterdir()) == [
        "config.json",
        "metrics.jsonl",
        "report",
    ]


def test_a_run_is_called_by_its_name_wherever_it_is_typed(logged_run, monkeypatch):
    monkeypatch.chdir(logged_run)
    assert "<h1>demo</h1>" in write_report(Path(".")).read_text()


def test_what_is_not_there_is_said(logged_run, tmp_path):
    with pytest.raises(ConfigError, match="no run here"):
        write_report(tmp_path / "nowhere")
    (tmp_path / "store.zarr").mkdir()
    with pytest.raises(ConfigError, match=r"no run here[\s\S]*no config\.json"):
        write_report(tmp_path / "store.zarr")
    assert list((tmp_path / "store.zarr").iterdir()) == []
    with pytest.raises(ConfigError, match="no embedding here"):
        write_report(logged_run, tmp_path / "nowhere.h5mu")
    for ending in ("h5mu", "h5ad", "zarr"):
        (tmp_path / f"text.{ending}").write_text("no HDF5")
        with pytest.raises(ConfigError, match="embedding cannot be read"):
            write_report(logged_run, tmp_path / f"text.{ending}")
    for text in ('{"rna->adt": {}}', "[1]", '{"run": "atlas"}'):
        (tmp_path / "bad.json").write_text(text)
        with pytest.raises(ConfigError, match="scores cannot be read"):
            write_report(logged_run, scores=tmp_path / "bad.json")
