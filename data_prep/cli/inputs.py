"""From the inputs on the command line to what the conversion reads."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path

from clue_dist.errors import DataError
from clue_dist.files import parse_path
from clue_dist.process import print_error
from clue_dist.store.location import Location, parse_location
from data_prep.options import InputArgument, ReadingOptions, require_known_modalities
from data_prep.readers.file_parts import choose_parts, describe_left_out
from data_prep.readers.formats import find_format, locate_input
from data_prep.readers.fragments import ConversionInput, FragmentsInput
from data_prep.readers.text_table import TextTableSource, orient_table

_CHECK_PATH = (
    "check the path; inputs are written NAME=FILE, FILE.h5mu, NAME=FILE:KEY or DATASET:NAME=FILE"
)
# A modality's name holds no slash, so that a path may hold `=`; a URL names no data set.
_INPUT = re.compile(
    r"(?:(?P<dataset>[A-Za-z0-9_.-]+):(?!//))?(?:(?P<modality>[^=/]+)=)?(?P<path>.+)"
)

# A colon of the host has a port behind it, and comes before the path.
_URL = re.compile(r"(?P<url>[A-Za-z0-9]+://[^/]*(?:/[^:]*)?)(?::(?P<key>.+))?")


def parse_inputs(texts: Sequence[str], options: ReadingOptions) -> list[ConversionInput]:
    """Open every input, `[DATASET:][NAME=]PATH[:KEY]`, in the order of the command line.

    What a file holds beside what was asked for is told on stderr.

    Raises:
        DataError: a file that is missing or in no known format; a modality that a file lacks; a
            layer, column, list of barcodes or kind of a modality that no input has.
    """
    inputs: list[ConversionInput] = []
    modalities: defaultdict[str, list[str]] = defaultdict(list)  # by flag that a format knows
    left_out: dict[Location, dict[str, str]] = {}  # by file and key, what is told of it
    for text in texts:
        argument = parse_argument(text)
        input_format = find_format(argument.path)
        parts = input_format.list_parts(argument.path)
        others = left_out.setdefault(
            argument.path,
            {part.key: describe_left_out(argument, part) for part in parts if part.holds_counts},
        )
        for modality, part in choose_parts(argument, parts, options):
            inputs.append(input_format.open_part(argument, modality, part, options))
            others.pop(part.key, None)
            for flag in input_format.flags:
                modalities[flag].append(modality)
    for others in left_out.values():
        for sentence in others.values():
            print_error(sentence)
    inputs = _orient_tables(inputs)
    _require_modalities([given.modality for given in inputs], modalities, options)
    if options.cut_sites and not any(isinstance(given, FragmentsInput) for given in inputs):
        flag = "--cut-sites"
        raise DataError("no input is a fragments file", where=flag, fix=f"leave {flag} out")
    return inputs


def _orient_tables(inputs: list[ConversionInput]) -> list[ConversionInput]:
    """Find out where the cells of tables are, by the barcodes of the other inputs; say so."""
    unknown = [i for i, given in enumerate(inputs) if _is_unoriented(given)]
    barcodes = [
        (given.dataset, given.display_name, given.read_head().barcodes[:])
        for given in inputs
        if unknown and not isinstance(given, FragmentsInput) and not _is_unoriented(given)
    ]
    for i in unknown:
        given = inputs[i]
        assert isinstance(given, TextTableSource)
        inputs[i], sentence = orient_table(given, barcodes)
        print_error(sentence)
    return inputs


def _is_unoriented(given: ConversionInput) -> bool:
    return isinstance(given, TextTableSource) and given.cells_in_rows is None


def parse_argument(text: str) -> InputArgument:
    """Read `[DATASET:][NAME=]PATH[:KEY]`, where PATH is there."""
    match = _INPUT.fullmatch(text)
    if match is None:
        raise DataError("not an input", where="the inputs", got=repr(text), fix=_CHECK_PATH)
    dataset, modality = match["dataset"] or "", match["modality"]
    if url := _URL.fullmatch(match["path"]):
        location = parse_location(url["url"])
        return InputArgument(text, location, dataset, modality, url["key"])
    path, key = _split_key(match["path"])
    if dataset and modality is None and not path.exists() and parse_path(dataset).exists():
        # What looked like a data set is the file: `FILE:KEY`.
        dataset, path, key = "", parse_path(dataset), match["path"]
    if not path.exists():
        missing = f"{path} does not exist"
        raise DataError("no such input", where=text, got=missing, fix=_CHECK_PATH)
    if not (path.is_file() or path.is_dir()):
        what = "a pipe, socket or device"
        raise DataError("an input is a file or a folder", where=text, got=what, fix=_CHECK_PATH)
    found = locate_input(path)
    if found != path:
        print_error(f"{path}: {found.relative_to(path)} is what is read")
    return InputArgument(text, found.resolve(), dataset, modality, key)


def _split_key(text: str) -> tuple[Path, str | None]:
    """Split `PATH:KEY`, where there is a file at PATH and none that is called so as a whole."""
    places = [i for i, letter in enumerate(text) if letter == ":"]
    if places and not parse_path(text).exists():
        for place in places:
            if (path := parse_path(text[:place])).exists():
                return path, text[place + 1 :]
    return parse_path(text), None


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
    options.feature_types.require_known(modalities["--feature-type"])
    options.barcodes.require_known(names)
