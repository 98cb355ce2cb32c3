"""What a run folder says of itself: which weights it keeps and why, and how it came about."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from clue_dist.checkpoint.attempts import TrainingAttempt, read_attempts
from clue_dist.checkpoint.model_card import ModelCard, find_model_card
from clue_dist.checkpoint.run_folder import list_checkpoints, name_checkpoint, parse_step
from clue_dist.errors import format_count
from clue_dist.inference.report.panels import split_quantity

Fact = tuple[str, str]  # what it is called, and what it is
_HEADLINES = (
    ("foscttm", "held-out FOSCTTM"),
    ("mixing", "held-out mixing"),
    ("accuracy", "held-out label accuracy"),
    ("islands", "worst island"),
)


@dataclass(frozen=True)
class RunFacts:
    """What a run folder holds, beside its metrics."""

    name: str
    config: dict[str, Any]  # empty where config.json is damaged
    config_text: str
    card: ModelCard | None  # None where model.json is missing or damaged
    attempts: list[TrainingAttempt]  # none of a run of an earlier version
    best_steps: list[int]  # steps of the weights in RUN/best, the newest first


def read_run_facts(run: Path) -> RunFacts:
    """Read what a run folder holds; a file that is missing or damaged is left out."""
    text = (run / "config.json").read_text(encoding="utf-8", errors="replace")
    try:
        config = json.loads(text)
    except ValueError:
        config = {}
    return RunFacts(
        name=run.resolve().name,  # a run may be typed as `.`
        config=config if isinstance(config, dict) else {},
        config_text=text,
        card=find_model_card(run),
        attempts=read_attempts(run),
        best_steps=[parse_step(path) for path in list_checkpoints(run / "best")],
    )


def describe_weights(metrics: pd.DataFrame, facts: RunFacts) -> list[str]:
    """Say in sentences which weights a run keeps, and why these."""
    choice = _find_choice(metrics)
    folder = f"best/{name_checkpoint(facts.best_steps[0])}" if facts.best_steps else ""
    if choice is None:
        if not folder:
            return ["No weights are kept yet."]
        reason = "no validation scored cells, so they are the last that validation saved."
        if metrics.empty:  # of a folder that was shared without its log
            reason = "metrics.jsonl, which would say why these are kept, is not here."
        return [f"{folder} holds the weights of step {facts.best_steps[0]:,}: {reason}"]
    validations, step = choice
    kept = validations[validations["step"] == step]
    score = None if kept.empty else float(kept["score"].iloc[-1])
    lowest = validations.iloc[int(validations["score"].argmin())]
    measure = _name_score(metrics)
    if score is not None and score <= lowest["score"]:
        sentences = [
            f"The weights of step {step:,} are kept: their validation score, {score:.4f}, is the "
            f"lowest of {len(validations)} validations."
        ]
    else:
        sentences = [
            f"The weights of step {step:,} are kept{_compare_scores(kept, lowest)}. Of weights "
            "whose score is not above the lowest by more than two standard errors of the "
            "difference, the latest are kept."
        ]
    sentences.append(f"The score is {measure}; lower is better.")
    if folder and facts.best_steps[0] != step:
        sentences.append(f"But the folder holds {folder}: it is of another moment than the log.")
    return sentences


def _compare_scores(kept: pd.DataFrame, lowest: pd.Series) -> str:
    """How far the score of the kept weights is above the lowest, as the rest of a sentence."""
    if kept.empty:
        return ""
    row = kept.iloc[-1]
    error = f", with a standard error of {row['error']:.2g}" if row.get("error", 0) > 0 else ""
    return (
        f": their validation score, {row['score']:.4f}, is {row['score'] - lowest['score']:.2g} "
        f"above the lowest, of step {int(lowest['step']):,}{error}"
    )


def list_headlines(metrics: pd.DataFrame) -> list[Fact]:
    """List the held-out scores of the weights that are kept, means over pairs of modalities."""
    choice = _find_choice(metrics)
    if choice is None:
        return []
    validations, step = choice
    row = validations[validations["step"] == step].dropna(axis=1)
    headlines = [("step of the kept weights", f"{step:,}")]
    for quantity, title in _HEADLINES:
        columns = [name for name in row if split_quantity(str(name))[0] == quantity]
        if columns and len(row):
            headlines.append((title, f"{row[columns].iloc[-1].mean():.4f}"))
    return headlines


def find_kept_step(metrics: pd.DataFrame, facts: RunFacts) -> int | None:
    """Find the step of the weights that are kept; None where there are none."""
    choice = _find_choice(metrics)
    return choice[1] if choice else next(iter(facts.best_steps), None)


def list_store_facts(facts: RunFacts) -> list[Fact]:
    """List what the run was trained on."""
    listed: list[Fact] = [("store", str(facts.config.get("store", "unknown")))]
    if facts.card is not None:
        listed.append(("fingerprint", facts.card.fingerprint))
        listed += [
            (f"modality {name}", f"{format_count(modality.n_features, 'feature')}, {modality.kind}")
            for name, modality in facts.card.modalities.items()
        ]
        listed.append(("biological batches", f"{len(facts.card.batches):,}"))
        for covariate in facts.card.batch_covariates:
            levels = facts.card.batch_vocabulary.list_levels(covariate)
            listed.append((f"levels of {covariate}", f"{len(levels):,}"))
    for attempt in facts.attempts[-1:]:
        sizes = attempt.train_cells
        listed += [
            (f"cells of {name}", f"{n_cells:,} trained on, {held_out:,} held out")
            for name, n_cells in sizes.items()
            for held_out in [attempt.held_out_cells.get(name, 0)]
        ]
    return listed


def list_training_facts(metrics: pd.DataFrame, facts: RunFacts) -> list[Fact]:
    """List how the run was trained: each start with its command, versions and machine."""
    listed: list[Fact] = []
    if len(metrics):
        done = f"{int(metrics['step'].max()):,}"
        total = f" of {facts.attempts[-1].total_steps:,}" if facts.attempts else ""
        listed.append(("logged steps", done + total))
    if "epoch" in metrics and metrics["epoch"].notna().any():
        listed.append(("epochs", f"{metrics['epoch'].max():.4g}"))
    if not facts.attempts:
        reason = "not recorded: the run is of an earlier version of clue_dist"
        return [*listed, ("command and versions", reason)]
    for attempt in facts.attempts:
        ranks = f"{format_count(attempt.ranks, 'rank')} ({attempt.device})"
        began = "began" if attempt.step == 0 else f"went on from step {attempt.step:,}"
        listed.append((f"{began} {attempt.time}", f"{attempt.command}; {ranks} on {attempt.host}"))
    versions = facts.attempts[-1].versions
    listed.append(("versions", ", ".join(f"{name} {text}" for name, text in versions.items())))
    return listed


def list_events(metrics: pd.DataFrame) -> list[Fact]:
    """List what seldom happens, by step."""
    if "event" not in metrics:
        return []
    events = metrics[metrics["split"] == "event"]
    listed = []
    for _, row in events.iterrows():
        details = row.drop(["step", "split", "event"]).dropna()
        text = ", ".join(f"{name} {value}" for name, value in details.items())
        listed.append((f"step {int(row['step']):,}", f"{row['event']}: {text}".rstrip(": ")))
    return listed


def _find_choice(metrics: pd.DataFrame) -> tuple[pd.DataFrame, int] | None:
    """The validations with a score, and the step of the weights that the last one kept."""
    if "best_step" not in metrics or "score" not in metrics:
        return None
    scored = metrics[metrics["split"] == "validation"].dropna(subset=["score", "best_step"])
    return None if scored.empty else (scored, int(scored["best_step"].iloc[-1]))


def _name_score(metrics: pd.DataFrame) -> str:
    """What the validation score is: of a run with pairs, or of one without."""
    if any(split_quantity(str(name))[0] == "foscttm" for name in metrics):
        return "FOSCTTM of held-out cells, the mean over pairs of modalities"
    return "minus the ELBOs of a held-out cell, by their weights in the loss"
