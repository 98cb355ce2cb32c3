"""The lines on the screen: the few numbers that a person watches, in at most LINE_COLUMNS columns.

docs/training.md explains their words; metrics.jsonl holds all numbers.
"""

from __future__ import annotations

import textwrap
from collections.abc import Mapping

LINE_COLUMNS = 100

# What is shown of a training line, the most important first.
_TRAINING_NUMBERS = ("loss", "epoch", "cells_per_s", "data_wait", "lr", "saving_wait")

Numbers = Mapping[str, float | int | str]


def format_log_line(
    split: str, step: int, total_steps: int, numbers: Numbers, seconds_left: float | None = None
) -> str:
    """Format what is logged of a step for the screen.

    Args:
        split: "train", "validation" or "event".
        step: the optimizer step that the numbers belong to.
        total_steps: optimizer steps until training is done.
        numbers: by name.
        seconds_left: until training is done, if that is to be said.

    Returns:
        One line, of the most important numbers that fit; of an event all, on further lines, too.
    """
    head = f"[{step}/{total_steps}] {split:<10}"
    if split == "event":
        event, *facts = (str(value) for value in _list_facts(numbers))
        text = " ".join(f"{head} {event}: {', '.join(facts)}".split())
        return textwrap.fill(text, LINE_COLUMNS, subsequent_indent="  ", break_on_hyphens=False)
    shown = _list_choice(numbers) if split == "validation" else _list_training(numbers)
    tail = "" if seconds_left is None else f"  left {format_duration(seconds_left)}"
    line = head
    for part in shown:
        if len(f"{line}  {part}{tail}") > LINE_COLUMNS:
            break
        line += f"  {part}"
    return line + tail


def format_value(value: float | int | str) -> str:
    """Format a number for the screen, where four digits are enough."""
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def format_duration(seconds: float) -> str:
    """Format a duration in hours, minutes and seconds, as 1:02:03."""
    minutes, rest = divmod(int(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02d}:{rest:02d}"


def _list_training(numbers: Numbers) -> list[str]:
    """What a training line shows; the loss is missing where all its steps were skipped."""
    return [
        f"{name} {format_value(numbers[name])}" for name in _TRAINING_NUMBERS if name in numbers
    ]


def _list_choice(numbers: Numbers) -> list[str]:
    """The score, the weights that are kept with theirs, and the lowest score with its step."""
    shown = [f"score {format_value(numbers['score'])}"] if "score" in numbers else []
    for word, kind in (("kept", "best"), ("lowest", "lowest")):
        score, step = numbers.get(f"{kind}_score"), numbers.get(f"{kind}_step")
        if score is not None:
            shown.append(f"{word} {format_value(score)} of step {step}")
    return shown


def _list_facts(numbers: Numbers) -> list[str]:
    """The event itself, then what belongs to it."""
    facts = [f"{name} {format_value(value)}" for name, value in numbers.items() if name != "event"]
    return [str(numbers["event"]), *facts]
