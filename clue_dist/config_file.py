"""Settings from files and words: a recipe is read, words of `--set` are written into it.

What cannot be read, and what pydantic refuses, becomes an error that names the nearest known key.
"""

from __future__ import annotations

import difflib
import json
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from clue_dist.config import Config, ModalityConfig
from clue_dist.errors import ConfigError, list_names

RECIPES = Path(__file__).parent / "recipes"  # what configs/ holds, in the wheel, too


def load_config(path: str | Path, overrides: list[str] | None = None) -> Config:
    """Read a config file and apply overrides to it.

    Args:
        path: a JSON file, or the name of a recipe, as `atlas`.
        overrides: `dotted.path=value` each, as `--set` takes them; a value is JSON, else text.

    Raises:
        ConfigError: the file does not exist or is not JSON, a key is unknown (the error gives the
            nearest known one), or a value is out of range.
    """
    path = Path(path)
    try:
        if not path.is_file():
            path = find_recipe(path)
        tree = json.loads(path.read_text())
    except OSError as error:
        raise ConfigError("the config file cannot be read", where=path, got=error) from None
    except (ValueError, RecursionError) as error:
        raise ConfigError("the config file is not JSON", where=path, got=error) from None
    if not isinstance(tree, dict):
        raise ConfigError(
            "the config file is not a JSON object",
            where=path,
            got=type(tree).__name__,
            expected="{...}",
        )
    return parse_config(tree, path, overrides)


def parse_config(tree: dict[str, Any], where: object, overrides: list[str] | None = None) -> Config:
    """Make a config of a tree of settings, into which overrides are written.

    Args:
        tree: what a config file holds.
        where: it comes from, for messages.
        overrides: as in `load_config`.

    Raises:
        ConfigError: a key is unknown, or a value is out of range.
    """
    for override in overrides or []:
        _apply_override(tree, override)
    try:
        return Config.model_validate(tree)
    except ValidationError as error:
        given = [override.partition("=")[0] for override in overrides or []]
        raise _make_validation_error(error, where, given) from None


def find_recipe(name: Path, ending: str = ".json") -> Path:
    """Find the file of a recipe that is given by its name, with or without the ending.

    Raises:
        ConfigError: there is no such recipe.
    """
    recipe = RECIPES / f"{name.stem}{ending}"
    if name.name != str(name) or name.suffix not in ("", ending) or not recipe.is_file():
        names = sorted(path.stem for path in RECIPES.glob(f"*{ending}"))
        raise ConfigError(
            "the file does not exist",
            where=name,
            expected=f"a file, or a recipe: {list_names(names)}",
        )
    return recipe


def require_paths(config: Config, *keys: str) -> None:
    """Require `store` and `run`, which a recipe may leave out, but not a run.

    Args:
        config: the settings.
        keys: which of the two to require; both if none is named.

    Raises:
        ConfigError: one of them is not set.
    """
    for key in keys or ("store", "run"):
        if not getattr(config, key):
            raise ConfigError(
                f"`{key}` is not set",
                where="config",
                fix=f"add --set {key}=PATH, or name it in the config file",
            )


def compare_settings(before: Config, after: Config) -> dict[str, tuple[Any, Any]]:
    """Compare two configs.

    Returns:
        Both values of each setting that differs, by its dotted path; None where one config lacks
        it.
    """
    left = _flatten_tree(before.model_dump(mode="json"))
    right = _flatten_tree(after.model_dump(mode="json"))
    return {
        key: (left.get(key), right.get(key))
        for key in sorted(left.keys() | right.keys())
        if left.get(key) != right.get(key)
    }


def _flatten_tree(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Values by dotted path."""
    values: dict[str, Any] = {}
    for key, value in tree.items():
        dotted = prefix + key
        values |= _flatten_tree(value, f"{dotted}.") if isinstance(value, dict) else {dotted: value}
    return values


def parse_override(override: str) -> tuple[str, Any]:
    """Read `dotted.path=value`, as `--set` takes it: the path, and the value, JSON or else text.

    Raises:
        ConfigError: it has no path, or no value.
    """
    dotted, equals, text = override.partition("=")
    if not equals or not dotted:
        raise ConfigError(
            "--set wants dotted.path=value",
            got=repr(override),
            expected="for example --set train.lr=1e-4",
        )
    try:
        return dotted, json.loads(text)
    except (ValueError, RecursionError):
        return dotted, text


def _apply_override(tree: dict[str, Any], override: str) -> None:
    """Set one value of a tree that is not checked yet."""
    dotted, value = parse_override(override)
    *parents, last = dotted.split(".")
    for parent in parents:
        tree = tree.setdefault(parent, {})
        if not isinstance(tree, dict):
            raise ConfigError(
                "--set goes below a value that is not an object", got=override, where=parent
            )
    tree[last] = value


def _make_validation_error(
    error: ValidationError, path: object, overridden: list[str]
) -> ConfigError:
    """Make one of our errors of the first of pydantic's complaints.

    Args:
        error: what pydantic raised.
        path: where the settings come from that are not overridden.
        overridden: dotted paths of the settings that are.
    """
    first = error.errors()[0]
    # Pydantic adds which member of a union it tried ("constrained-int", "literal['auto']").
    dotted = ".".join(
        str(key) for key in first["loc"] if str(key).isidentifier() and key not in ("float", "int")
    )
    is_overridden = any(
        f"{dotted}.".startswith(f"{key}.") or f"{key}.".startswith(f"{dotted}.")
        for key in overridden
        if dotted
    )
    where = f"--set {dotted}, in Python `settings`" if is_overridden else f"{path}: {dotted}"
    if first["type"] != "extra_forbidden":
        return ConfigError(
            first["msg"].removeprefix("Value error, "),
            where=where if dotted else f"{path}: config",
            got=None if first["type"] == "value_error" else repr(first["input"])[:200],
            fix="put it in double quotes" if first["type"] == "string_type" else None,
        )
    known = _list_known_keys(first["loc"][:-1])
    nearest = difflib.get_close_matches(str(first["loc"][-1]), known, n=1, cutoff=0.0)
    parent = ".".join(str(key) for key in first["loc"][:-1])
    meant = ".".join(filter(None, [parent, *nearest]))
    return ConfigError(
        "unknown key in the config",
        where=where,
        expected=f"one of {', '.join(known)}",
        fix=f"did you mean `{meant}`?" if nearest else None,
    )


def _list_known_keys(location: tuple[Any, ...]) -> list[str]:
    """The keys that a group of settings has; location: the keys that lead to it."""
    group: Any = Config
    for key in location:
        if group is Config and key == "modalities":  # the next key is the name of a modality
            return list(ModalityConfig.model_fields) if len(location) > 1 else []
        group = group.model_fields[key].annotation
    return list(group.model_fields)
