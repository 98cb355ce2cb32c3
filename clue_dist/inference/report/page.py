"""One page about a run, RUN/report/index.html, which holds everything that it shows.

Sections that an embedding or scores gave stay when the page is written again without them: their
data lie in the page. The pictures lie beside it as PNG files, too.
"""

from __future__ import annotations

import json
import re
import tempfile
from dataclasses import asdict
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from clue_dist.errors import ConfigError, name_argument
from clue_dist.inference.output_files import translate_output_errors
from clue_dist.inference.report.facts import (
    RunFacts,
    describe_weights,
    find_kept_step,
    list_events,
    list_headlines,
    list_store_facts,
    list_training_facts,
    read_run_facts,
)
from clue_dist.inference.report.figures import PALETTE, draw_panels, draw_scatter, render_png
from clue_dist.inference.report.imputation import compare_imputation
from clue_dist.inference.report.layouts import (
    announce_progress,
    compute_layouts,
    list_confusions,
)
from clue_dist.inference.report.panels import list_panels, read_metrics
from clue_dist.inference.report.profiles import UNKNOWN, Profiles, read_profiles
from clue_dist.inference.score_tables import (
    JOINT_SCORES,
    format_score,
    list_joint_scores,
    list_mixing_rows,
    list_score_rows,
    list_warnings,
    read_scores,
)
from clue_dist.metrics.matching import METRICS

PAGE_FILE = "index.html"
FORMAT = 1  # of the sections that a page keeps; those of another format are left out
METRIC_TITLES = {"foscttm": "FOSCTTM ↓", "match": "match ↑", "recall10": "recall at 10 ↑"}
_KEPT_SECTIONS = re.compile(r'<script type="application/json" id="kept">(.*?)</script>', re.DOTALL)
Figures = dict[str, bytes]  # PNG by name; nothing is written until all of them are there
Section = dict[str, Any]  # what the page needs of an embedding or of scores, as JSON


def write_report(
    run: Path,
    embedding: Path | None = None,
    scores: Path | None = None,
    imputed: Path | None = None,
    truth: str | None = None,
) -> Path:
    """Write RUN/report/index.html and its figures.

    Args:
        run: folder of the run.
        embedding: an output of `clue embed`: UMAPs, and how labels pass between modalities.
        scores: an output of `clue evaluate`, shown as tables.
        imputed: an output of `clue impute`, compared with `truth`.
        truth: the store that holds the counts of the same cells.

    Returns:
        The page. Sections of an earlier page stay where this call gives no other input for them.

    Raises:
        ConfigError: no such run, embedding or scores, or a file that is not one.
        StoreError: the report cannot be written; an earlier one stays as it is.
    """
    if not (run / "config.json").is_file():
        fix = "train one with `clue train`, or mend the path"
        raise ConfigError("no run here", where=f"--run {run}", got="no config.json", fix=fix)
    if (imputed is None) != (truth is None):
        what = "imputed values are compared with the counts of a store"
        raise ConfigError(
            what,
            where=" and ".join(map(name_argument, ("imputed", "truth"))),
            fix="give both, or neither",
        )
    # What can be refused comes before what takes minutes, and nothing is written before the end.
    folder, figures, facts = run / "report", Figures(), read_run_facts(run)
    sections = read_sections(folder / PAGE_FILE)
    if scores is not None:
        sections["scores"] = read_scores(scores) | {"file": scores.name}
    if embedding is not None:
        sections["embedding"] = _build_embedding(embedding, figures)
    if imputed is not None and truth is not None:
        seen_cells = frozenset() if facts.card is None else facts.card.identities
        with announce_progress(f"comparing {imputed.name} with {truth}"):
            sections["imputation"] = compare_imputation(imputed, truth, seen_cells)
    metrics, n_unreadable = read_metrics(run / "metrics.jsonl")
    panels = list_panels(metrics)
    with announce_progress("drawing the curves"):
        shown = panels["scores"] + panels["losses"]
        if shown:
            figures["curves"] = render_png(draw_panels(shown))
    text = _render_page(facts, metrics, n_unreadable, sections)
    with translate_output_errors(folder):
        _replace_files(folder, figures, text, replaces_layouts=embedding is not None)
    return folder / PAGE_FILE


def read_sections(page: Path) -> dict[str, Section]:
    """Read the sections that lie in a page as data; none of a page of an earlier version."""
    text = page.read_text(encoding="utf-8", errors="replace") if page.is_file() else ""
    found = _KEPT_SECTIONS.search(text)
    try:
        kept = json.loads(found[1]) if found else {}
    except ValueError:  # somebody has edited the page
        return {}
    is_known = isinstance(kept, dict) and kept.get("format") == FORMAT
    return dict(kept["sections"]) if is_known else {}


