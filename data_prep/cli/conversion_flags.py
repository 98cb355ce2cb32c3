"""The flags that `convert` and `append` share, and what they make of them."""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from typing import Any, get_args

from clue_dist.errors import DataError, list_names
from clue_dist.kinds import KINDS
from clue_dist.store.batch_vocabulary import BatchVocabulary
from data_prep.cli.covariate_flags import choose_covariates, match_columns
from data_prep.cli.feature_choices import parse_choices
from data_prep.cli.inputs import parse_inputs
from data_prep.conversion.kept_obs import ALL
from data_prep.options import (
    DATASET,
    FIELDS,
    NO_COLUMN,
    ObsColumns,
    Pairing,
    PerModality,
    ReadingOptions,
    require_known_modalities,
)
from data_prep.planned_cells import ConversionOptions
from data_prep.readers.formats import list_format_names
from data_prep.readers.fragments import ConversionInput, FragmentsInput

SEVERAL: dict[str, Any] = {"nargs": "+", "action": "extend", "default": []}  # values of a flag


def parse_conversion(
    arguments: argparse.Namespace,
    columns: Mapping[str, str],
    known_batches: BatchVocabulary | None = None,
) -> tuple[list[ConversionInput], ConversionOptions]:
    """Open the inputs of a conversion.

    Args:
        arguments: arguments of `convert` or `append`.
        columns: columns of obs, for batch and label, where no flag names others.
        known_batches: of the store, or the model, that the cells are fitted to.

    Returns:
        The inputs, and what decides the result beside them.
    """
    kinds = parse_pairs(arguments.kind, "--kind")
    obs_columns = _parse_columns(arguments, columns, known_batches)
    reading = ReadingOptions(
        obs_columns,
        kinds,
        PerModality.parse_values(arguments.layer, "--layer", "layers"),
        PerModality.parse_values(arguments.feature_ids, "--feature-ids", "columns"),
        PerModality.parse_values(arguments.barcodes, "--barcodes", "lists"),
        arguments.cut_sites,
        PerModality.parse_values(arguments.feature_type, "--feature-type", "types"),
    )
    inputs = parse_inputs(arguments.inputs, reading)
    names = [given.modality for given in inputs]
    require_known_modalities("--batch-key, --label-key", obs_columns.by_modality, names)
    added = arguments.new_modality
    require_known_modalities("--new-modality", added, names)
    choices = parse_choices(
        names,
        kinds,
        arguments.features,
        arguments.bins,
        arguments.top,
        arguments.features_from,
        added,
    )
    return inputs, ConversionOptions(
        arguments.seed,
        arguments.block_cells,
        arguments.codec,
        choices,
        arguments.features_from,
        tuple(added),
        kinds,
        obs_columns,
        arguments.pair_barcodes,
        choose_kept_cells(inputs, reading.barcodes),
        arguments.round,
        _parse_kept_obs(arguments.keep_obs),
    )


def _parse_kept_obs(names: Sequence[str]) -> tuple[str, ...]:
    """The columns of obs that the store keeps: all, or those that are named."""
    if ALL in names and len(names) > 1:
        raise DataError("all columns, or some?", where="--keep-obs", got=list_names(names))
    return tuple(names)


def _parse_columns(
    arguments: argparse.Namespace, columns: Mapping[str, str], known: BatchVocabulary | None
) -> ObsColumns:
    """The columns of obs that the flags name, else `columns`."""
    covariates = choose_covariates(arguments.batch_key, known)
    words = [] if covariates else arguments.batch_key
    flags = {
        "batch": PerModality.parse_values(words, "--batch-key", "columns"),
        "label": PerModality.parse_values(arguments.label_key, "--label-key", "columns"),
        DATASET: PerModality("--dataset-key", arguments.dataset_key),
    }
    if covariates:
        del flags["batch"]
    chosen = {field: flag.default or columns.get(field) for field, flag in flags.items()}
    by_modality: dict[str, dict[str, str]] = {}
    for field, flag in flags.items():
        for modality, column in flag.by_modality.items():
            by_modality.setdefault(modality, {})[field] = column
    explicit = {name for name, flag in flags.items() if flag.default not in (None, NO_COLUMN)}
    if covariates:
        matched = match_columns(arguments.batch_key, covariates, columns)
        chosen, explicit = {**chosen, **matched.by_field}, explicit | matched.explicit_fields
        for modality, by_field in matched.by_modality.items():
            by_modality.setdefault(modality, {}).update(by_field)
    return ObsColumns(
        {field: column for field, column in chosen.items() if column not in (None, NO_COLUMN)},
        frozenset(explicit),
        by_modality,
    )


