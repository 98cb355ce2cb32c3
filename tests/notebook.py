"""Run docs/tutorial.py cell by cell, and write what it shows as a page of the documentation.

The page, docs/tutorial.md, is made by `python -m tests.notebook`, which trains the model of the
tutorial. Where that was trained before, it takes a minute.
"""

from __future__ import annotations

import ast
import io
import re
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib
import matplotlib.pyplot as plt

DOCS = Path(__file__).resolve().parents[1] / "docs"
TUTORIAL = DOCS / "tutorial.py"
PAGE = DOCS / "tutorial.md"
FIGURES = DOCS / "tutorial"
LONGEST_OUTPUT = 24  # lines; of more the first and the last are shown
_MARK = re.compile(r"^# %%(.*)\n", re.MULTILINE)  # where a cell begins, in jupytext's format


@dataclass(frozen=True)
class NotebookCell:
    """Markdown or code, without the marks of the format."""

    text: str
    is_code: bool


@dataclass(frozen=True)
class CellOutput:
    """What a notebook would show below a cell."""

    text: str = ""
    figures: tuple[bytes, ...] = ()  # PNG


def read_notebook(path: Path) -> list[NotebookCell]:
    """Read the cells of a script in jupytext's percent format."""
    _, *parts = _MARK.split(path.read_text())
    cells = []
    for mark, body in zip(parts[::2], parts[1::2], strict=True):
        is_code = "[markdown]" not in mark
        text = body if is_code else re.sub(r"^# ?", "", body, flags=re.MULTILINE)
        cells.append(NotebookCell(text.strip(), is_code))
    return cells


def run_notebook(
    cells: Sequence[NotebookCell], names: dict[str, Any]
) -> Iterator[tuple[NotebookCell, CellOutput]]:
    """Run cells one after the other, with what each shows.

    Args:
        cells: the cells.
        names: gets the variables that they set.
    """
    matplotlib.use("Agg")
    for cell in cells:
        yield cell, _run_cell(cell, names) if cell.is_code else CellOutput()


def _run_cell(cell: NotebookCell, names: dict[str, Any]) -> CellOutput:
    """Run a cell of code: its last value is shown, as what it prints and the figures it draws."""
    statements = ast.parse(cell.text).body
    shown = None
    if isinstance(statements[-1], ast.Expr):
        shown = ast.Expression(statements.pop().value)
    printed = io.StringIO()
    with redirect_stdout(printed):
        exec(compile(ast.Module(statements, []), "tutorial", "exec"), names)
        value = None if shown is None else eval(compile(shown, "tutorial", "eval"), names)
        if value is not None:
            print(repr(value))
    figures = []
    for number in plt.get_fignums():
        picture = io.BytesIO()
        plt.figure(number).savefig(picture, dpi=110, metadata={"Software": None})
        figures.append(picture.getvalue())
    plt.close("all")
    return CellOutput(printed.getvalue().rstrip(), tuple(figures))


def shorten_output(text: str) -> str:
    """Leave out the middle of a long output, and where temporary files of this machine lie."""
    lines = re.sub(rf"{re.escape(tempfile.gettempdir())}/\w+/", "", text).splitlines()
    if len(lines) > LONGEST_OUTPUT:
        half = LONGEST_OUTPUT // 2
        lines = [*lines[:half], "...", *lines[-half:]]
    return "\n".join(lines)


def render_page(shown: Sequence[tuple[NotebookCell, CellOutput]], figures: Path) -> str:
    """Render cells and what they show as Markdown, and write the figures into a folder."""
    figures.mkdir(exist_ok=True)
    parts, count = [], 0
    for cell, output in shown:
        parts.append(f"```python\n{cell.text}\n```" if cell.is_code else cell.text)
        if output.text:
            parts.append(f"```text\n{shorten_output(output.text)}\n```")
        for picture in output.figures:
            count += 1
            path = figures / f"figure-{count}.png"
            path.write_bytes(picture)
            parts.append(f"![what the cell above draws]({figures.name}/{path.name})")
    return "\n\n".join(parts) + "\n"


def main() -> None:
    """Run the tutorial, and write its page."""
    shown = list(run_notebook(read_notebook(TUTORIAL), {"__name__": "tutorial"}))
    PAGE.write_text(render_page(shown, FIGURES))


if __name__ == "__main__":
    main()
