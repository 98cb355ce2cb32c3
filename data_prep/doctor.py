"""What files are, what `convert` would make of them, and the command to type.

A command is guessed from the files, then rehearsed: that is all of a conversion that comes before
counts are read. Where it would stop, the remedies that fit its error are rehearsed, too.
"""

from __future__ import annotations

import io
import itertools
import re
import shlex
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import redirect_stderr
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np

from clue_dist.errors import DataError, list_names
from clue_dist.kinds import find_kinds
from clue_dist.store import layout
from data_prep.conversion.pairing import PairingSurvey, find_droplets
from data_prep.conversion.scatter import plan_readings
from data_prep.convert import format_feature_note
from data_prep.jobs.workers import ThreadPool
from data_prep.options import InputArgument
from data_prep.planned_cells import ConversionOptions, PlannedCells, plan_cells
from data_prep.readers.barcode_cores import extract_cores
from data_prep.readers.formats import FileDescription, describe_file
from data_prep.readers.fragments import ConversionInput, FragmentsInput
from data_prep.readers.source import PROBED_VALUES
from data_prep.suggested_command import (
    BIN_WIDTH,
    Command,
    guess_command,
    guess_modality,
    list_modalities,
    read_barcodes,
)

MOST_REMEDIES = 8  # that are put together
MOST_COLUMNS = 20  # of obs, that are tried for a data set
ALIKE_SHARE = 0.05  # of all cells: so many more pairs are no accident
SAME_SHARE = 0.5  # of the cells of one file in another: they are perhaps the same cells twice
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


@dataclass(frozen=True)
class Rehearsal:
    """What a conversion would write."""

    lines: list[str]
    survey: PairingSurvey
    modalities: list[str]


Rehearse = Callable[[Command], Rehearsal]


@dataclass(frozen=True)
class Diagnosis:
    """The best command that was found, and what it would do."""

    command: Command
    reasons: list[str]  # what each change of the first guess is for
    rehearsal: Rehearsal | None
    error: DataError | None  # why it would stop


def rehearse_conversion(inputs: Sequence[ConversionInput], options: ConversionOptions) -> Rehearsal:
    """Do what a conversion does before it reads counts; fragments, read as a whole, are left out.

    Raises:
        DataError: the conversion would stop.
    """
    sources = [given for given in inputs if not isinstance(given, FragmentsInput)]
    lines = [
        f"{given.modality}: {given.counted_unit} of {given.display_name}, known once it is read"
        for given in inputs
        if isinstance(given, FragmentsInput)
    ]
    if not sources:
        return Rehearsal(lines, _NO_CELLS, [])
    with TemporaryDirectory() as folder, redirect_stderr(io.StringIO()):
        planned = plan_cells(sources, options, None, Path(folder), ThreadPool())
        survey = planned.survey_pairs()
        _try_values(planned, options, Path(folder))
        return Rehearsal(lines + _describe_plan(planned), survey, list(planned.plan.modalities))


def _try_values(planned: PlannedCells, options: ConversionOptions, work: Path) -> None:
    """Read a few rows of each source, as the conversion does.

    Sources whose rows cannot be read directly are passed over.
    """
    sources, plan = planned.sources, planned.plan
    readings = plan_readings(
        sources,
        planned.heads,
        plan.modalities,
        plan.columns,
        planned.cells,
        work,
        options.round_counts,
    )
    for reading in readings:
        if reading.n_rows and not reading.source.count_parts():
            reading.read_rows(*reading.split_rows(PROBED_VALUES)[0])


_NO_CELLS = PairingSurvey({}, {}, 0, (), False)


def _describe_plan(planned: PlannedCells) -> list[str]:
    """Say what a store would hold."""
    lines = [
        f"{name}: {modality.n_features:,} features, of kind {modality.kind}"
        for name, modality in planned.plan.modalities.items()
    ]
    for source, note in zip(planned.sources, planned.plan.notes, strict=True):
        lines += [line.strip() for line in format_feature_note(source.display_name, note)]
    lines.append(f"{len(planned.cells):,} cells")
    if len(planned.plan.modalities) > 1:
        lines += planned.describe_pairing()
    for field, names in planned.cells.names.items():
        shown = f"{len(names)} different ({list_names(names, 5)})" if names else "none"
        lines.append(f"{field}: {shown}")
    return lines


def examine_files(
    arguments: Sequence[InputArgument], rehearse: Rehearse
) -> tuple[list[str], list[DataError]]:
    """Describe files, and find the command that converts them.

    Args:
        arguments: the files.
        rehearse: does what `convert` would, and raises its errors.

    Returns:
        Lines for people, and the errors of the files that cannot be read.
    """
    lines: list[str] = []
    errors: list[DataError] = []
    files: dict[int, FileDescription] = {}
    for number, argument in enumerate(arguments):
        if isinstance(argument.path, Path) and (argument.path / layout.MANIFEST).is_file():
            lines.append(f"{argument.text}: a store; `inspect` says what is in it")
            continue
        try:
            files[number] = describe_file(argument.path)
        except DataError as error:
            errors.append(error)
            lines.append(f"{argument.path.name}: {_indent(str(error))}")
        else:
            lines += _describe_parts(files[number])
    if files:
        diagnosis = find_command(guess_command(arguments, files), files, rehearse)
        taken = {given.number for given in diagnosis.command.inputs}
        lines += [
            f"{file.path.name} is left out: peaks are counted already"
            for number, file in files.items()
            if number not in taken
        ]
        lines += ["", *_format_diagnosis(diagnosis)]
    return lines, errors


