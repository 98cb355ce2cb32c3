"""A report in wandb: its tables, pictures and page, in the wandb run that training logged to."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from clue_dist.checkpoint.kept_config import load_kept_config
from clue_dist.checkpoint.wandb_run import open_wandb_run
from clue_dist.errors import ConfigError
from clue_dist.inference.report.page import Section, read_sections
from clue_dist.inference.report.panels import read_metrics
from clue_dist.inference.score_tables import (
    JOINT_SCORES,
    JOINT_TITLES,
    list_mixing_rows,
    list_score_rows,
)
from clue_dist.metrics.matching import METRICS

# Columns and rows.
TableContent = tuple[list[str], list[list[Any]]]


def log_report(run_folder: Path, page: Path) -> None:
    """Log a report to the wandb run of its run: tables, pictures and the page itself.

    Args:
        run_folder: the run folder.
        page: what `write_report` returned.

    Raises:
        ConfigError: the run does not log to wandb, or wandb cannot record.
    """
    import wandb

    log = load_kept_config(run_folder).log
    where = f"--run {run_folder}"
    if log.wandb == "disabled":
        fix = "leave --wandb out, or set log.wandb in its config.json"
        raise ConfigError("the run does not log to wandb", where=where, fix=fix)
    metrics, _ = read_metrics(run_folder / "metrics.jsonl")
    step = int(metrics["step"].max()) if len(metrics) else 0
    sections = read_sections(page)
    try:
        run = open_wandb_run(run_folder, log)
        tables = {
            f"report/{name}": wandb.Table(columns=columns, data=rows)
            for name, (columns, rows) in build_tables(sections).items()
        }
        pictures = {
            f"report/{picture.stem}": wandb.Image(str(picture))
            for picture in sorted(page.parent.glob("*.png"))
        }
        text = page.read_text(encoding="utf-8")
        run.log({**tables, **pictures, "report/page": wandb.Html(text, inject=False)}, step=step)
        run.summary.update(list_summary(sections))
        run.finish()
    except wandb.Error as error:
        fix = "leave --wandb out; the page is written"
        raise ConfigError(
            "wandb does not take the report", where=where, got=error, fix=fix
        ) from error


def build_tables(sections: Mapping[str, Section]) -> dict[str, TableContent]:
    """Build the tables of a report by name: matching, mixing and labels."""
    scores = sections.get("scores", {})
    tables: dict[str, TableContent] = {}
    matching = [
        [pair, scope, n_cells, *(value for value, _ in row.values())]
        for pair, scope, n_cells, row in list_score_rows(scores)
    ]
    tables["matching"] = ["pair", "among", "cells", *METRICS], matching
    mixing = [[pair, n_cells, *numbers] for pair, n_cells, numbers in list_mixing_rows(scores)]
    tables["mixing"] = ["pair", "cells", "mixing", "ilisi", "label transfer"], mixing
    labels = [
        [found["queries"], found["keys"], true_label, label, found["counts"][i][j]]
        for found in sections.get("embedding", {}).get("confusions", [])
        for i, true_label in enumerate(found["labels"])
        for j, label in enumerate(found["labels"])
        if found["counts"][i][j]
    ]
    tables["labels"] = ["cells of", "neighbours of", "label", "called", "cells"], labels
    return {name: (columns, rows) for name, (columns, rows) in tables.items() if rows}


def list_summary(sections: Mapping[str, Section]) -> dict[str, float]:
    """List the scores that wandb compares runs by: of each pair, and of the joint z."""
    scores = sections.get("scores", {})
    summary = {
        f"test/{metric}/{pair}": value
        for pair, scope, _, row in list_score_rows(scores)
        if scope == "global" and "->" not in pair
        for metric, (value, _) in row.items()
        if value is not None
    }
    summary |= {
        f"test/mixing/{pair}": mixing
        for pair, _, (mixing, *_) in list_mixing_rows(scores)
        if mixing is not None
    }
    joint = scores.get(JOINT_SCORES) or {}
    known = {name: joint[name] for name in JOINT_TITLES if joint.get(name) is not None}
    return summary | {f"test/joint/{name}": value for name, value in known.items()}
