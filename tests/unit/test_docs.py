"""What the pages point at is there, and configs/README.md knows every setting with its default."""

import json
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from pydantic import BaseModel
from pydantic_core import PydanticUndefined

from clue_dist.config import Config, ModalityConfig
from clue_dist.train.auto_settings import BATCH_SIZES, LARGEST_BATCH_SIZE

ROOT = Path(__file__).parents[2]


PAGES = [
    *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "clue_dist/README.md")),
    *(ROOT / name for name in ("configs/README.md", "tests/benchmarks/README.md")),
    *sorted((ROOT / "docs").glob("*.md")),
]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_and_named_files_exist(page: Path) -> None:
    text = page.read_text()
    links = re.findall(r"\]\((?!http)([^)#]+)(?:#[^)]*)?\)", text)
    rooms = "clue_dist|data_prep|launch|configs|docker|tests|docs"
    files = re.findall(rf"`((?:{rooms})/[\w./]+)`", text)
    assert [name for name in links if not (page.parent / name).exists()] == []
    assert [name for name in files if not (ROOT / name).exists()] == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_anchors_of_links_are_headings(page: Path) -> None:
    links = re.findall(r"\]\((?!http)([^)#]*)#([^)]+)\)", page.read_text())
    targets = [(page.parent / name if name else page, anchor) for name, anchor in links]
    assert [
        f"{target.name}#{anchor}"
        for target, anchor in targets
        if anchor not in collect_anchors(target)
    ] == []


def collect_anchors(page: Path) -> set[str]:
    """Anchors of the headings of a page and of the files that it includes."""
    text = page.read_text()
    # A line of a code block that begins with "#" is no heading.
    prose = re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL)
    anchors = {make_anchor(title) for title in re.findall(r"^#+ (.+)$", prose, re.MULTILINE)}
    # `--8<-- "FILE:SECTION"`: all headings of FILE count, those outside of SECTION, too.
    for name in re.findall(r'^--8<-- "([^":]+)', text, re.MULTILINE):
        anchors |= collect_anchors(ROOT / name)
    return anchors


def make_anchor(title: str) -> str:
    """The anchor that mkdocs gives a heading."""
    return re.sub(r"[-\s]+", "-", re.sub(r"[^\w\s-]", "", title).strip().lower())


def test_anchors_are_those_of_mkdocs() -> None:
    assert make_anchor("The paper's recipe: `train.lr`, step by  step") == (
        "the-papers-recipe-trainlr-step-by-step"
    )


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_tests_are_named_by_their_paths(page: Path) -> None:
    """Some files of tests have one name in several folders; see above that the paths exist."""
    assert re.findall(r"`(test_\w+\.py)`", page.read_text()) == []


def test_the_readme_has_at_most_130_lines() -> None:
    assert len((ROOT / "README.md").read_text().splitlines()) <= 130


def test_every_step_of_automatic_batch_sizes_is_told() -> None:
    sizes = [f"{size:,} for less than {limit:,}" for size, limit in BATCH_SIZES]
    assert (
        f"{', '.join(sizes)}, else {LARGEST_BATCH_SIZE:,}"
        in (ROOT / "configs/README.md").read_text()
    )


def list_settings(model: type[BaseModel]) -> Iterator[tuple[str, object]]:
    for name, field in model.model_fields.items():
        inner = field.annotation
        if isinstance(inner, type) and issubclass(inner, BaseModel):
            yield from list_settings(inner)
        elif name != "modalities":
            yield name, field.default


def read_documented_settings() -> list[tuple[str, str]]:
    """Name and default of every setting, as the rows of configs/README.md tell them."""
    text = (ROOT / "configs/README.md").read_text().partition("## All settings")[2]
    rows = [
        [cell.strip() for cell in line.strip("|").split("|")]
        for line in text.splitlines()
        if line[:3] == "| `"
    ]
    pairs = []
    for names, defaults, _ in rows:
        parts = [name.rpartition(".")[2] for name in re.findall(r"`([^`]+)`", names)]
        pairs += zip(parts, defaults.split(", ") if len(parts) > 1 else [defaults], strict=True)
    return pairs


def test_every_setting_is_told_with_its_default() -> None:
    """No default is told as nothing, or as "auto" where the data decide."""
    settings = [*list_settings(Config), *list_settings(ModalityConfig)]
    wanted = sorted((name, format_default(default)) for name, default in settings)
    documented = sorted(
        (name, "" if default == "auto" and (name, "") in wanted else default)
        for name, default in read_documented_settings()
    )
    assert documented == wanted


def format_default(default: object) -> str:
    if default in (None, PydanticUndefined):
        return ""
    if isinstance(default, float):
        return f"{default:g}"
    return str(default).lower()  # true, false


def test_the_atlas_recipe_is_the_defaults() -> None:
    tree = json.loads((ROOT / "configs/atlas.json").read_text())
    assert Config.model_validate(tree) == Config()
