"""Random changes of JSON trees: what an editor, a script or an enemy may make of a manifest, metadata or config."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from typing import Any

import numpy as np

CANARY = "hostile_canary"  # a module that tells when it is imported; see `watch`
NUMBERS: list[Any] = [
    0,
    -1,
    1,
    2,
    3,
    255,
    2**31,
    2**32 + 1,
    2**53 + 1,
    2**63,
    2**64,
    10**30,
    -(10**18),
    0.5,
    1e308,
]
NUMBERS += [float("nan"), float("inf"), -0.0]
TEXTS: list[Any] = [
    "",
    "../../..",
    "/etc/passwd",
    "a\0b",
    "\ud800",
    "漢字 🧬",
    "x" * 5000,
    "é\u0301",
    "..",
    ".",
]
TEXTS += [
    "uint128",
    "object",
    "O",
    "|O",
    "pickle",
    "numcodecs.pickle",
    "\\\\server\\share",
    "C:\\x",
    "%00",
    "\n\r\t",
]
CODE: list[Any] = [
    CANARY,
    f"{CANARY}:Canary",
    f"{CANARY}.Canary",
    "os.system",
    f"!!python/object:{CANARY}.Canary",
]
CODE += [
    f"__import__('{CANARY}')",
    {"__class__": f"{CANARY}.Canary"},
    {"py/object": f"{CANARY}.Canary"},
]
OTHERS: list[Any] = [
    None,
    True,
    False,
    [],
    {},
    [[]],
    [None],
    {"": ""},
    {"a": {"b": [1, {"c": None}]}},
    [1, "a", None],
]
VALUES = [*NUMBERS, *TEXTS, *CODE, *OTHERS]

Step = str | int
Where = tuple[Step, ...]  # from the top of a tree to one of its nodes
Spoiled = tuple[Any, str]  # a tree, and what was done to it
How = Callable[[Any, Where, np.random.Generator], Any]


def nodes(tree: Any, at: Where = ()) -> list[Where]:
    """Every node but the top, depth first."""
    steps: list[Step] = (
        list(tree)
        if isinstance(tree, dict)
        else list(range(len(tree)))
        if isinstance(tree, list)
        else []
    )
    return [node for step in steps for node in [(*at, step), *nodes(tree[step], (*at, step))]]


def spoiled(tree: Any, rng: np.random.Generator, times: int = 1) -> Spoiled:
    """A copy of the tree in which some nodes are changed."""
    tree, told = copy.deepcopy(tree), []
    for _ in range(times):
        at = _drawn(tree, rng)
        if not at:
            break
        how = HOWS[int(rng.integers(len(HOWS)))]
        parent = _parent(tree, at)
        before = json.dumps(parent[at[-1]])[:40]
        how(parent, at, rng)
        after = json.dumps(parent[at[-1]])[:60] if _has(parent, at[-1]) else "gone"
        told.append(f"{'.'.join(map(str, at))[:80]}: {before} -> {how.__name__} -> {after}")
    return tree, "; ".join(told)


def _drawn(tree: Any, rng: np.random.Generator) -> Where:
    """Some node, found from the top down, so that no list of many names takes all the changes."""
    at: Where = ()
    while isinstance(tree, dict | list) and len(tree) and (not at or rng.random() < 0.8):
        steps: list[Step] = list(tree) if isinstance(tree, dict) else list(range(len(tree)))
        at = (*at, steps[int(rng.integers(len(steps)))])
        tree = tree[at[-1]]
    return at


def _parent(tree: Any, at: Where) -> Any:
    for step in at[:-1]:
        tree = tree[step]
    return tree


def _has(parent: Any, step: Step) -> bool:
    return (
        step in parent if isinstance(parent, dict) else isinstance(step, int) and step < len(parent)
    )


def drop(parent: Any, at: Where, rng: np.random.Generator) -> None:
    del parent[at[-1]]


def replace(parent: Any, at: Where, rng: np.random.Generator) -> None:
    parent[at[-1]] = VALUES[int(rng.integers(len(VALUES)))]


def nudge(parent: Any, at: Where, rng: np.random.Generator) -> None:
    """A number that is near, or far; a text that is nearly the same."""
    value = parent[at[-1]]
    if isinstance(value, bool) or value is None:
        parent[at[-1]] = not value
    elif isinstance(value, int | float):
        parent[at[-1]] = [
            value + 1,
            value - 1,
            -value,
            value * 2,
            value * 10**6,
            value / 2,
            str(value),
        ][rng.integers(7)]
    elif isinstance(value, str):
        parent[at[-1]] = [
            value + " ",
            value.upper(),
            value[:-1],
            value * 2,
            f"../{value}",
            f"{value}\0",
        ][rng.integers(6)]
    elif isinstance(value, list):
        parent[at[-1]] = [value[::-1], value[:-1], value + value[:1], [value], value * 3][
            rng.integers(5)
        ]
    else:
        parent[at[-1]] = (
            list(value.items()) if rng.integers(2) else {f"{k}x": v for k, v in value.items()}
        )


def rename(parent: Any, at: Where, rng: np.random.Generator) -> None:
    """A key becomes another; an element is moved to the end."""
    name = TEXTS[int(rng.integers(len(TEXTS)))]
    if isinstance(parent, dict):
        parent[name] = parent.pop(at[-1])
    else:
        parent.append(parent.pop(at[-1]))


def add(parent: Any, at: Where, rng: np.random.Generator) -> None:
    """Something beside it that does not belong there."""
    value = VALUES[int(rng.integers(len(VALUES)))]
    if isinstance(parent, dict):
        parent[
            f"{at[-1]}{rng.choice(['', '_', '2', ' ', '.x'])}" if rng.integers(2) else "__class__"
        ] = value
    else:
        parent.insert(int(rng.integers(len(parent) + 1)), value)


def exchange(parent: Any, at: Where, rng: np.random.Generator) -> None:
    """With a neighbour."""
    others: list[Step] = list(parent) if isinstance(parent, dict) else list(range(len(parent)))
    other = others[int(rng.integers(len(others)))]
    parent[at[-1]], parent[other] = parent[other], parent[at[-1]]


HOWS: list[How] = [drop, replace, replace, nudge, nudge, rename, add, exchange]


def text_of(tree: Any) -> bytes:
    """As JSON; lone surrogates as they are escaped there."""
    return json.dumps(tree, indent=1).encode()


def broken_text(content: bytes, rng: np.random.Generator) -> tuple[bytes, str]:
    """JSON that is none any more, or that is out of all bounds."""
    at = int(rng.integers(len(content)))
    deep = 200_000
    kinds: dict[str, bytes] = {
        "empty": b"",
        "cut short": content[:at],
        "bytes that are no UTF-8": content[:at] + b"\xff\xfe\x80" + content[at:],
        "NUL bytes": b"\0" * 100,
        "a list nested deep": b"[" * deep + b"]" * deep,
        "an object nested deep": b'{"a":' * deep + b"1" + b"}" * deep,
        "a number of 10,000 digits": b'{"version": ' + b"9" * 10_000 + b"}",
        "with a mark of byte order": b"\xef\xbb\xbf" + content,
        "in UTF-16": content.decode().encode("utf-16"),
        "twice": content + content,
        "a text": b'"text"',
        "null": b"null",
        "with a comment": b"// a comment\n" + content,
    }
    kind = list(kinds)[int(rng.integers(len(kinds)))]
    return kinds[kind], kind
