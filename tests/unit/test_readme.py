"""What the README points at is there, and configs/README.md knows every setting with its default."""

import json
import re
from pathlib import Path

from pydantic import BaseModel

from clue_dist.config import Config, ModalityConfig

ROOT = Path(__file__).parents[2]


def test_links_and_named_files_exist() -> None:
    text = (ROOT / "README.md").read_text()
    links = re.findall(r"\]\((?!http)([^)#]+)\)", text)
    files = re.findall(r"`((?:clue_dist|data_prep|launch|configs|docker|tests)/[\w./]+)`", text)
    assert links
    assert files
    assert [name for name in links + files if not (ROOT / name).exists()] == []


def fields(model: type[BaseModel]) -> dict[str, object]:
    out: dict[str, object] = {}
    for name, field in model.model_fields.items():
        inner = field.annotation
        if isinstance(inner, type) and issubclass(inner, BaseModel):
            out |= fields(inner)
        else:
            out[name] = field.default
    return out


def test_every_setting_is_explained() -> None:
    text = (ROOT / "configs/README.md").read_text()
    explained = set(re.findall(r"\w+", " ".join(re.findall(r"`([^`]+)`", text))))
    assert {*fields(Config), *fields(ModalityConfig)} - {"modalities"} <= explained


def test_the_atlas_recipe_is_the_defaults() -> None:
    tree = json.loads((ROOT / "configs/atlas.json").read_text())
    assert Config.model_validate(tree) == Config()
