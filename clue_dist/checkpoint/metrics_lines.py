"""The lines of metrics.jsonl. What can be read of the file is read, whatever else stands in it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple


class MetricsLine(NamedTuple):
    """One line of metrics.jsonl."""

    text: bytes  # without its newline
    row: dict[str, Any] | None  # what was logged; None where the line cannot be read

    def is_until(self, step: int) -> bool:
        """Whether the line can be read and belongs to `step` or to a step before it."""
        return self.row is not None and self.row["step"] <= step


def read_metrics_lines(path: Path) -> list[MetricsLine]:
    """Read metrics.jsonl, a line for each row; a file that is missing has none."""
    # Split as bytes: a byte that is not UTF-8 spoils its own line alone.
    lines = path.read_bytes().split(b"\n") if path.is_file() else []
    return [MetricsLine(line, _parse_row(line)) for line in lines if line.strip()]


def find_validation(path: Path, step: int | None) -> dict[str, Any]:
    """Find what validation measured at a step, the last time; nothing where it was not logged."""
    rows = [line.row for line in read_metrics_lines(path) if line.row is not None]
    found = [row for row in rows if row.get("split") == "validation" and row["step"] == step]
    return found[-1] if found else {}


def _parse_row(line: bytes) -> dict[str, Any] | None:
    """What a line holds, if it is a JSON object that names a step."""
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):  # errors of JSON and of UTF-8 are ValueErrors
        return None
    return row if isinstance(row, dict) and type(row.get("step")) is int else None