def _build_embedding(path: Path, figures: Figures) -> Section:
    """Lay out an embedding and draw it; labels pass from one modality to the others."""
    with announce_progress(f"reading {path.name}"):
        embedded = read_profiles(path)
    layouts = compute_layouts(embedded)
    with announce_progress("drawing the UMAPs"):
        for layout, profiles, points in layouts:
            _draw_layout(layout.title.replace(" ", "_"), profiles, points, figures)
    confusions = [] if embedded.alone is None else list_confusions(embedded.alone)
    return {
        "file": path.name,
        "cells": embedded.n_cells,
        "about": embedded.about,
        "layouts": [asdict(layout) for layout, *_ in layouts],
        "confusions": [asdict(confusion) for confusion in confusions],
    }


def _draw_layout(name: str, profiles: Profiles, points: np.ndarray, figures: Figures) -> None:
    """Draw a layout as PNG, once for each column that tells points apart."""
    for column in ("modality", "batch", "cell_type", "pattern"):
        names = getattr(profiles, column)
        if len(set(names)) > 1 and (names != UNKNOWN).any():
            title = column.replace("_", " ")
            figures[f"umap_{name}_{column}"] = render_png(draw_scatter(points, names, title))


def _render_page(
    facts: RunFacts, metrics: pd.DataFrame, n_unreadable: int, sections: dict[str, Section]
) -> str:
    panels = list_panels(metrics)
    kept_step = find_kept_step(metrics, facts)
    scores = sections.get("scores")
    curves = {
        name: [asdict(panel) for panel in group if panel.curves] for name, group in panels.items()
    }
    return _load_template().render(
        facts=facts,
        headlines=list_headlines(metrics),
        weights=describe_weights(metrics, facts),
        kept_step=kept_step,
        n_unreadable=n_unreadable,
        panels=curves,
        data=_dump_json({"panels": curves, "kept_step": kept_step, "colours": PALETTE}),
        kept=_dump_json({"format": FORMAT, "sections": sections}),
        embedding=sections.get("embedding"),
        imputation=sections.get("imputation"),
        scores=None if scores is None else _tabulate_scores(scores),
        stale={name: _name_other_weights(section, kept_step) for name, section in sections.items()},
        store_facts=list_store_facts(facts),
        training_facts=list_training_facts(metrics, facts),
        events=list_events(metrics),
    )


@cache
def _load_template() -> Any:
    environment = Environment(
        loader=PackageLoader("clue_dist.inference.report"),
        autoescape=lambda name: name is None or name.endswith(".html"),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template("report.html")


def _dump_json(value: Any) -> Markup:
    """JSON that can stand in a script element: no text in it ends the element."""
    # What is not finite would be no JSON for a browser, and the page would stay empty.
    text = json.dumps(value, separators=(",", ":"), ensure_ascii=False, allow_nan=False)
    return Markup(text.replace("<", "\\u003c"))


def _name_other_weights(section: Section, kept_step: int | None) -> str:
    """The checkpoint that a section is about, if the run keeps other weights by now."""
    checkpoint = str(section.get("about", {}).get("checkpoint", ""))
    found = re.fullmatch(r"step-(\d+)", checkpoint)
    return checkpoint if found and kept_step is not None and int(found[1]) != kept_step else ""


def _tabulate_scores(scores: Section) -> dict[str, Any]:
    """The tables of scores.json; what is symmetric stands in them once."""
    matching = [
        {
            "pair": pair.replace("->", " → "),
            "scope": scope.replace("_", " "),
            "cells": f"{n_cells:,}",
            "numbers": [
                format_score(number, "") for comparison in row.values() for number in comparison
            ],
        }
        for pair, scope, n_cells, row in list_score_rows(scores)
    ]
    mixing = [
        {
            "pair": pair,
            "cells": f"{n_cells:,}",
            "numbers": [format_score(number, "") for number in numbers],
        }
        for pair, n_cells, numbers in list_mixing_rows(scores)
    ]
    joint, about = scores.get(JOINT_SCORES) or {}, scores.get("about", {})
    return {
        "file": scores.get("file", ""),
        "cells_name": Path(str(about.get("store", ""))).name or "other cells",
        "about": about,
        "titles": [METRIC_TITLES[metric] for metric in METRICS],
        "matching": matching,
        "mixing": mixing,
        "joint": [(title, format_score(value)) for title, value in list_joint_scores(joint)],
        "joint_cells": f"{joint['cells']:,}" if "cells" in joint else "",
        "islands": sorted((joint.get("islands") or {}).items(), key=lambda item: -item[1]),
        "warnings": list_warnings(scores),
    }


def _replace_files(folder: Path, figures: Figures, text: str, *, replaces_layouts: bool) -> None:
    """Put a page and its figures into the place of those of an earlier report.

    They are renamed into place once all of them are on the disk: where it is full, nothing changes.
    """
    with tempfile.TemporaryDirectory(prefix=".report-", dir=folder.parent) as temporary:
        names = [f"{name}.png" for name in figures]
        for name, png in zip(names, figures.values(), strict=True):
            Path(temporary, name).write_bytes(png)
        Path(temporary, PAGE_FILE).write_text(text, encoding="utf-8")
        folder.mkdir(exist_ok=True)
        for earlier in folder.glob("umap_*.png") if replaces_layouts else ():
            if earlier.name not in names:
                earlier.unlink()
        for name in [*names, PAGE_FILE]:
            Path(temporary, name).replace(folder / name)
