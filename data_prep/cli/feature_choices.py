"""What the command line says about the features of each modality: which, how binned, how many."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import get_args

from clue_dist.errors import DataError, list_names
from clue_dist.files import parse_path
from clue_dist.kinds import KINDS, infer_kind
from data_prep.options import FeatureChoice, Mode, PerModality
from data_prep.readers.text_files import read_lines

BINNABLE = [name for name, kind in KINDS.items() if kind.binnable]  # kinds for `--bins`
SELECTABLE = [name for name, kind in KINDS.items() if kind.selection]  # kinds for `--top`


def parse_choices(
    modalities: Sequence[str],
    kinds: Mapping[str, str],
    features: Sequence[str] = (),
    bins: Sequence[str] = (),
    top: Sequence[str] = (),
    reference: str | Path | None = None,
    added: Sequence[str] = (),
) -> dict[str, FeatureChoice]:
    """The choice of each modality.

    Args:
        modalities: modalities of the inputs; some may be there several times.
        kinds: by modality, where its name says none.
        features: MODE or FILE for all modalities, NAME=MODE or NAME=FILE for one.
        bins: NAME=WIDTH.
        top: NAME=NUMBER.
        reference: a store or run that decides the features.
        added: modalities whose features it does not decide.

    Raises:
        DataError: something that is not one of these; an unknown modality; a kind that cannot be
            binned or selected; a choice of features beside a reference.
    """
    names = list(dict.fromkeys(modalities))
    free = tuple(f"{name}=" for name in added)
    for flag, texts in (("--features", features), ("--top", top)):
        values = [text for text in texts if not text.startswith(free)]
        if reference is None or not values:
            continue
        raise DataError(
            "what `--features-from` names decides the features alone, so "
            f"`{flag}` would be left undone",
            where=f"{flag} {' '.join(values)}, --features-from {reference}",
            fix=f"leave out {flag}, or --features-from",
        )
    modes = PerModality.parse_values(features, "--features")
    modes.require_known(names)
    general = modes.default if modes.default not in get_args(Mode) else None
    if len(names) > 1 and general and parse_path(general).is_file():
        raise DataError(
            "a list of features belongs to one modality",
            where=f"--features {general}",
            got=f"modalities {list_names(names)}",
            fix=f"--features {names[0]}={general}",
        )
    widths = _parse_numbers(bins, "--bins", names, kinds, BINNABLE)
    numbers = _parse_numbers(top, "--top", names, kinds, SELECTABLE)
    return {
        name: _make_choice(modes.get_value(name), widths.get(name), numbers.get(name))
        for name in names
    }


def _make_choice(
    features: str | None, bin_width: int | None, top_features: int | None
) -> FeatureChoice:
    """The choice of one modality. features: a mode, or the path of a list."""
    if features is None or features in get_args(Mode):
        return FeatureChoice(features, None, bin_width, top_features)  # type: ignore[arg-type]
    path = parse_path(features)
    if not path.is_file():
        expected = f"{list_names(get_args(Mode))}, or a file that lists features, one a line"
        what = "no such choice of features"
        raise DataError(what, where="--features", got=features, expected=expected)
    names = [line.split("\t")[0].strip() for line in read_lines(path)]
    expected = "a feature a line, each once"
    if not names:
        raise DataError("a list of features is empty", where=path, expected=expected)
    seen: set[str] = set()
    repeated = []
    for name in names:
        if name in seen:
            repeated.append(name)
        seen.add(name)
    if repeated:
        what = "a list of features names some more than once"
        raise DataError(what, where=path, got=list_names(repeated), expected=expected)
    return FeatureChoice(None, tuple(names), bin_width, top_features)


def _parse_numbers(
    texts: Sequence[str],
    flag: str,
    names: Sequence[str],
    kinds: Mapping[str, str],
    fitting: Sequence[str],
) -> dict[str, int]:
    """The numbers of a flag, by modality. names: of all modalities; fitting: kinds for the flag."""
    values = PerModality.parse_values(texts, flag)
    values.require_known(names)
    if values.default is not None:
        expected = f"{fitting[0]}=5000, say"
        raise DataError("not NAME=NUMBER", where=flag, got=values.default, expected=expected)
    for name, value in values.by_modality.items():
        if not value.isdecimal() or not 1 <= int(value) < 2**31:
            where = f"{flag} {name}={value}"
            raise DataError("not a number from 1 on", where=where, got=value or "nothing")
        kind = infer_kind(name, kinds)
        if kind not in fitting:
            where, expected = f"{flag} {name}", list_names(fitting)
            raise DataError("not for this kind", where=where, got=kind, expected=expected)
    return {name: int(value) for name, value in values.by_modality.items()}