def choose_kept_cells(inputs: Sequence[ConversionInput], barcodes: PerModality) -> dict[str, str]:
    """For which modalities that are no fragments `--barcodes` leaves cells out, and by which list.

    Where fragments are among the inputs, a value without NAME is for these alone, and a matrix of
    the same modality as fragments keeps its cells.
    """
    fragments = {given.modality for given in inputs if isinstance(given, FragmentsInput)}
    names = dict.fromkeys(given.modality for given in inputs if given.modality not in fragments)
    kept = {name: barcodes.by_modality.get(name) for name in names}
    if barcodes.default is not None and not fragments:
        for name in names:
            if name != barcodes.default or len(names) == 1:
                kept[name] = kept[name] or barcodes.default
    return {name: allowed for name, allowed in kept.items() if allowed is not None}


def add_input_flags(parser: argparse.ArgumentParser) -> None:
    """Add the inputs, and the flags that say how they are read."""
    parser.add_argument(
        "inputs", nargs="+", metavar="[DATASET:][NAME=]FILE[:KEY]", help=list_format_names()
    )
    _add_cell_flags(parser)
    parser.add_argument(
        "--layer",
        action="append",
        default=[],
        metavar="[NAME=]LAYER",
        help="layer of raw counts instead of X; raw.X is one",
    )
    _add_feature_flags(parser)
    parser.add_argument(
        "--kind",
        metavar="NAME=KIND",
        help=f"{list_names(KINDS)}: where the name does not say",
        **SEVERAL,
    )
    parser.add_argument(
        "--round",
        action="store_true",
        help="round corrected counts, as of SoupX, to whole numbers; those nearly whole always are",
    )
    parser.add_argument("--seed", type=int, default=0, help="seed of the shuffle")
    add_pool_flags(parser)


def _add_cell_flags(parser: argparse.ArgumentParser) -> None:
    """Add the flags that say what is known of cells, which of them are one, and which are kept."""
    parser.add_argument(
        "--batch-key",
        metavar="[NAME=]COLUMN",
        help=f"obs column of the batch (default: {FIELDS['batch']}, where there is one), or "
        f"several covariates of it, as donor and chemistry; {NO_COLUMN}: no batches",
        **SEVERAL,
    )
    parser.add_argument(
        "--label-key",
        metavar="[NAME=]COLUMN",
        help=f"obs column of the cell type (default: {FIELDS['label']}, where there is one); "
        f"{NO_COLUMN}: no cell types",
        action="append",
        default=[],
    )
    parser.add_argument(
        "--dataset-key",
        metavar="COLUMN",
        help="obs column that tells the data sets of one file apart, as DATASET: does with files",
    )
    parser.add_argument(
        "--pair-barcodes",
        choices=get_args(Pairing),
        help="exact (default): the same barcode is the same cell; core: so is ACGT...-1 with "
        "ACGT... or lane1_ACGT...-1 of another modality",
    )
    parser.add_argument(
        "--barcodes",
        metavar="[NAME=]FILE|MODALITY",
        help="cells that are kept: those listed, or those of another modality (default: all); "
        "without NAME of fragments alone, if there are any",
        **SEVERAL,
    )


def _add_feature_flags(parser: argparse.ArgumentParser) -> None:
    """Add the flags that say what features are called, and how regions are counted."""
    parser.add_argument(
        "--feature-ids",
        metavar="[NAME=]COLUMN",
        help="column of var that names the features, gene_ids, say, instead of var_names; A,B: "
        "the first there is",
        **SEVERAL,
    )
    parser.add_argument(
        "--feature-type",
        metavar="NAME=TYPE",
        help='which type of features a modality takes: guide="CRISPR Guide Capture"',
        **SEVERAL,
    )
    parser.add_argument(
        "--bins",
        metavar="NAME=WIDTH",
        help="genome bins so many bp wide, from peaks or fragments: atac=5000",
        **SEVERAL,
    )
    parser.add_argument(
        "--cut-sites",
        action="store_true",
        help="count both ends of a fragment, not its middle once",
    )


def add_pool_flags(parser: argparse.ArgumentParser) -> None:
    """Add the flags that say where tasks run."""
    places = parser.add_mutually_exclusive_group()
    places.add_argument("--workers", type=parse_positive, help="threads (default: one per core)")
    places.add_argument("--scheduler", metavar="tcp://HOST:PORT", help="a running Dask scheduler")


def parse_pairs(texts: list[str], flag: str) -> dict[str, str]:
    """Read the NAME=VALUE pairs of a flag."""
    for text in texts:
        if "=" not in text:
            raise DataError("not NAME=VALUE", where=flag, got=text)
    return dict(text.split("=", 1) for text in texts)


def parse_natural(text: str) -> int:
    """Read a number from 0 on."""
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"{text!r} is not a number from 0 on")
    return int(text)


def parse_positive(text: str) -> int:
    """Read a number from 1 to 65536."""
    if not text.isdecimal() or not 1 <= int(text) <= 65536:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number from 1 to 65536")
    return int(text)
