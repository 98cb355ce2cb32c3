"""The command that converts some files, guessed from what is in them and what they are called."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from clue_dist.kinds import KINDS, find_kinds
from clue_dist.store.location import Location, RemoteLocation
from clue_dist.store.region_names import find_spelling
from data_prep.options import InputArgument
from data_prep.readers.barcode_cores import extract_cores
from data_prep.readers.formats import FileDescription, PartDescription
from data_prep.readers.fragments import FragmentsInput

MANY_FEATURES = 3000  # more than any panel of proteins has
BIN_WIDTH = 5000  # base pairs, where a command needs bins

_PROTEIN = re.compile(r"CD\d+|.*-[ACGT]{10,}$|(anti|hu|mouse|Ig[GM]|HLA|HTO|ADT|TotalSeq)", re.I)

Flag = tuple[str, str]


@dataclass(frozen=True)
class CommandInput:
    """One input of a command: `[DATASET:][NAME=]PATH[:KEY]`."""

    number: int  # of the file, among those that were given
    path: str
    modality: str | None = None  # None: the file names its modalities
    key: str = ""
    dataset: str = ""

    @property
    def word(self) -> str:
        """As it is typed, but for quotes."""
        dataset = f"{self.dataset}:" if self.dataset else ""
        modality = f"{self.modality}=" if self.modality else ""
        return f"{dataset}{modality}{self.path}" + (f":{self.key}" if self.key else "")


@dataclass(frozen=True)
class Command:
    """What `convert` is to be called with."""

    inputs: tuple[CommandInput, ...]
    flags: tuple[Flag, ...] = ()

    @property
    def words(self) -> list[str]:
        """The arguments, without the store."""
        flags = [word for flag in self.flags for word in flag]
        return [given.word for given in self.inputs] + flags

    def add_flag(self, *flag: str) -> Command:
        """The same command with a flag more."""
        name, value = flag
        return replace(self, flags=(*self.flags, (name, value)))


def guess_command(
    arguments: Sequence[InputArgument], files: Mapping[int, FileDescription]
) -> Command:
    """Guess how `convert` would be called for files that are whatever they are called."""
    inputs: list[CommandInput] = []
    flags: list[Flag] = []
    fragments: list[CommandInput] = []
    for number, file in files.items():
        for given, parts in _list_inputs(number, arguments[number], file):
            if isinstance(parts[0].source, FragmentsInput):
                fragments.append(given)
                continue
            inputs.append(given)
            for each in parts:
                flags += _list_value_flags(given.modality or each.part.modality or "", each)
    command = Command(tuple(inputs), tuple(dict.fromkeys(flags)))
    modalities = list(list_modalities(command, files))
    if "atac" in modalities or not fragments:
        return command  # where peaks are counted already, fragments say nothing new
    command = replace(command, inputs=(*inputs, *fragments)).add_flag("--bins", f"atac={BIN_WIDTH}")
    if modalities:
        command = command.add_flag("--barcodes", f"atac={modalities[0]}")
        known = read_barcodes(command.inputs[0], files)
        for given in fragments:
            seen = np.array(files[given.number].parts[0].barcodes).astype("S")
            by_core = np.isin(extract_cores(seen), extract_cores(known)).any()
            if by_core and not np.isin(seen, known).any():
                return command.add_flag("--pair-barcodes", "core")
    return command


def _list_inputs(
    number: int, argument: InputArgument, file: FileDescription
) -> Iterator[tuple[CommandInput, list[PartDescription]]]:
    """List the inputs that a file gives, and the parts that each of them stands for."""
    path = _shorten_path(file.path)
    given = CommandInput(number, path, argument.modality, argument.key or "", argument.dataset)
    if argument.key is not None:
        yield given, [each for each in file.parts if each.part.key == argument.key] or file.parts
        return
    usual = [each for each in file.parts if not each.part.on_request]
    named = [each for each in usual if each.part.modality]
    beside = [
        (find_kinds(each.part.key)[0], each)
        for each in file.parts
        if each.part.on_request and each.part.holds_counts and find_kinds(each.part.key)
    ]
    if named and argument.modality is None:
        yield given, named
    elif usual:
        others = [name for name, _ in beside]
        modality = argument.modality or guess_modality(usual[0], others)
        yield replace(given, modality=modality), usual[:1]
    for name, each in beside:
        yield replace(given, modality=name, key=each.part.key), [each]


def _shorten_path(path: Location) -> str:
    """The path from the current folder on, where it lies below."""
    if isinstance(path, RemoteLocation):
        return str(path)
    here = Path.cwd().resolve()
    return str(path.relative_to(here)) if path.is_relative_to(here) else str(path)


def guess_modality(each: PartDescription, others: Sequence[str] = ()) -> str:
    """Guess what a matrix measures: by its features, else by the name of its file.

    Args:
        each: the matrix.
        others: what the tables beside it measure.

    Returns:
        A name that is that of its kind, too.
    """
    if isinstance(each.source, FragmentsInput) or find_spelling(each.features):
        return "atac"
    kinds = [
        kind
        for kind in find_kinds(each.source.display_name)
        if kind not in others and not (KINDS[kind].real_values and each.holds_counts)
    ]
    if each.n_features and each.n_features >= MANY_FEATURES:
        return "rna"
    if len(kinds) == 1:
        return kinds[0]
    n_proteins = sum(bool(_PROTEIN.match(feature)) for feature in each.features)
    return "adt" if 2 * n_proteins > len(each.features) else "rna"


def _list_value_flags(modality: str, each: PartDescription) -> list[Flag]:
    """The flags for a matrix that is not there, or holds no counts: another, or real values."""
    if each.part.layers:
        return [("--layer", f"{modality}={each.part.layers[0]}")]
    if each.holds_counts or isinstance(each.source, FragmentsInput):
        return []
    if layers := each.source.list_other_counts():
        return [("--layer", f"{modality}={layers[0]}")]
    return [("--kind", f"{modality}=dense")] if find_kinds(modality) == ["adt"] else []


def list_modalities(
    command: Command, files: Mapping[int, FileDescription]
) -> dict[str, list[CommandInput]]:
    """List the inputs of each modality of a command."""
    found: dict[str, list[CommandInput]] = {}
    for given in command.inputs:
        parts = files[given.number].parts
        names = [given.modality] if given.modality else [each.part.modality for each in parts]
        for name in names:
            if name is not None:
                found.setdefault(name, []).append(given)
    return found


def read_barcodes(given: CommandInput, files: Mapping[int, FileDescription]) -> np.ndarray:
    """Read the barcodes of the first part of an input, (n,) bytes; of fragments, some of them."""
    parts = files[given.number].parts
    each = next((each for each in parts if each.part.key == given.key), parts[0])
    if isinstance(each.source, FragmentsInput):
        return np.array(each.barcodes).astype("S")
    return each.source.read_head().barcodes[:]
