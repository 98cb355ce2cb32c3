"""What files are, what `convert` would make of them, and the command to type.

A command is guessed from the files, then rehearsed: that is all of a conversion that comes before
counts are read. Where it would stop, the remedies that fit its error are rehearsed, too.
"""

from __future__ import annotations

import io
import shlex
from collections.abc import Callable, Mapping, Sequence
from contextlib import redirect_stderr
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

from clue_dist.errors import DataError, format_count, list_names
from clue_dist.store import layout
from data_prep.conversion.pairing import ALIKE_SHARE, PairingSurvey, find_droplets
from data_prep.convert import format_feature_note
from data_prep.jobs.workers import ThreadPool
from data_prep.options import FIELDS, InputArgument
from data_prep.planned_cells import (
    ConversionOptions,
    PlannedCells,
    plan_cells,
    refuse_equal_modalities,
)
from data_prep.readers.formats import FileDescription, describe_file
from data_prep.readers.fragments import ConversionInput, FragmentsInput
from data_prep.readers.source import PROBED_VALUES
from data_prep.remedies import Remedy, list_remedies
from data_prep.suggested_command import Command, guess_command

MOST_REMEDIES = 8  # that are put together


@dataclass(frozen=True)
class Rehearsal:
    """What a conversion would write."""

    lines: list[str]
    survey: PairingSurvey
    modalities: list[str]


Rehearse = Callable[[Command], Rehearsal]


@dataclass(frozen=True)
class Attempt:
    """A command, and what it would do."""

    command: Command
    hints: list[str]  # what `convert` says of the inputs, as of what it leaves out
    rehearsal: Rehearsal | None
    error: DataError | None  # why it would stop


@dataclass(frozen=True)
class Diagnosis:
    """The best command that was found."""

    best: Attempt
    reasons: list[str]  # what each change of the first guess is for


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
    readings = [
        reading
        for reading in planned.plan_readings(options, work)
        if reading.n_rows and not reading.source.count_parts()
    ]
    refuse_equal_modalities(readings, planned.plan)
    for reading in readings:
        reading.read_rows(*reading.split_rows(PROBED_VALUES)[0])


_NO_CELLS = PairingSurvey({}, {}, 0, (), False)


def _describe_plan(planned: PlannedCells) -> list[str]:
    """Say what a store would hold."""
    lines = [
        f"{name}: {format_count(modality.n_features, 'feature')}, of kind {modality.kind}"
        for name, modality in planned.plan.modalities.items()
    ]
    for (source, _), note in zip(planned.sources, planned.plan.notes, strict=True):
        lines += [line.strip() for line in format_feature_note(source.display_name, note)]
    lines.append(format_count(len(planned.cells), "cell"))
    if len(planned.plan.modalities) > 1:
        lines += planned.describe_pairing()
    for field, names in planned.cells.names.items():
        shown = f"{len(names)} different ({list_names(names, 5)})" if names else "none"
        lines.append(f"{field}: {shown}{_suggest_key(field, planned) if not names else ''}")
    return lines


def _suggest_key(field: str, planned: PlannedCells) -> str:
    """The flag that would name a field's column, and the columns to choose from; "" if none is."""
    if field not in FIELDS:
        return ""
    taken = {column for other, column in FIELDS.items() if planned.cells.names.get(other)}
    columns = dict.fromkeys(column for _, head in planned.sources for column in head.obs_columns)
    free = [column for column in columns if column not in taken]
    return f"; --{field}-key names a column, one of {list_names(free, 5)}" if free else ""


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
        taken = {given.number for given in diagnosis.best.command.inputs}
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
        size = ""
        if each.n_cells is not None:
            size = f"{format_count(each.n_cells, 'cell')} x {each.n_features:,}, "
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
    attempt, reasons = _try_command(command, rehearse), []
    for _ in range(MOST_REMEDIES):
        if attempt.rehearsal is None:
            chosen = _choose_remedy(attempt, files, rehearse)
        elif better := _pair_more(attempt.command, attempt.rehearsal):
            chosen = better.reason, _try_command(better.command, rehearse)
        else:
            break
        if chosen is None:
            break
        reason, mended = chosen
        reasons.append(_explain_change(attempt.command, mended.command, reason))
        attempt = mended
    return Diagnosis(attempt, reasons)


def _try_command(command: Command, rehearse: Rehearse) -> Attempt:
    """Rehearse a command, and keep what `convert` would say of its inputs."""
    with redirect_stderr(io.StringIO()) as said:
        try:
            rehearsal, error = rehearse(command), None
        except DataError as refusal:
            rehearsal, error = None, refusal
    return Attempt(command, said.getvalue().splitlines(), rehearsal, error)


def _choose_remedy(
    stopped: Attempt, files: Mapping[int, FileDescription], rehearse: Rehearse
) -> tuple[str, Attempt] | None:
    """Choose the first remedy that goes through, or stops at what can be mended, too.

    Where there is none, one that merely stops elsewhere is better than nothing.

    Returns:
        What the remedy is for, and what it would do.
    """
    assert stopped.error is not None
    second_choice = None
    for remedy in list_remedies(stopped.command, files, stopped.error):
        attempt = _try_command(remedy.command, rehearse)
        chosen = remedy.reason, attempt
        if attempt.error is None:
            return chosen
        if _stops_elsewhere(attempt.error, stopped.error):
            if attempt.error.mistake is not None:
                return chosen
            second_choice = second_choice or chosen
    return second_choice


def _stops_elsewhere(error: DataError, before: DataError) -> bool:
    """Whether a command goes further than before; fewer cells of the same kind are no help."""
    after, earlier = ((type(each.mistake), str(each.where)) for each in (error, before))
    return after != earlier


def _explain_change(before: Command, after: Command, reason: str) -> str:
    """Say why a command has other words than before."""
    new = [word for word in after.words if word not in before.words]
    return f"{shlex.join(new)}: {reason}"


def _pair_more(command: Command, rehearsal: Rehearsal) -> Remedy | None:
    """The command with a flag that pairs more cells or leaves empty droplets out."""
    survey, flags = rehearsal.survey, [name for name, _ in command.flags]
    if survey.alike_share > ALIKE_SHARE and "--pair-barcodes" not in flags:
        reason = f"{format_count(survey.n_alike, 'more cell')} would pair"
        return Remedy(command.add_flag("--pair-barcodes", "core"), reason)
    for large, small, ratio in find_droplets(survey, rehearsal.modalities):
        if "--barcodes" not in flags:
            reason = f"{large} has {ratio} times the cells of {small}"
            return Remedy(command.add_flag("--barcodes", f"{large}={small}"), reason)
    return None


def _format_diagnosis(diagnosis: Diagnosis) -> list[str]:
    """Say what a command would do, then the command."""
    best, introduction = diagnosis.best, []
    lines = [*best.hints, *diagnosis.reasons]
    if best.rehearsal is not None:
        lines += ["convert would write"]
        lines += [f"  {line.strip()}" for line in best.rehearsal.lines]
    else:
        lines += [f"convert would stop: {_indent(str(best.error))}"]
        introduction = ["as far as files tell, before that is mended:"]
    words = ["python", "-m", "data_prep", "convert", *best.command.words]
    return [*lines, "", *introduction, shlex.join([*words, "--out", "STORE.zarr"])]
