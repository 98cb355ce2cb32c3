"""Hold the floor under the project's style, or print the table that measures it.

`make lint` runs the first command. The second makes one column for each FOLDER, a checkout.
    python -m tests.style
    python -m tests.style --table [--root FOLDER ...]
"""

from __future__ import annotations

import argparse
import ast
import io
import sys
import tokenize
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from statistics import mean, median

CHECKOUT = Path(__file__).resolve().parents[1]
PACKAGES = ("clue_dist", "data_prep", "launch")
EVERYWHERE = (*PACKAGES, "tests", "docs")
MOST_COLUMNS = 100
FEWEST_WORDS = 2.0  # in the name of a public function, on average
LONG_FUNCTION = 40  # lines, those of its docstring aside
VAGUE_NAMES = frozenset({"told", "own", "of", "at", "got", "there", "mine"})

# Everything that the rules let pass, each with its reason.
ENTRY_POINTS = frozenset({"main"})  # every script has one, and no module imports it
ALLOWED_VAGUE = frozenset({("clue_dist/errors.py", "got")})  # callers of ClueError write got=...

Function = ast.FunctionDef | ast.AsyncFunctionDef


@dataclass(frozen=True)
class SourceFile:
    """One Python file of a checkout; `path` is relative to the root of that checkout."""

    path: Path
    text: str

    @cached_property
    def module(self) -> ast.Module:
        """The syntax tree of the file."""
        return ast.parse(self.text, filename=str(self.path))


Problem = tuple[Path, int, str]  # file, line, message
Rule = Callable[[Sequence[SourceFile]], Iterator[Problem]]


def read_sources(root: Path, *folders: str) -> list[SourceFile]:
    """Read the Python files under folders of a checkout; a folder that is missing has none."""
    paths = [path for folder in folders for path in sorted((root / folder).rglob("*.py"))]
    return [SourceFile(path.relative_to(root), path.read_text("utf-8")) for path in paths]


def list_classes(source: SourceFile) -> list[ast.ClassDef]:
    """List the classes of a file: public, private and nested ones."""
    return [node for node in ast.walk(source.module) if isinstance(node, ast.ClassDef)]


def list_public_functions(source: SourceFile) -> list[Function]:
    """List the functions that other modules may import: no methods, and no entry points."""
    functions = [node for node in source.module.body if isinstance(node, Function)]
    return [node for node in functions if node.name[0] != "_" and node.name not in ENTRY_POINTS]


def list_parameters(source: SourceFile) -> list[tuple[str, int]]:
    """List name and line of every parameter except self and cls."""
    arguments = [node for node in ast.walk(source.module) if isinstance(node, ast.arg)]
    return [(node.arg, node.lineno) for node in arguments if node.arg not in ("self", "cls")]


def list_variables(source: SourceFile) -> list[tuple[str, int]]:
    """List name and line of every assignment to a name (by =, for, with, :=), fields among them."""
    names = [node for node in ast.walk(source.module) if isinstance(node, ast.Name)]
    return [(node.id, node.lineno) for node in names if isinstance(node.ctx, ast.Store)]


def count_words(name: str) -> int:
    """Count the words of a name: what stands between its underscores."""
    return len([word for word in name.split("_") if word])


def find_repeated_names(
    sources: Sequence[SourceFile],
    list_definitions: Callable[[SourceFile], Iterable[ast.ClassDef | Function]],
) -> dict[str, list[tuple[Path, int]]]:
    """Find the names that several files define, and where; `_Task` and `Task` count as one name."""
    places = defaultdict(list)
    for source in sources:
        for node in list_definitions(source):
            places[node.name.lstrip("_")].append((source.path, node.lineno))
    # Twice in one file is an overload or a choice by platform; ruff tells those from mistakes.
    return {name: found for name, found in places.items() if len({path for path, _ in found}) > 1}


def check_line_width(sources: Sequence[SourceFile]) -> Iterator[Problem]:
    """No line is wider than MOST_COLUMNS."""
    for source in sources:
        for number, line in enumerate(source.text.splitlines(), start=1):
            if len(line) > MOST_COLUMNS:
                yield source.path, number, f"{len(line)} columns, at most {MOST_COLUMNS}"


def check_name_length(sources: Sequence[SourceFile]) -> Iterator[Problem]:
    """Names of public functions average FEWEST_WORDS words; if not, the short ones are listed."""
    functions = [(file.path, node) for file in sources for node in list_public_functions(file)]
    average = mean([count_words(node.name) for _, node in functions] or [FEWEST_WORDS])
    comparison = f"public functions average {average:.2f} words, at least {FEWEST_WORDS}"
    for path, node in functions:
        if average < FEWEST_WORDS and count_words(node.name) < FEWEST_WORDS:
            yield path, node.lineno, f"{node.name} is one word; {comparison}"


def check_unique_names(sources: Sequence[SourceFile]) -> Iterator[Problem]:
    """No two files define a class, or a public function, of the same name."""
    for list_definitions in (list_classes, list_public_functions):
        for name, places in find_repeated_names(sources, list_definitions).items():
            for path, line in places:
                others = ", ".join(f"{file}:{number}" for file, number in places if file != path)
                yield path, line, f"{name} is also defined in {others}"


def check_vague_names(sources: Sequence[SourceFile]) -> Iterator[Problem]:
    """No variable or parameter has one of VAGUE_NAMES; keyword arguments in a call may."""
    for source in sources:
        for name, line in list_parameters(source) + list_variables(source):
            if name in VAGUE_NAMES and (source.path.as_posix(), name) not in ALLOWED_VAGUE:
                yield source.path, line, f"{name} names no thing: take a noun"


