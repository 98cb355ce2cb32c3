"""Each rule of style finds what breaks it and passes the rest; the table measures a checkout."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests import style

Output = pytest.CaptureFixture[str]

CLEAN = '''"""A module."""

LIMIT = 3  # a comment


class Basket:
    """Holds apples."""

    owner: str  # a field

    def __len__(self) -> int:
        return LIMIT


def count_apples(basket: Basket) -> int:
    """Count the apples.

    A second paragraph.
    """
    apples = len(basket)
    return report(apples, got=apples)


def main() -> None:
    print(count_apples)
'''

# A rule, a source that breaks it on the last line, and a part of the message.
BROKEN = {
    "a wide line": (style.check_line_width, "x = 1" + " " * 96, "101 columns"),
    "a short name": (style.check_name_length, "def eat_pear(): ...\ndef eat(): ...", "eat is"),
    "a variable": (style.check_vague_names, "told = 3", "told"),
    "a variable of a loop": (style.check_vague_names, "for at in []: ...", "at"),
    "a field": (style.check_vague_names, "class Pear:\n  own: int", "own"),
    "a parameter": (style.check_vague_names, "def eat_apple(*, got=None): ...", "got"),
    "a parameter of a lambda": (style.check_vague_names, "print(lambda mine: 3)", "mine"),
    "no docstring (class)": (style.check_docstrings, "class Pear: ...", "Pear has no"),
    "no docstring (function)": (style.check_docstrings, "def eat_pear(): ...", "eat_pear has no"),
}


def make_source(text: str, path: str = "clue_dist/orchard.py") -> style.SourceFile:
    return style.SourceFile(Path(path), text)


@pytest.mark.parametrize("rule", [rule for rule, _ in style.RULES])
def test_clean_source_passes(rule: style.Rule) -> None:
    sources = [make_source(CLEAN), make_source("def main(): ...", "launch/train.py")]
    assert list(rule(sources)) == []


@pytest.mark.parametrize(("rule", "text", "message"), BROKEN.values(), ids=BROKEN)
def test_rule_finds_breach(rule: style.Rule, text: str, message: str) -> None:
    source = make_source(text)
    [(path, line, found)] = rule([source])
    assert (path, line) == (source.path, len(text.splitlines()))
    assert message in found


@pytest.mark.parametrize("text", ["class Pear: ...", "def eat_pear(): ..."])
def test_name_in_two_files_is_found_in_both(text: str) -> None:
    sources = [make_source(text), make_source("\n" + text, "data_prep/garden.py")]
    problems = list(style.check_unique_names(sources))
    assert [(path, line) for path, line, _ in problems] == [
        (Path("clue_dist/orchard.py"), 1),
        (Path("data_prep/garden.py"), 2),
    ]
    assert "also defined in data_prep/garden.py:2" in problems[0][2]


def test_private_and_public_class_share_one_name() -> None:
    sources = [make_source("class Pear: ..."), make_source("class _Pear: ...", "launch/train.py")]
    assert len(list(style.check_unique_names(sources))) == 2


def test_private_functions_and_overloads_may_repeat_a_name() -> None:
    private, overloaded = "def _eat(): ...", "def eat_pear(): ...\n" * 2
    garden = make_source(private, "data_prep/garden.py")
    sources = [make_source(f"{private}\n{overloaded}"), garden]
    assert list(style.check_unique_names(sources)) == []


def test_errors_may_have_the_parameter_got() -> None:
    source = make_source("def __init__(self, got): ...", "clue_dist/errors.py")
    assert list(style.check_vague_names([source])) == []


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A small checkout: a clean module, and a test that breaks every rule for packages."""
    files = {
        "clue_dist/orchard.py": CLEAN,
        "tests/benchmarks/speed.py": "class Basket: ...\n\ndef run(): told = 3\n",
        "docs/index.md": "# Orchard",
        "README.md": "Apples and pears",
    }
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    return tmp_path


def test_command_lists_problems(checkout: Path, capsys: Output) -> None:
    assert style.main(["--root", str(checkout)]) == 0
    assert capsys.readouterr().out == ""
    for folder in ("tests", "launch"):
        (checkout / folder).mkdir(exist_ok=True)
        (checkout / folder / "wide.py").write_text("\n" + "#" * 101)
    assert style.main(["--root", str(checkout)]) == 1
    message = "101 columns, at most 100"
    assert capsys.readouterr().out.splitlines() == [
        f"launch/wide.py:2: {message}",
        f"tests/wide.py:2: {message}",
    ]


def test_table_has_a_column_for_each_checkout(checkout: Path, capsys: Output) -> None:
    assert style.main(["--table", "--root", str(checkout), str(checkout)]) == 0
    rows = [row.strip("| ").split(" | ") for row in capsys.readouterr().out.splitlines()]
    assert all(before == after for _, before, after in rows)
    assert {name: value for name, value, _ in rows} == {
        "words (letters) in a function's name": "1.50 (8.0)",  # count_apples, main
        "words (letters) in a public function's name": "2.00 (12.0)",
        "letters of a parameter": "6.0",  # basket
        "letters of a variable": "5.3",  # LIMIT, owner, apples
        "class names defined twice": "0",
        "public functions defined twice": "0",
        "functions over 40 lines": "0",
        "comments per 100 lines of code": "12.5",
        "lines wider than 100": "0.0%",
        "README, words": "3",
        "documentation pages": "1",
        "lines of Python in the packages": "25",
        "lines of Python in tests": "3",
        "lines of Python in tests/benchmarks": "3",
        "lines of a file, median (longest)": "25 (25)",
    }


@pytest.mark.parametrize(("statements", "length"), [(1, 2), (40, 41)])
def test_docstring_adds_no_length_to_a_function(statements: int, length: int) -> None:
    text = 'def eat_pear():\n    """Eat.\n\n    All of it.\n    """\n' + "    pass\n" * statements
    [function] = style.list_public_functions(make_source(text))
    assert style.count_function_lines(function) == length
