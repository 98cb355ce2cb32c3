"""From the inputs on the command line to what the conversion reads."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Mapping, Sequence

from clue_dist.errors import DataError
from clue_dist.files import parse_path
from data_prep.options import InputArgument, ReadingOptions, require_known_modalities
from data_prep.readers.formats import find_format
from data_prep.readers.fragments import ConversionInput

# A modality's name holds no slash, so that a path may hold `=`.
_INPUT = re.compile(r"(?:(?P<dataset>[A-Za-z0-9_.-]+):)?(?:(?P<modality>[^=/]+)=)?(?P<path>.+)")


def parse_inputs(texts: Sequence[str], options: ReadingOptions) -> list[ConversionInput]:
    """Open every input, `[DATASET:][NAME=]PATH`, in the order of the command line.

    Raises:
        DataError: a file that is missing or in no known format; a modality that a file lacks; a
            layer, column, list of barcodes or kind of a modality that no input has.
    """
    inputs: list[ConversionInput] = []
    modalities: defaultdict[str, list[str]] = defaultdict(list)  # by flag that a format knows
    for text in texts:
        argument = _parse_argument(text)
        input_format = find_format(argument.path)
        opened = input_format.open_inputs(argument, options)
        inputs += opened
        for flag in input_format.flags:
            modalities[flag] += [given.modality for given in opened]
    _require_modalities([given.modality for given in inputs], modalities, options)
    return inputs


def _parse_argument(text: str) -> InputArgument:
    fix = "check the path; inputs are written NAME=FILE, FILE.h5mu, or DATASET:NAME=FILE"
    match = _INPUT.fullmatch(text)
    if match is None:
        raise DataError("not an input", where="the inputs", got=repr(text), fix=fix)
    path = parse_path(match["path"])
    if not path.exists():
        raise DataError("no such input", where=text, got=f"{path} does not exist", fix=fix)
    if not (path.is_file() or path.is_dir()):
        what = "a pipe, socket or device"
        raise DataError("an input is a file or a folder", where=text, got=what, fix=fix)
    return InputArgument(text, path.resolve(), match["dataset"] or "", match["modality"])


def _require_modalities(
    names: list[str], modalities: Mapping[str, list[str]], options: ReadingOptions
) -> None:
    """Refuse options that would be left undone.

    Args:
        names: names of the modalities of all inputs.
        modalities: by flag, those of inputs whose format knows the flag.
        options: the options.
    """
    require_known_modalities("--kind", options.kinds, names)
    options.id_columns.require_known(names)
    options.layers.require_known(modalities["--layer"])
    if options.layers.default is not None and not modalities["--layer"]:
        where = f"--layer {options.layers.default}"
        raise DataError(
            "no input has layers", where=where, expected="an .h5ad or .h5mu among the inputs"
        )
    options.barcodes.require_known(modalities["--barcodes"])
    for flag, is_given in (
        ("--barcodes", options.barcodes.default is not None),
        ("--cut-sites", options.cut_sites),
    ):
        if is_given and not modalities[flag]:
            raise DataError("no input is a fragments file", where=flag, fix=f"leave {flag} out")
