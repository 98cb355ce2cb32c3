"""What the ranks send each other, as JSON: plain values and errors.

Anybody who reaches the port where the ranks meet can write what they read. So nothing that is read
names a class or runs code, and whatever is not as a rank of the job writes it is an error.
"""

from __future__ import annotations

import json
from typing import Any

from clue_dist import errors
from clue_dist.errors import ClueError, RankError

# Far more than the ranks send: the nearest keys of some ten million cells.
MOST_BYTES = 1 << 28
MOST_CHARACTERS = 1 << 16  # of a text, as each part of an error is
_SHOWN_BYTES = 60  # of a value that is refused

# The only classes that an error may have which comes from another rank.
ERROR_CLASSES: dict[str, type[ClueError]] = {
    name: value
    for name, value in vars(errors).items()
    if isinstance(value, type) and issubclass(value, ClueError)
}
EXIT_CODES = frozenset(kind.exit_code for kind in ERROR_CLASSES.values())
_PARTS = ("what", "where", "got", "expected", "fix")


def encode_value(value: Any) -> bytes:
    """Encode plain data: None, bool, int, float (NaN, too), str, and lists and dicts of them."""
    return json.dumps(value, separators=(",", ":")).encode()


def decode_value(data: bytes, where: str) -> Any:
    """Decode what `encode_value` wrote.

    Args:
        data: what was read.
        where: what it was read from, for the error.

    Raises:
        RankError: it is not JSON, or too long.
    """
    if len(data) > MOST_BYTES:
        raise make_foreign_value_error(data, where, f"at most {MOST_BYTES:,} bytes")
    try:
        return json.loads(data)
    except (ValueError, RecursionError):  # a deeply nested list is a RecursionError
        raise make_foreign_value_error(data, where, "JSON") from None


def encode_error(error: ClueError | None) -> dict[str, str | None] | None:
    """Turn an error into plain data; what is not text in it becomes text."""
    if error is None:
        return None
    kind = next(kind for kind in type(error).__mro__ if kind in ERROR_CLASSES.values())
    parts = {name: getattr(error, name) for name in _PARTS}
    return {"class": kind.__name__} | {
        name: None if part is None else str(part) for name, part in parts.items()
    }


def decode_error(value: Any, where: str) -> ClueError | None:
    """Make the error again that `encode_error` turned into plain data.

    Raises:
        RankError: the value is nothing that `encode_error` returns.
    """
    if value is None:
        return None
    fits = (
        isinstance(value, dict)
        and value.keys() == {"class", *_PARTS}
        and isinstance(value["class"], str)
        and value["class"] in ERROR_CLASSES
        and isinstance(value["what"], str)
        and all(isinstance(value[name], str | None) for name in _PARTS)
    )
    if not fits:
        raise make_foreign_value_error(value, where, "an error of clue_dist")
    parts = {name: value[name] and clean_text(value[name]) for name in _PARTS}
    return ERROR_CLASSES[value["class"]](parts.pop("what"), **parts)


def clean_text(text: str) -> str:
    """Replace what a terminal might obey, or a stream could not encode; cut what is very long."""
    return "".join(
        character if character.isprintable() or character == "\n" else "?"
        for character in text[:MOST_CHARACTERS]
    )


def make_foreign_value_error(value: Any, where: str, expected: str) -> RankError:
    """Make the error about a value that no rank of this job can have written."""
    shown = value if isinstance(value, bytes) else repr(value).encode()
    more = f" ... ({len(shown):,} bytes)" if len(shown) > _SHOWN_BYTES else ""
    return RankError(
        "the ranks read something that no rank of this job writes",
        where=where,
        got=f"{shown[:_SHOWN_BYTES]!r}{more}",
        expected=expected,
        fix="keep strangers away from the port where the ranks meet (MASTER_PORT), and start all "
        "ranks from the same version of clue_dist",
    )
