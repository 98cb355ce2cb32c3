"""Whatever a config file or a `--set` holds gives a Config or a ConfigError, and nothing else."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from random import Random
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from clue_dist import config_file
from clue_dist.config import Config
from clue_dist.errors import ConfigError
from tests.benchmarks.hostile import spoil

RECIPES = [
    json.loads(path.read_text())
    for path in sorted((Path(__file__).parents[2] / "configs").glob("*.json"))
]
# The same with every setting spelt out.
RECIPES += [Config.model_validate(tree).model_dump(mode="json") for tree in RECIPES]
FUZZ = settings(
    deadline=None, max_examples=200, derandomize=True, suppress_health_check=list(HealthCheck)
)


def keys_of(tree: Any) -> set[str]:
    if not isinstance(tree, dict):
        return set()
    return {*tree, *(key for value in tree.values() for key in keys_of(value))}


KEYS = (
    st.sampled_from(
        sorted({key for tree in RECIPES for key in keys_of(tree)} | {"rna", "modalities"})
    )
    | st.text()
)
LEAVES = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text()
    | st.sampled_from(spoil.VALUES)
)
TREES = st.recursive(
    LEAVES, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(KEYS, inner, max_size=5)
)
PLACES = st.lists(KEYS, max_size=4).map(".".join)
OVERRIDES = (
    st.builds(lambda place, value: f"{place}={json.dumps(value)}", PLACES, LEAVES) | st.text()
)


def loaded(content: bytes, overrides: list[str]) -> Config | None:
    """The Config, which reads back as it is; None where it was refused."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "c.json"
        path.write_bytes(content)
        try:
            config = config_file.load_config(path, overrides)
        except ConfigError:
            return None
        path.write_text(config.to_json())
        assert config_file.load_config(path) == config
        return config


@pytest.mark.slow
@FUZZ
@given(TREES)
def test_any_tree(tree: Any) -> None:
    loaded(json.dumps(tree).encode(), [])


@pytest.mark.slow
@FUZZ
@given(st.sampled_from(RECIPES), st.integers(0, 2**32), st.integers(1, 3))
def test_recipes_that_were_changed(recipe: Any, seed: int, times: int) -> None:
    content, _ = spoil.spoil_json(json.dumps(recipe).encode(), Random(seed), 0.0, times)
    loaded(content, [])


@pytest.mark.slow
@FUZZ
@given(st.sampled_from(RECIPES), st.lists(OVERRIDES, min_size=1, max_size=3))
def test_any_override(recipe: Any, overrides: list[str]) -> None:
    loaded(json.dumps(recipe).encode(), overrides)


@pytest.mark.slow
@FUZZ
@given(st.sampled_from(RECIPES), st.integers(0, 2**32))
def test_files_that_are_no_json(recipe: Any, seed: int) -> None:
    content, _ = spoil.spoil_json(json.dumps(recipe).encode(), Random(seed), 1.0)
    loaded(content, [])


@FUZZ
@given(st.binary(max_size=200))
def test_any_bytes(content: bytes) -> None:
    loaded(content, [])


def test_recipes_are_what_they_say() -> None:
    for recipe in RECIPES:
        config = loaded(json.dumps(recipe).encode(), [])
        assert config is not None
        kept = config.model_dump(mode="json")
        assert all(kept["train"][key] == value for key, value in recipe.get("train", {}).items())


@pytest.mark.parametrize("name", ["a\0b", "x" * 300, "/".join(["x" * 200] * 20), "\ud800"])
def test_names_that_no_file_can_have(name: str) -> None:
    for key in ("store", "run"):
        assert loaded(json.dumps({key: name}).encode(), []) is None
