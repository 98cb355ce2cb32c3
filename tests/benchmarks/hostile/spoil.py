"""Random changes of JSON: what an editor, a script or an enemy may make of it."""

import copy
import json
import pathlib
import tomllib
from random import Random
from typing import Any

from tests.benchmarks.hostile.watch import CANARY

EDITS = tomllib.loads(pathlib.Path(__file__).with_name("edits.toml").read_text())
VALUES: list[Any] = [*json.loads(EDITS.pop("values").replace("CANARY", CANARY)), "x" * 5000]
TEXTS = [value for value in VALUES if isinstance(value, str)]
HOWS = ("drop", "replace", "replace", "nudge", "nudge", "rename", "add", "exchange")
DEEP = 200_000  # levels

Path = tuple[str | int, ...]  # the steps from the top of a tree to one of its nodes


def list_steps(tree: Any) -> list[str | int]:
    return list(tree) if isinstance(tree, dict) else list(range(len(tree)))


def list_paths(tree: Any, path: Path = ()) -> list[Path]:
    """The paths of every node but the top, depth first."""
    if not isinstance(tree, dict | list):
        return []
    below = [(*path, step) for step in list_steps(tree)]
    return [found for place in below for found in (place, *list_paths(tree[place[-1]], place))]


def spoil_tree(tree: Any, rng: Random, times: int = 1) -> tuple[Any, str]:
    """A copy of a tree in which some nodes are changed, and what was done."""
    tree, changes = copy.deepcopy(tree), []
    for _ in range(times):
        # From the top down, so that no list of many names takes all the changes.
        node, path, parent = tree, [], None
        while isinstance(node, dict | list) and len(node) and (not path or rng.random() < 0.8):
            parent, path = node, [*path, rng.choice(list_steps(node))]
            node = parent[path[-1]]
        if not path:
            break
        step, how = path[-1], rng.choice(HOWS)
        before = json.dumps(node)[:40]
        change_node(parent, step, how, rng)
        after = json.dumps(parent[step])[:60] if step in list_steps(parent) else "gone"
        changes.append(f"{'.'.join(map(str, path))[:80]}: {before} -> {how} -> {after}")
    return tree, "; ".join(changes)


def change_node(parent: Any, step: Any, how: str, rng: Random) -> None:
    """Change a child of a dict or list as one of HOWS says."""
    named = isinstance(parent, dict)
    match how:
        case "drop":
            del parent[step]
        case "replace":
            parent[step] = rng.choice(VALUES)
        case "nudge":
            parent[step] = rng.choice(list_near(parent[step]))
        case "rename" if named:
            parent[rng.choice(TEXTS)] = parent.pop(step)
        case "rename":
            parent.append(parent.pop(step))
        case "add" if named:  # what does not belong there
            name = f"{step}{rng.choice(['', '_', '2', ' ', '.x'])}"
            parent[rng.choice([name, "__class__"])] = rng.choice(VALUES)
        case "add":
            parent.insert(rng.randrange(len(parent) + 1), rng.choice(VALUES))
        case "exchange":
            other = rng.choice(list_steps(parent))
            parent[step], parent[other] = parent[other], parent[step]


def list_near(value: Any) -> list[Any]:
    """Numbers that are near, or far; texts that are nearly the same."""
    match value:
        case None | bool():
            return [not value]
        case int() | float():
            return [value + 1, value - 1, -value, value * 2, value * 10**6, value / 2, str(value)]
        case str():
            return [f"{value} ", value.upper(), value[:-1], value * 2, f"../{value}", f"{value}\0"]
        case list():
            return [value[::-1], value[:-1], value + value[:1], [value], value * 3]
        case _:
            return [
                list(map(list, value.items())),
                {f"{key}x": item for key, item in value.items()},
            ]


def format_tree(tree: Any) -> bytes:
    """As JSON; lone surrogates as they are escaped there."""
    return json.dumps(tree, indent=1).encode()


def spoil_json(content: bytes, rng: Random, broken: float, times: int = 1) -> tuple[bytes, str]:
    """JSON in which nodes are changed, or at this rate text that is none, and what was done."""
    if rng.random() >= broken:
        tree, change = spoil_tree(json.loads(content), rng, times)
        return format_tree(tree), change
    place = rng.randrange(len(content))
    kinds: dict[str, bytes] = {
        "empty": b"",
        "cut short": content[:place],
        "bytes that are no UTF-8": content[:place] + b"\xff\xfe\x80" + content[place:],
        "NUL bytes": b"\0" * 100,
        "a list nested deep": b"[" * DEEP + b"]" * DEEP,
        "an object nested deep": b'{"a":' * DEEP + b"1" + b"}" * DEEP,
        "a number of 10,000 digits": b'{"version": ' + b"9" * 10_000 + b"}",
        "with a mark of byte order": b"\xef\xbb\xbf" + content,
        "in UTF-16": content.decode().encode("utf-16"),
        "twice": content + content,
        "a text": b'"text"',
        "null": b"null",
        "with a comment": b"// a comment\n" + content,
    }
    kind = rng.choice(list(kinds))
    return kinds[kind], kind
