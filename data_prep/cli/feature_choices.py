"""What the command line says about features, modality by modality: which, how binned, how many."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import get_args

from clue_dist.errors import DataError, list_names
from clue_dist.files import parse_path
from clue_dist.kinds import KINDS, infer_kind
from data_prep.options import FeatureChoice, Mode, PerModality
from data_prep.readers.text_files import read_lines

# Kinds whose features `--bins` can lay into bins of the genome, and those whose features `--top` can rank.
BINNABLE = [name for name, kind in KINDS.items() if kind.binnable]
SELECTABLE = [name for name, kind in KINDS.items() if kind.selection]


def parse_choices(
    modalities: Sequence[str],
    kinds: Mapping[str, str],
    features: Sequence[str] = (),
    bins: Sequence[str] = (),
    top: Sequence[str] = (),
    reference: str | Path | None = None,
) -> dict[str, FeatureChoice]:
    """The choice of each modality. features: MODE or FILE, each optionally `NAME=`; bins, top: NAME=NUMBER.

    Raises:
        DataError: something that is not one of these; an unknown modality; a kind that cannot be binned or selected;
            a choice of features beside a reference, which decides them alone.
    """
    names = list(dict.fromkeys(modalities))
    if reference is not None and (features or top):
        flag = "--features" if features else "--top"
        raise DataError(
            f"the store of `--features-from` decides the features alone, so `{flag}` would be left undone",
            where=f"{flag} {' '.join(features or top)}, --features-from {reference}",
            fix=f"leave out {flag}, or --features-from",
        )
    asked = PerModality.parse_values(features, "--features")
    asked.require_known(names)
    if (
        len(names) > 1
        and asked.default
        and asked.default not in get_args(Mode)
        and parse_path(asked.default).is_file()
    ):
        raise DataError(
            "a list of features belongs to one modality",
            where=f"--features {asked.default}",
            got=f"modalities {list_names(names)}",
            fix=f"--features {names[0]}={asked.default}",
        )
    widths = _numbers(bins, "--bins", names, kinds, BINNABLE)
    numbers = _numbers(top, "--top", names, kinds, SELECTABLE)
    return {
        name: _choice(asked.get_value(name), widths.get(name), numbers.get(name)) for name in names
    }


def _choice(features: str | None, bins: int | None, top: int | None) -> FeatureChoice:
    if features is None or features in get_args(Mode):
        return FeatureChoice(features, None, bins, top)  # type: ignore[arg-type]
    path = parse_path(features)
    if not path.is_file():
        expected = f"{list_names(get_args(Mode))}, or a file that lists features, one a line"
        raise DataError(
            "no such choice of features", where="--features", got=features, expected=expected
        )
    names = [line.split("\t")[0].strip() for line in read_lines(path)]
    if not names or len(set(names)) < len(names):
        seen: set[str] = set()
        twice = [n for n in names if n in seen or seen.add(n)]  # type: ignore[func-returns-value]
        what = (
            "a list of features names some more than once"
            if names
            else "a list of features is empty"
        )
        raise DataError(
            what, where=path, got=list_names(twice) or None, expected="a feature a line, each once"
        )
    return FeatureChoice(None, tuple(names), bins, top)


def _numbers(
    texts: Sequence[str],
    flag: str,
    names: Sequence[str],
    kinds: Mapping[str, str],
    fitting: Sequence[str],
) -> dict[str, int]:
    asked = PerModality.parse_values(texts, flag)
    asked.require_known(names)
    if asked.default is not None:
        raise DataError(
            "not NAME=NUMBER", where=flag, got=asked.default, expected=f"{fitting[0]}=5000, say"
        )
    for name, value in asked.by_modality.items():
        if not value.isdecimal() or not 1 <= int(value) < 2**31:
            raise DataError(
                "not a number from 1 on", where=f"{flag} {name}={value}", got=value or "nothing"
            )
        if (kind := infer_kind(name, kinds)) not in fitting:
            raise DataError(
                "not for this kind", where=f"{flag} {name}", got=kind, expected=list_names(fitting)
            )
    return {name: int(value) for name, value in asked.by_modality.items()}
