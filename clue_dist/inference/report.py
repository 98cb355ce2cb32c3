"""One page about a run: its losses, its embedding, how well modalities match, its config.

RUN/report/index.html holds everything inside itself; the figures lie beside it as PNG files, too.
"""

from __future__ import annotations

import base64
import html
import json
import tempfile
from pathlib import Path

import pandas as pd
from matplotlib.figure import Figure

from clue_dist.errors import ConfigError
from clue_dist.inference.figures import (
    compute_umap,
    draw_curves,
    draw_scatter,
    list_curves,
    render_png,
)
from clue_dist.inference.output_files import translate_output_errors
from clue_dist.inference.profiles import ALL_OBSERVED, UNKNOWN, read_metrics, read_profiles
from clue_dist.inference.score_tables import (
    SEEN,
    SEEN_WARNING,
    Comparison,
    format_score,
    list_rows,
    list_space_facts,
    select_pairs,
)
from clue_dist.matching import METRICS

_TITLES = {"foscttm": "FOSCTTM ↓", "match": "match ↑", "recall10": "recall at 10 ↑"}
_MUTED = "<p class='muted'>{}</p>"
_PAGE_FILE = "index.html"
# Figures by name, as PNG. Nothing is written until all of them are there.
Figures = dict[str, bytes]


def write_report(run: Path, embedding: Path | None = None, scores: Path | None = None) -> Path:
    """Write RUN/report/index.html and its figures.

    Args:
        run: folder of the run.
        embedding: an output of `launch/embed.py`, of which a UMAP is shown.
        scores: an output of `launch/evaluate.py`, shown as a table.

    Returns:
        The page.

    Raises:
        ConfigError: no such run, embedding or scores, or a file that is not one.
        StoreError: the report cannot be written; an earlier one stays as it is.
    """
    if not (run / "config.json").is_file():
        fix = "train one with launch/train.py, or mend the path"
        raise ConfigError("no run here", where=f"--run {run}", got="no config.json", fix=fix)
    figures: Figures = {}
    sections = [_describe_training(run, figures)]
    if embedding is not None:
        sections.append(_show_embedding(embedding, figures))
    if scores is not None:
        sections.append(_tabulate_scores(scores))
    sections.append(_show_config(run))
    title = html.escape(run.resolve().name)  # a run may be typed as `.`
    text = _PAGE.format(title=title, sections="\n".join(sections))
    folder = run / "report"
    with translate_output_errors(folder):
        _replace_files(folder, figures, text)
    return folder / _PAGE_FILE


def _replace_files(folder: Path, figures: Figures, text: str) -> None:
    """Put a page and its figures into the place of those of an earlier report.

    They are renamed into place once all of them are on the disk: where it is full, nothing changes.
    """
    with tempfile.TemporaryDirectory(prefix=".report-", dir=folder.parent) as temporary:
        names = [f"{name}.png" for name in figures]
        for name, png in zip(names, figures.values(), strict=True):
            Path(temporary, name).write_bytes(png)
        Path(temporary, _PAGE_FILE).write_text(text, encoding="utf-8")
        folder.mkdir(exist_ok=True)
        for earlier in folder.glob("umap_*.png"):
            if earlier.name not in names:
                earlier.unlink()
        for name in [*names, _PAGE_FILE]:
            Path(temporary, name).replace(folder / name)


def _describe_training(run: Path, figures: Figures) -> str:
    metrics, n_unreadable = read_metrics(run / "metrics.jsonl")
    if not list_curves(metrics):
        return "<h2>Training</h2>" + _MUTED.format("Nothing was logged.")
    facts = [f"{int(metrics['step'].max()):,} steps"]
    if "epoch" in metrics:
        facts.append(f"{metrics['epoch'].max():.4g} epochs")
    facts += _list_choice_facts(metrics)
    if n_unreadable:
        facts.append(f"{n_unreadable} unreadable lines of metrics.jsonl left out")
    text = _MUTED.format("; ".join(facts) + ".")
    return f"<h2>Training</h2>{text}" + _show_figure(figures, "curves", draw_curves(metrics))


def _list_choice_facts(metrics: pd.DataFrame) -> list[str]:
    """Which weights are kept, with their validation score and the lowest one."""
    if "best_step" not in metrics or "score" not in metrics:
        return []
    validations = metrics[metrics["split"] == "validation"].dropna(subset=["score", "best_step"])
    if validations.empty:
        return []
    best_step = int(validations["best_step"].iloc[-1])
    kept = validations.loc[validations["step"] == best_step, "score"]
    score = "" if kept.empty else f", of validation score {kept.iloc[-1]:.4f}"
    lowest = validations.iloc[int(validations["score"].argmin())]
    return [
        f"kept are the weights of step {best_step:,}{score}",
        f"lowest validation score {lowest['score']:.4f} at step {int(lowest['step']):,}",
    ]