def _indent(text: str) -> str:
    return text.replace("\n", "\n  ")


def _describe_parts(file: FileDescription) -> list[str]:
    """Say what a file is and holds."""
    lines = [f"{file.path.name}: {file.format.name}"]
    for each in file.parts:
        if each.part.on_request and not each.part.holds_counts:
            continue
        is_fragments = isinstance(each.source, FragmentsInput)
        name = each.part.key or ("fragments" if is_fragments else "matrix")
        size = "" if each.n_cells is None else f"{each.n_cells:,} cells x {each.n_features:,}, "
        values = "counts" if each.holds_counts else "values that are not whole numbers"
        lines.append(f"  {name}: {size}{values}")
        for what, names in (
            ("barcodes", each.barcodes),
            ("features", each.features),
            ("obs columns", each.obs_columns),
        ):
            if names:
                lines.append(f"    {what}: {list_names(names[:5])}")
    return lines


def find_command(
    command: Command, files: Mapping[int, FileDescription], rehearse: Rehearse
) -> Diagnosis:
    """Mend a command until it goes through and pairs what can be paired."""
    error: DataError | None = None
    reasons: list[str] = []
    for _ in range(MOST_REMEDIES):
        try:
            rehearsal = rehearse(command)
        except DataError as refusal:
            error = refusal
            remedies = _list_remedies(command, files, refusal)
            mended = next((each for each in remedies if _helps(each, refusal, rehearse)), None)
            if mended is None:
                break
            reasons.append(_explain_change(command, mended, refusal.what))
            command = mended
            continue
        better = _pair_more(command, rehearsal)
        if better is None:
            return Diagnosis(command, reasons, rehearsal, None)
        reasons.append(_explain_change(command, *better))
        command = better[0]
    return Diagnosis(command, reasons, None, error)


def _explain_change(before: Command, after: Command, reason: str) -> str:
    """Say why a command has other words than before."""
    new = [word for word in after.words if word not in before.words]
    return f"{shlex.join(new)}: {reason}"


def _helps(command: Command, refusal: DataError, rehearse: Rehearse) -> bool:
    """Whether a command goes through, or further than the one that was refused."""
    try:
        rehearse(command)
    except DataError as error:
        # Fewer cells of the same kind are no help.
        before, after = (
            (re.sub("[0-9]+", "", each.what), str(each.where)) for each in (refusal, error)
        )
        return after != before and "asked for" not in error.what
    return True


def _pair_more(command: Command, rehearsal: Rehearsal) -> tuple[Command, str] | None:
    """The command with a flag that pairs more cells or leaves empty droplets out, and why."""
    survey, flags = rehearsal.survey, [name for name, _ in command.flags]
    n_cells = sum(survey.n_cells.values())
    if survey.n_alike > ALIKE_SHARE * n_cells and "--pair-barcodes" not in flags:
        return command.add_flag("--pair-barcodes", "core"), f"{survey.n_alike:,} more cells pair"
    for large, small, ratio in find_droplets(survey, rehearsal.modalities):
        if "--barcodes" not in flags:
            reason = f"{large} has {ratio} times the cells of {small}"
            return command.add_flag("--barcodes", f"{large}={small}"), reason
    return None


def _list_remedies(
    command: Command, files: Mapping[int, FileDescription], error: DataError
) -> Iterator[Command]:
    """List the commands that may mend an error."""
    names = list(list_modalities(command, files))
    if "cannot tell from its name" in error.what:
        for each in (each for file in files.values() for each in file.parts):
            if each.part.modality in names and not find_kinds(each.part.modality):
                yield command.add_flag("--kind", f"{each.part.modality}={guess_modality(each)}")
    if "occur more than once" in error.what:
        if apart := _separate_files(command, files):
            yield apart
        columns = [c for file in files.values() for each in file.parts for c in each.obs_columns]
        for column in list(dict.fromkeys(columns))[:MOST_COLUMNS]:
            yield command.add_flag("--dataset-key", column)
    for field in ("batch", "label"):
        if f"disagree on their {field}" in error.what:
            yield command.add_flag(f"--{field}-key", "none")
    if "have different features" in error.what:
        if "atac" in names and "'atac'" in error.what:
            yield command.add_flag("--bins", f"atac={BIN_WIDTH}")
        yield command.add_flag("--features", "intersection")
    if re.search("^the files of modality .* share ", error.what):
        for name in names:
            for column in NAME_COLUMNS:
                yield command.add_flag("--feature-ids", f"{name}={column}")


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


def _format_diagnosis(diagnosis: Diagnosis) -> list[str]:
    """Say what a command would do, then the command."""
    lines, introduction = list(diagnosis.reasons), []
    if diagnosis.rehearsal is not None:
        lines += ["convert would write"]
        lines += [f"  {line.strip()}" for line in diagnosis.rehearsal.lines]
    else:
        lines += [f"convert would stop: {_indent(str(diagnosis.error))}"]
        introduction = ["as far as files tell, before that is mended:"]
    words = ["python", "-m", "data_prep", "convert", *diagnosis.command.words]
    return [*lines, "", *introduction, shlex.join([*words, "--out", "STORE.zarr"])]
