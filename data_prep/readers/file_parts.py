"""The parts of a file: matrices each of which can become a modality, and those an input means."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from clue_dist.errors import DataError, format_count, list_names
from clue_dist.kinds import KINDS, find_kinds, match_alias, suggest_kind
from data_prep.options import IN_MEMORY, InputArgument, ReadingOptions


@dataclass(frozen=True)
class FilePart:
    """A matrix of a file, or some columns of it, that can become a modality."""

    key: str  # what picks it, behind the path: `FILE:KEY`; a 10x feature type, `obsm/NAME`, ...
    modality: str | None = None  # the name it gets where a person gives none; None: one is needed
    suggestion: str = "rna"  # a name for it, for messages
    is_whole: bool = False  # all there is: whatever a person calls it, it is meant
    # Taken only where its key is typed, as tables beside the matrix are: most hold no modality.
    on_request: bool = False
    n_features: int | None = None  # None: not known before the file is read
    holds_counts: bool = True  # of parts on request, which are named where they hold counts
    # Layers of which a person must name one, as there is no X; first those that hold counts.
    layers: tuple[str, ...] = ()


def list_type_parts(types: Sequence[str]) -> list[FilePart]:
    """List a part for each feature type, which is called as the kind that it names.

    Args:
        types: (features,) as 10x calls them: "Gene Expression", "Antibody Capture", ...
    """
    sizes = Counter(types) or Counter([""])
    return [
        FilePart(
            feature_type,
            match_alias(feature_type),
            _suggest_name(feature_type),
            is_whole=len(sizes) == 1,
            n_features=sizes[feature_type],
        )
        for feature_type in sorted(sizes, key=_rank_type)
    ]


def _suggest_name(feature_type: str) -> str:
    """A modality's name for a feature type: `guide` for "CRISPR Guide Capture"."""
    words = [word for word in re.findall(r"[a-z0-9]+", feature_type.lower()) if word != "capture"]
    return match_alias(feature_type) or (words[-1] if words else "rna")


def _rank_type(feature_type: str) -> tuple[int, str]:
    """Sort types as the table of kinds has their kinds, and the others behind them by name."""
    kind = match_alias(feature_type)
    return list(KINDS).index(kind) if kind else len(KINDS), feature_type


def choose_parts(
    argument: InputArgument, parts: Sequence[FilePart], options: ReadingOptions
) -> list[tuple[str, FilePart]]:
    """Choose the parts that an input means, each with the name of the modality it becomes.

    It is the part whose key was typed, else the one that fits the modality's name, else all parts
    that name a modality themselves.

    Raises:
        DataError: no part, or several, fit.
    """
    usual = [part for part in parts if not part.on_request]
    modality, key = argument.modality, argument.key
    if key is None and modality is not None:
        key = options.feature_types.get_value(modality)
    if key is not None:
        part = _find_key(argument, key, parts)
        return [(modality or part.modality or _require_name(argument, part), part)]
    if modality is None:
        return _take_named_parts(argument, usual)
    if len(usual) == 1 and usual[0].is_whole:
        return [(modality, usual[0])]
    return [(modality, _find_fitting(argument, modality, usual, options.kinds))]


def _take_named_parts(
    argument: InputArgument, parts: Sequence[FilePart]
) -> list[tuple[str, FilePart]]:
    """Take every part that names a modality itself."""
    if not parts:
        raise DataError("the file holds no modality", where=argument.text)
    named = [(part.modality, part) for part in parts if part.modality is not None]
    if not named:
        _require_name(argument, parts[0])
    names = Counter(name for name, _ in named)
    if repeated := [name for name in names if names[name] > 1]:
        keys = [part.key for name, part in named if name in repeated]
        raise DataError(
            f"two parts of the file would become {repeated[0]}",
            where=argument.text,
            got=list_names(keys),
            fix=f"pick one: `{_pick_part(argument, repeated[0], keys[0])}`",
        )
    return named


def _require_name(argument: InputArgument, part: FilePart) -> str:
    raise DataError(
        "the input needs a modality's name",
        where=argument.text,
        got=f"features of type {part.key!r}" if part.key else None,
        fix=f"write it as `{part.suggestion}={argument.path.name}`, say",
    )


def _find_key(argument: InputArgument, key: str, parts: Sequence[FilePart]) -> FilePart:
    """Find the part with a key; capitals do not count where this leaves no doubt."""
    exact = [part for part in parts if part.key == key]
    found = exact or [part for part in parts if part.key.lower() == key.lower()]
    if len(found) != 1:
        raise DataError(
            "the file has no such part",
            where=argument.text,
            got=list_keys(parts) or "one matrix, without a key",
            expected=key,
        )
    return found[0]


def _find_fitting(
    argument: InputArgument, modality: str, parts: Sequence[FilePart], kinds: Mapping[str, str]
) -> FilePart:
    """Find the one part that a modality's name fits: by the name, by its words, by its kind."""
    words = set(re.findall(r"[a-z0-9]+", modality.lower()))
    wanted = find_kinds(modality)
    # Where some part is of no known kind, a kind that only `--kind` gives does not say which part
    # is meant: guides may be stored as proteins are.
    if not wanted and modality in kinds and all(find_kinds(part.key) for part in parts):
        wanted = [kinds[modality]]
    for fits in (
        lambda part: part.key == modality,
        lambda part: words <= set(re.findall(r"[a-z0-9]+", part.key.lower())),
        lambda part: len(wanted) == 1 and find_kinds(part.key) == wanted,
    ):
        found = [part for part in parts if fits(part)]
        if len(found) == 1:
            return found[0]
    first = parts[0].key if parts else "KEY"
    raise DataError(
        "the file has no such modality",
        where=argument.text,
        got=list_keys(parts) or "nothing",
        expected=modality,
        fix=f"pick one: `{_pick_part(argument, modality, first)}`",
    )


def describe_left_out(argument: InputArgument, part: FilePart) -> str:
    """Say that a part of a file becomes no modality, and what would make it one."""
    features = "" if part.n_features is None else f" ({format_count(part.n_features, 'feature')})"
    if argument.path.name.startswith(IN_MEMORY):
        return f"{IN_MEMORY}: {part.key!r}{features} is left out; a MuData can hold it, too"
    name = part.modality or part.suggestion
    kind = "" if find_kinds(name) else f" --kind {name}={suggest_kind(part.key) or 'adt'}"
    taking = f"`{_pick_part(argument, name, part.key)}{kind}`"
    return f"{argument.typed_path}: {part.key!r}{features} is left out; {taking} takes it, too"


def _pick_part(argument: InputArgument, modality: str, key: str) -> str:
    """The input that a person types to pick a part."""
    dataset = f"{argument.dataset}:" if argument.dataset else ""
    return f'{dataset}{modality}="{argument.typed_path}:{key}"'


def list_keys(parts: Sequence[FilePart]) -> str:
    """The keys of all parts, in one phrase."""
    return list_names(part.key for part in parts if part.key)
