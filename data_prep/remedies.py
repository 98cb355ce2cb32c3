"""What mends a command: for each mistake that `convert` tells of, the commands worth a try."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import numpy as np

from clue_dist.errors import DataError
from clue_dist.kinds import UnknownKind, infer_kind
from data_prep.conversion.cell_problems import DisputedField, RepeatedBarcodes
from data_prep.features.agreement import DifferingFeatures, DifferingNames
from data_prep.readers.barcode_cores import extract_cores
from data_prep.readers.formats import FileDescription, PartDescription
from data_prep.readers.fragments import FragmentsInput
from data_prep.suggested_command import (
    BIN_WIDTH,
    Command,
    guess_modality,
    list_modalities,
    read_barcodes,
)

MOST_COLUMNS = 20  # of obs, that are tried for a data set
SAME_SHARE = 0.5  # of the cells of one file in another: they are perhaps the same cells twice
KEPT_SHARE = 0.5  # of the features of each file: an intersection that keeps less loses too much
NAME_COLUMNS = [
    "gene_ids",
    "gene_id",
    "ensembl_id",
    "gene_symbols",
    "gene_symbol",
    "gene_name",
    "feature_name",
    "symbol",
]


class Remedy(NamedTuple):
    """A command to try, and what it is for."""

    command: Command
    reason: str


def list_remedies(
    command: Command, files: Mapping[int, FileDescription], error: DataError
) -> Iterator[Remedy]:
    """List the commands that may mend an error, the best one first.

    Args:
        command: the command that was refused.
        files: the files, by the number of their input.
        error: why it was refused.
    """
    match error.mistake:
        case DifferingFeatures() as differing:
            yield from _bring_together(command, differing, error.what)
            return
        case UnknownKind(modality):
            commands = _name_kind(command, files, modality)
        case RepeatedBarcodes():
            commands = _tell_datasets_apart(command, files)
        case DisputedField(field):
            commands = iter([command.add_flag(f"--{field}-key", "none")])
        case DifferingNames(modality):
            commands = _name_alike(command, files, modality)
        case _:
            return
    for mended in commands:
        yield Remedy(mended, error.what)


def _bring_together(command: Command, differing: DifferingFeatures, what: str) -> Iterator[Remedy]:
    """List what brings files with other features together."""
    name = differing.modality
    if _is_binnable(command, name):
        yield Remedy(command.add_flag("--bins", f"{name}={BIN_WIDTH}"), what)
    shared = f"{differing.n_shared:,} are in every file"
    if differing.kept_share > KEPT_SHARE:
        reason = f"{what}: {shared}, {differing.kept_share:.0%} of those of each file at least"
        yield Remedy(command.add_flag("--features", f"{name}=intersection"), reason)
    else:
        reason = (
            f"{what}: {shared}, only {differing.kept_share:.0%} of those of the largest; absent "
            f"ones become zero (`{name}=intersection` would drop the others)"
        )
        yield Remedy(command.add_flag("--features", f"{name}=union"), reason)


def _is_binnable(command: Command, modality: str) -> bool:
    """Whether the features of a modality are regions, which bins can count."""
    kinds = dict(value.split("=", 1) for name, value in command.flags if name == "--kind")
    return infer_kind(modality, kinds) == "atac"


def _name_kind(
    command: Command, files: Mapping[int, FileDescription], modality: str
) -> Iterator[Command]:
    """Guess the kind of a modality whose name says none."""
    for each in _list_parts(command, files, modality):
        yield command.add_flag("--kind", f"{modality}={guess_modality(each)}")


def _list_parts(
    command: Command, files: Mapping[int, FileDescription], modality: str
) -> list[PartDescription]:
    """List the parts of files that become a modality, or may."""
    parts = []
    for given in list_modalities(command, files).get(modality, []):
        of_file = files[given.number].parts
        named = [each for each in of_file if each.part.modality == modality]
        picked = [each for each in of_file if each.part.key == given.key]
        parts += named or picked or of_file[:1]
    return parts


def _tell_datasets_apart(
    command: Command, files: Mapping[int, FileDescription]
) -> Iterator[Command]:
    """Name a data set for each file, else a column of obs that tells data sets apart."""
    if apart := _separate_files(command, files):
        yield apart
    columns = [c for file in files.values() for each in file.parts for c in each.obs_columns]
    for column in list(dict.fromkeys(columns))[:MOST_COLUMNS]:
        yield command.add_flag("--dataset-key", column)


def _name_alike(
    command: Command, files: Mapping[int, FileDescription], modality: str
) -> Iterator[Command]:
    """Count regions in bins, else take the names of features from a column of var."""
    if _is_binnable(command, modality):
        yield command.add_flag("--bins", f"{modality}={BIN_WIDTH}")
    sources = [each.source for each in _list_parts(command, files, modality)]
    columns = {
        column
        for source in sources
        if not isinstance(source, FragmentsInput)
        for column in source.read_head().var_columns
    }
    for column in NAME_COLUMNS:
        if column in columns:
            yield command.add_flag("--feature-ids", f"{modality}={column}")


def _separate_files(command: Command, files: Mapping[int, FileDescription]) -> Command | None:
    """The command with a data set for each file of a modality, and for the files that go with it.

    Files of other modalities belong to the one with which they share most barcodes.
    """
    groups = list(list_modalities(command, files).values())
    largest = max(groups, key=len)
    leaders = list(dict.fromkeys(largest))
    if len({given.number for given in leaders}) < 2 or any(i.dataset for i in command.inputs):
        return None
    cores = {given: extract_cores(read_barcodes(given, files)) for given in command.inputs}
    for first, second in itertools.combinations(leaders, 2):
        if np.isin(cores[first], cores[second]).mean() > SAME_SHARE:
            return None
    names = {}
    for i, given in enumerate(leaders):
        stem = re.sub(r"[^A-Za-z0-9_.-]+", "_", Path(given.path).name.split(".")[0])
        others = [Path(other.path).name.split(".")[0] for other in leaders]
        names[given] = stem if others.count(stem) == 1 else f"{stem}{i + 1}"
    inputs = []
    for given in command.inputs:
        shares = [np.isin(cores[given], cores[leader]).mean() for leader in leaders]
        leader = given if given in names else leaders[int(np.argmax(shares))]
        inputs.append(replace(given, dataset=names[leader]))
    return replace(command, inputs=tuple(inputs))
