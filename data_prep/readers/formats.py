"""The formats of input files: one row for each; a new format needs a reader and a row here.

A format is recognised by what is in a file, not by what the file is called.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from clue_dist.errors import DataError, list_names
from data_prep.options import InputArgument, ReadingOptions
from data_prep.readers.fragments import ConversionInput, is_fragments, open_fragments
from data_prep.readers.h5_file import open_h5
from data_prep.readers.h5ad import is_h5ad, open_h5ad
from data_prep.readers.h5mu import is_h5mu, open_h5mu
from data_prep.readers.matrix_market import is_matrix_market, open_matrix_market
from data_prep.readers.tenx import is_tenx, open_tenx


@dataclass(frozen=True)
class InputFormat:
    """How the files of one format are recognised and opened."""

    name: str  # for people
    recognises: Callable[[Path], bool]
    open_inputs: Callable[[InputArgument, ReadingOptions], Sequence[ConversionInput]]
    flags: tuple[str, ...] = ()  # of the command line, those that some formats alone know


# The first format that recognises a file reads it. The last two are not particular: they take any
# table with tabs and any folder, and their readers say what is wrong with it.
FORMATS = (
    InputFormat(".h5ad", is_h5ad, open_h5ad, ("--layer",)),
    InputFormat(".h5mu", is_h5mu, open_h5mu, ("--layer",)),
    InputFormat("10x .h5", is_tenx, open_tenx),
    InputFormat("fragments.tsv.gz", is_fragments, open_fragments, ("--barcodes", "--cut-sites")),
    InputFormat("a Matrix Market folder", is_matrix_market, open_matrix_market),
)


def find_format(path: Path) -> InputFormat:
    """Find the format of a file or folder.

    Raises:
        DataError: the file is damaged, or in no format that is known.
    """
    for candidate in FORMATS:
        if candidate.recognises(path):
            return candidate
    with open_h5(path) as file:  # where the file is not even HDF5, this says so
        top_level = list_names(file) or "nothing"
    raise DataError(
        "not a format this reader knows",
        where=path,
        got=f"top level: {top_level}",
        expected=list_format_names(),
    )


def list_format_names() -> str:
    """The names of all formats, in one phrase."""
    names = [known.name for known in FORMATS]
    return f"{', '.join(names[:-1])} or {names[-1]}"