def check_docstrings(sources: Sequence[SourceFile]) -> Iterator[Problem]:
    """Every public class and every public function of a module has a docstring."""
    for source in sources:
        classes = [node for node in list_classes(source) if node.name[0] != "_"]
        for node in [*classes, *list_public_functions(source)]:
            if not ast.get_docstring(node):
                yield source.path, node.lineno, f"{node.name} has no docstring"


# Each rule with the folders that it holds in. A new rule is one function and one line here.
RULES: tuple[tuple[Rule, tuple[str, ...]], ...] = (
    (check_line_width, EVERYWHERE),
    (check_name_length, PACKAGES),
    (check_unique_names, PACKAGES),
    (check_vague_names, PACKAGES),
    (check_docstrings, PACKAGES),
)


def list_problems(root: Path) -> list[Problem]:
    """List the breaches of all rules in a checkout, by file and line."""
    return sorted(found for rule, folders in RULES for found in rule(read_sources(root, *folders)))


def count_lines(folder: Path) -> int:
    """Count the lines of the Python files under a folder."""
    return sum(len(path.read_text("utf-8").splitlines()) for path in folder.rglob("*.py"))


def count_comments(source: SourceFile) -> tuple[int, int]:
    """Count the comments of a file, and its lines of code docstrings among them."""
    comments, code_lines = 0, set[int]()
    for token in tokenize.generate_tokens(io.StringIO(source.text).readline):
        if token.type == tokenize.COMMENT:
            comments += 1
        elif token.string.strip():
            code_lines.update(range(token.start[0], token.end[0] + 1))
    return comments, len(code_lines)


def count_function_lines(function: Function) -> int:
    """Count the lines of a function without its decorators and its docstring."""
    docstring = ast.get_docstring(function, clean=False) or ""
    length = (function.end_lineno or function.lineno) + 1 - function.lineno
    return length - len(docstring.splitlines())


def describe_names(names: Iterable[str]) -> str:
    """Say how many words and (letters) a name has on average, leading underscores aside."""
    bare_names = [name.lstrip("_") for name in names]
    return f"{mean(map(count_words, bare_names)):.2f} ({mean(map(len, bare_names)):.1f})"


def measure_names(root: Path) -> dict[str, str]:
    """Measure the names and functions of a checkout: label and value of each row of the table."""
    sources = read_sources(root, *PACKAGES)
    nodes = [node for source in sources for node in ast.walk(source.module)]
    functions = [node for node in nodes if isinstance(node, Function)]
    names = [node.name for node in functions if not node.name.startswith("__")]
    public_names = [node.name for source in sources for node in list_public_functions(source)]
    parameters = [name for source in sources for name, _ in list_parameters(source)]
    variables = [name for source in sources for name, _ in list_variables(source)]
    classes_twice = find_repeated_names(sources, list_classes)
    functions_twice = find_repeated_names(sources, list_public_functions)
    long_functions = [node for node in functions if count_function_lines(node) > LONG_FUNCTION]
    return {
        "words (letters) in a function's name": describe_names(names),
        "words (letters) in a public function's name": describe_names(public_names),
        "letters of a parameter": f"{mean(map(len, parameters)):.1f}",
        "letters of a variable": f"{mean(map(len, variables)):.1f}",
        "class names defined twice": f"{len(classes_twice)}",
        "public functions defined twice": f"{len(functions_twice)}",
        f"functions over {LONG_FUNCTION} lines": f"{len(long_functions)}",
    }


def measure_text(root: Path) -> dict[str, str]:
    """Measure the lines, comments and pages of a checkout, for more rows of the table."""
    sources = read_sources(root, *PACKAGES)
    comments, code_lines = map(sum, zip(*map(count_comments, sources), strict=True))
    lines = [line for source in sources for line in source.text.splitlines() if line.strip()]
    wide_lines = [line for line in lines if len(line) > MOST_COLUMNS]
    lengths = [len(source.text.splitlines()) for source in sources]
    return {
        "comments per 100 lines of code": f"{100 * comments / code_lines:.1f}",
        f"lines wider than {MOST_COLUMNS}": f"{len(wide_lines) / len(lines):.1%}",
        "README, words": f"{len((root / 'README.md').read_text('utf-8').split()):,}",
        "documentation pages": f"{len(list((root / 'docs').rglob('*.md')))}",
        "lines of Python in the packages": f"{sum(lengths):,}",
        "lines of Python in tests": f"{count_lines(root / 'tests'):,}",
        "lines of Python in tests/benchmarks": f"{count_lines(root / 'tests/benchmarks'):,}",
        "lines of a file, median (longest)": f"{median(lengths):.0f} ({max(lengths)})",
    }


def main(argv: Sequence[str] | None = None) -> int:
    """Print the table, or the breaches of all rules; return the exit code."""
    parser = argparse.ArgumentParser(description="Check the style of a checkout, or measure it.")
    parser.add_argument("--table", action="store_true", help="print the measures, judge nothing")
    parser.add_argument("--root", type=Path, nargs="+", default=[CHECKOUT], metavar="FOLDER")
    arguments = parser.parse_args(argv)
    if arguments.table:
        columns = [measure_names(root) | measure_text(root) for root in arguments.root]
        for name in columns[0]:
            print(f"| {name} |", *(f"{column[name]} |" for column in columns))
        return 0
    problems = [problem for root in arguments.root for problem in list_problems(root)]
    for path, line, message in problems:
        print(f"{path}:{line}: {message}")
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