def _show_embedding(embedding: Path, figures: Figures) -> str:
    profiles = read_profiles(embedding)
    points = compute_umap(profiles.z)
    joint = (profiles.modality == ALL_OBSERVED).all()
    source = "everything observed in it" if joint else "one modality alone"
    text = (
        f"UMAP of {len(points):,} profiles of {html.escape(embedding.name)}, "
        f"each a cell seen through {source}, scaled to length 1."
    )
    images = [
        _show_figure(figures, f"umap_{column}", draw_scatter(points, names, title))
        for column, title in (
            ("modality", "modality"),
            ("batch", "batch"),
            ("cell_type", "cell type"),
        )
        if ((names := getattr(profiles, column)) != UNKNOWN).any()
    ]
    return f"<h2>Embedding</h2>{_MUTED.format(text)}<div class='row'>{''.join(images)}</div>"


def _tabulate_scores(path: Path) -> str:
    try:
        scores = json.loads(path.read_text(encoding="utf-8"))
        rows = [
            _format_row(pair, *row)
            for pair, entry in select_pairs(scores).items()
            for row in list_rows(entry)
        ]
        facts = list_space_facts(scores)
        is_seen = scores.get("about", {}).get(SEEN)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        fix = "make them with launch/evaluate.py"
        raise ConfigError(
            "the scores cannot be read", where=f"--scores {path}", got=error, fix=fix
        ) from None
    head = "".join(f"<th>{_TITLES[metric]}</th><th class='muted'>chance</th>" for metric in METRICS)
    text = (
        "Each cell seen through one modality looks for itself in the other; "
        "both directions averaged."
    )
    warning = f"<p><strong>{html.escape(SEEN_WARNING)}</strong></p>" if is_seen else ""
    mixing = "".join(f"<p>{html.escape(fact)}.</p>" for fact in facts)
    space = f"<h2>One space</h2>{mixing}" if facts else ""
    return f"""<h2>Matching</h2>
{_MUTED.format(text)}
<table><tr><th>pair</th><th>among</th><th>cells</th>{head}</tr>
{"".join(rows)}</table>
{warning}
{space}"""


def _format_row(pair: str, scope: str, n_cells: int, scores: dict[str, Comparison]) -> str:
    cells = [pair.replace("->", " → "), scope.replace("_", " "), f"{n_cells:,}"]
    text = "".join(f"<td>{html.escape(cell)}</td>" for cell in cells)
    numbers = "".join(
        f"<td>{format_score(value, '')}</td><td class='muted'>{format_score(chance, '')}</td>"
        for value, chance in scores.values()
    )
    return f"<tr>{text}{numbers}</tr>\n"


def _show_config(run: Path) -> str:
    text = html.escape((run / "config.json").read_text(encoding="utf-8", errors="replace"))
    summary = "<summary>resolved config</summary>"
    return f"<h2>Config</h2><details>{summary}<pre>{text}</pre></details>"


def _show_figure(figures: Figures, name: str, figure: Figure) -> str:
    """Render a figure into `figures`; returns the element that shows it."""
    figures[name] = render_png(figure)
    data = base64.b64encode(figures[name]).decode()
    width = int(figure.get_figwidth() * 100)
    return f"<img alt='{name}' style='width:{width}px' src='data:image/png;base64,{data}'>"


_PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>{title}</title><style>
body {{ font: 15px/1.5 system-ui, sans-serif; color: #2b2f36; max-width: 1180px }}
body {{ margin: 2.5rem auto; padding: 0 1.5rem }}
h1 {{ font-weight: 600; margin-bottom: 0 }}
h2 {{ font-weight: 600; font-size: 1.15rem; margin-top: 2.5rem }}
.muted {{ color: #7d8790 }}
img {{ max-width: 100% }}
.row {{ display: flex; flex-wrap: wrap; gap: 1rem }}
table {{ border-collapse: collapse; font-variant-numeric: tabular-nums }}
th, td {{ text-align: right; padding: .3rem .8rem; border-bottom: 1px solid #eceef1 }}
th {{ font-weight: 600 }}
th:nth-child(-n+2), td:nth-child(-n+2) {{ text-align: left }}
pre {{ background: #f6f7f9; padding: 1rem; overflow-x: auto; font-size: 13px }}
</style></head><body><h1>{title}</h1>
{sections}
</body></html>
"""
