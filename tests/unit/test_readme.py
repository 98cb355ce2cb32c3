"""What the README points at is there, and configs/README.md knows every setting with its default."""

import json
import re
from collections.abc import Iterator
from pathlib import Path

from pydantic import BaseModel
from pydantic_core import PydanticUndefined

from clue_dist.config import Config, ModalityConfig

ROOT = Path(__file__).parents[2]


def test_links_and_named_files_exist() -> None:
    text = (ROOT / "README.md").read_text()
    links = re.findall(r"\]\((?!http)([^)#]+)\)", text)
    files = re.findall(r"`((?:clue_dist|data_prep|launch|configs|docker|tests)/[\w./]+)`", text)
    assert links
    assert files
    assert [name for name in links + files if not (ROOT / name).exists()] == []


def fields(model: type[BaseModel]) -> Iterator[tuple[str, object]]:
    for name, field in model.model_fields.items():
        inner = field.annotation
        if isinstance(inner, type) and issubclass(inner, BaseModel):
            yield from fields(inner)
        elif name != "modalities":
            yield name, field.default


def told() -> list[tuple[str, str]]:
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
    settings = [*fields(Config), *fields(ModalityConfig)]
    wanted = sorted((name, written(default)) for name, default in settings)
    got = sorted(
        (name, "" if default == "auto" and (name, "") in wanted else default)
        for name, default in told()
    )
    assert got == wanted


def written(default: object) -> str:
    if default in (None, PydanticUndefined):
        return ""
    if isinstance(default, float):
        return f"{default:g}"
    return str(default).lower()  # true, false


def test_the_atlas_recipe_is_the_defaults() -> None:
    tree = json.loads((ROOT / "configs/atlas.json").read_text())
    assert Config.model_validate(tree) == Config()
