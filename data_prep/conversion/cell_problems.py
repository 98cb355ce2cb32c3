"""What keeps rows from being joined into cells, as errors for people."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from clue_dist.errors import DataError, format_count, list_names, suggest_names
from clue_dist.process import print_error
from data_prep.options import COVARIATE, FIELDS, NO_COLUMN, ObsColumns
from data_prep.readers.source import OpenedSource, SourceHead

BARCODES_SHOWN = 10  # barcodes that an error shows


class RepeatedBarcodes:
    """The mistake of two cells of one data set that have one barcode."""


@dataclass(frozen=True)
class DisputedField:
    """The mistake of modalities that disagree on the batch or the label of a cell."""

    field: str


def require_obs_columns(obs_columns: ObsColumns, sources: Sequence[OpenedSource]) -> None:
    """Refuse a column that was asked for and that no file has.

    Of `batch` and `cell_type`, which are looked for anyway, it only warns: so one command line
    serves files with batches and files without.

    Args:
        obs_columns: the columns that are asked for.
        sources: the inputs, with their heads.

    Raises:
        DataError: no file has the column, or none of the modality that it was asked for of.
    """
    for modality, columns in obs_columns.by_modality.items():
        files = [head for source, head in sources if source.modality == modality]
        for field, column in columns.items():
            if column != NO_COLUMN and not any(field in head.fields for head in files):
                flag = f"{_name_flag(field)} {modality}={column}"
                raise _make_absence_error(field, flag, column, files)
    heads = [head for _, head in sources]
    for field in sorted(obs_columns.explicit_fields):
        if not any(field in head.fields for head in heads):
            column = obs_columns.by_field[field]
            absence = _make_absence_error(field, f"{_name_flag(field)} {column}", column, heads)
            if column != FIELDS.get(field):
                raise absence
            print_error(f"warning: {absence}")


def _name_flag(field: str) -> str:
    """The flag that names the column of a field."""
    return "--batch-key" if field.startswith(COVARIATE) else f"--{field}-key"


def _make_absence_error(
    field: str, flag: str, column: str, heads: Sequence[SourceHead]
) -> DataError:
    columns = sorted({name for head in heads for name in head.obs_columns})
    return DataError(
        f"no input has the {field.removeprefix(COVARIATE)} column asked for",
        where=flag,
        got=f"columns: {list_names(columns, 30) or 'none'}",
        expected="the name of one of these columns" if columns else None,
        fix=suggest_names(column, columns) or f"leave {flag.split()[0]} out",
    )


def refuse_cell_problems(
    reports: Sequence[dict[str, Any]],
    sources: Sequence[OpenedSource],
    modalities: Sequence[str],
    names: Mapping[str, list[str]],
) -> None:
    """Refuse inputs whose cells cannot be joined.

    Args:
        reports: what the join of each range of hashes has found.
        sources: the inputs, with their heads.
        modalities: names of the modalities, whose numbers the reports have.
        names: of each field, the batches or labels that codes are indices of.

    Raises:
        DataError: a barcode stands twice in one modality of a data set; modalities disagree on the
            batch or label of a cell.
    """
    for m, modality in enumerate(modalities):
        repeats = [report["twice"].get(str(m)) for report in reports]
        number, barcodes = _sum_problems(repeats)
        if number:
            files = dict.fromkeys(s.display_name for s, _ in sources if s.modality == modality)
            within = {i for repeat in repeats if repeat for i in repeat["within"]}
            hidden = number - BARCODES_SHOWN
            raise DataError(
                f"{format_count(number, 'barcode')} more than once in modality {modality!r} of one "
                "data set",
                where=list_names(files),
                got=list_names(barcodes) + (f" ... and {hidden} more" if hidden > 0 else ""),
                expected="each cell once",
                fix=_advise_on_repeats([sources[i] for i in sorted(within)]),
                mistake=RepeatedBarcodes(),
            )
    for field, values in names.items():
        what = field.removeprefix(COVARIATE)
        flag = _name_flag(field)
        number, disputes = _sum_problems([report["dispute"].get(field) for report in reports])
        if number:
            cells = [f"{barcode}: {values[a]!r} and {values[b]!r}" for barcode, a, b, _ in disputes]
            raise DataError(
                f"the modalities of {format_count(number, 'cell')} disagree on their {what}",
                where=sources[disputes[0][3]].source.display_name,
                got=list_names(cells),
                expected="one value per cell, or none",
                fix=f"if the column holds no {what}, leave it out: `{flag} none`, or name "
                f"another one; correct it otherwise; if the barcodes name different cells, prefix "
                "the data sets: `lane1:FILE`",
                mistake=DisputedField(field),
            )


def _advise_on_repeats(repeating: Sequence[OpenedSource]) -> str:
    """Say how to tell cells with one barcode apart.

    repeating: the files in which a barcode occurs more than once.
    """
    if not repeating:
        return (
            "if the files are different data sets, keep them apart with a prefix: "
            "`lane1:FILE lane2:FILE`"
        )
    files = list_names(source.display_name for source, _ in repeating)
    columns = list(dict.fromkeys(column for _, head in repeating for column in head.obs_columns))
    if not columns:
        return f"{files} repeats barcodes: make them unique there, or remove the copies"
    return (
        f"{files} repeats barcodes: if several data sets were put together there, name the column "
        f"of obs that tells them apart, `--dataset-key COLUMN` ({list_names(columns, 30)}); if "
        "they are copies of cells, remove them"
    )


def _sum_problems(reports: Sequence[Any]) -> tuple[int, list[Any]]:
    """Sum up one problem in all ranges: the number of cells that have it, and the first of them.

    reports: report of each range, None where no cell has it.
    """
    found = [report for report in reports if report]
    first = sorted(cell for report in found for cell in report["first"])
    return sum(report["number"] for report in found), first[:BARCODES_SHOWN]
