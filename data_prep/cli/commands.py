"""The command line of data_prep: what each command does, and its flags."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import get_args

from clue_dist.errors import DataError, StoreError, format_count
from clue_dist.files import parse_path
from clue_dist.process import CommandParser
from clue_dist.store import layout
from clue_dist.store.feature_reference import read_feature_reference
from clue_dist.store.location import parse_location
from clue_dist.store.manifest import Manifest
from data_prep import doctor, inspect, svd
from data_prep.append import append_cells, format_addition
from data_prep.check import check_store
from data_prep.cli.conversion_flags import (
    SEVERAL,
    add_input_flags,
    add_pool_flags,
    parse_conversion,
    parse_natural,
    parse_pairs,
    parse_positive,
)
from data_prep.cli.inputs import parse_argument
from data_prep.convert import convert_inputs, format_conversion
from data_prep.fetch import fetch_cells
from data_prep.jobs.workers import open_pool
from data_prep.options import FIELDS
from data_prep.planned_cells import ConversionOptions
from data_prep.simulate import SimulationSpec, parse_features, write_h5mu
from data_prep.split import CELLS, SplitRule, format_split, split_store
from data_prep.suggested_command import Command

_DESCRIPTION = "From raw counts to a store that training streams from."
_STORE_HELP = "a folder or a URL: s3://, gs://, https://"
_EXAMPLES = {
    "convert": "convert rna=rna.h5ad adt=protein.h5ad --out S.zarr --batch-key donor",
    "append": "append rna=more.h5ad adt=more_protein.h5ad --to S.zarr",
    "split": "split S.zarr --test-share 0.2 --out-train train.zarr --out-test test.zarr",
    "simulate": "simulate --out SIM.zarr --cells 100000",
    "svd": "svd S.zarr",
    "check": "check S.zarr",
    "inspect": "inspect S.zarr",
    "doctor": "doctor rna.h5ad protein.h5ad",
    "fetch": "fetch --out data/pbmc",
}


def main(program: str = "python -m data_prep") -> None:
    """Run the command that was typed.

    Args:
        program: what precedes the name of the command, for messages.
    """
    run_command(sys.argv[1:], program)


def run_command(words: Sequence[str], program: str = "python -m data_prep") -> None:
    """Run a command that is given as the words of its command line."""
    arguments = build_preparation_parser(program).parse_args(words)
    arguments.run(arguments)


def _convert(arguments: argparse.Namespace) -> None:
    print(f"{arguments.out}: {format_conversion(convert_as_typed(arguments))}")


def convert_as_typed(arguments: argparse.Namespace) -> Manifest:
    """Convert the inputs that a command line names, and return the manifest of the store."""
    place = arguments.features_from
    known = None if place is None else read_feature_reference(place).batch_vocabulary
    inputs, options = parse_conversion(arguments, FIELDS, known)
    with open_pool(arguments.workers, arguments.scheduler) as pool:
        return convert_inputs(inputs, arguments.out, options, pool)


def _append(arguments: argparse.Namespace) -> None:
    manifest = Manifest.read(parse_location(arguments.to))
    # Unless a flag says otherwise, new cells are read from the columns that the first ones were.
    columns = FIELDS | manifest.provenance.get("columns", {})
    inputs, options = parse_conversion(arguments, columns, manifest.batch_vocabulary)
    with open_pool(arguments.workers, arguments.scheduler) as pool:
        manifest = append_cells(inputs, arguments.to, options, pool)
    print(f"{arguments.to}: {format_addition(manifest)}")


def _split(arguments: argparse.Namespace) -> None:
    by_cells = arguments.by == CELLS
    if by_cells == bool(arguments.test):
        raise DataError(
            "which cells are for tests?",
            where="--by, --test",
            expected="--test-share SHARE, or --by batch --test NAME ...",
        )
    rule = SplitRule(arguments.by, arguments.test_share, tuple(arguments.test), arguments.seed)
    outs = (arguments.out_train, arguments.out_test)
    print(format_split(outs, split_store(arguments.store, rule, *outs)))


def _svd(arguments: argparse.Namespace) -> None:
    options = svd.SvdOptions(arguments.components, arguments.power, arguments.seed)
    with open_pool(arguments.workers, arguments.scheduler) as pool:
        notes = svd.compute_svd(arguments.store, arguments.modality, options, pool)
    print(f"{arguments.store}: singular vectors\n{svd.format_svds(notes)}")


def _check(arguments: argparse.Namespace) -> None:
    problems = check_store(arguments.store)
    if problems:
        listed = "\n".join(map(str, problems))
        fix = "restore these files from a copy, or convert again"
        raise StoreError("the store is not sound", where=arguments.store, got=listed, fix=fix)
    print(f"{arguments.store}: sound")


def _inspect(arguments: argparse.Namespace) -> None:
    facts = inspect.collect_facts(arguments.store)
    print(inspect.dump_facts(facts) if arguments.json else inspect.format_facts(facts))


def _doctor(arguments: argparse.Namespace) -> None:
    def rehearse(command: Command) -> doctor.Rehearsal:
        words = ["convert", *command.words, "--out", "STORE.zarr"]
        parsed = build_preparation_parser().parse_args(words)
        return doctor.rehearse_conversion(*parse_conversion(parsed, FIELDS))

    files = [parse_argument(text) for text in arguments.files]
    lines, errors = doctor.examine_files(files, rehearse)
    print(*lines, sep="\n")
    if errors:
        what = f"{len(errors)} of {len(files)} files cannot be read"
        raise DataError(what, where=errors[0].where)


def _fetch(arguments: argparse.Namespace) -> None:
    fetch_cells(arguments.out, arguments.simulate)


def _simulate(arguments: argparse.Namespace) -> None:
    out = arguments.out
    if out.suffix not in (".h5mu", ".zarr"):
        raise DataError(
            "the output's ending says its format",
            where=f"--out {out}",
            got=out.suffix or "none",
            expected=".h5mu or .zarr",
        )
    kinds = parse_pairs(arguments.kind, "--kind")
    names = ("cells", "paired", "batches", "shared", "private", "seed")
    sizes = {name: getattr(arguments, name) for name in names}
    spec = SimulationSpec.from_features(parse_features(arguments.modality), kinds, **sizes)
    # A store is made row by row and may be of any size; an .h5mu, with the truth, is made at once.
    if out.suffix == ".h5mu":
        write_h5mu(spec, out)
    else:
        options = ConversionOptions(seed=arguments.seed, kinds=kinds)
        with open_pool(arguments.workers, arguments.scheduler) as pool:
            print(format_conversion(convert_inputs(spec.build_sources(), out, options, pool)))
    print(f"{out}: {format_count(arguments.cells, 'simulated cell')}")


def build_preparation_parser(program: str = "python -m data_prep") -> argparse.ArgumentParser:
    """Build the parser of all commands, whose help shows an example of each."""
    parser = CommandParser(
        prog=program,
        description=_DESCRIPTION,
        epilog=f"example:\n  {program} {_EXAMPLES['convert']}\n\n"
        f"`{program} COMMAND --help` lists what a command takes.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    def add_command(name: str, summary: str) -> argparse.ArgumentParser:
        return commands.add_parser(
            name,
            help=summary,
            description=f"{summary[0].upper()}{summary[1:]}.",
            epilog=f"example:\n  {program} {_EXAMPLES[name]}",
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )

    _add_convert(add_command("convert", "raw counts -> a store"))
    _add_append(add_command("append", "more cells for a store, which is not rewritten"))
    _add_split(add_command("split", "a store -> one for training and one for tests"))
    _add_simulate(add_command("simulate", "a mosaic of any size with known truth"))
    _add_svd(add_command("svd", "singular vectors of all cells, for training to start from"))

    check = add_command("check", "verify every byte of a store")
    check.add_argument("store", help=_STORE_HELP)
    check.set_defaults(run=_check)

    inspection = add_command("inspect", "what is in a store")
    inspection.add_argument("store", help=_STORE_HELP)
    inspection.add_argument("--json", action="store_true", help="for programs")
    inspection.set_defaults(run=_inspect)

    _add_doctor(add_command("doctor", "what files are, and the command that converts them"))
    _add_fetch(
        add_command("fetch", "real PBMC from the package index, cut into a mosaic and a test set")
    )
    return parser


def _add_doctor(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "files", nargs="+", metavar="FILE", help="any that convert reads; NAME=FILE if it is known"
    )
    parser.set_defaults(run=_doctor)


def _add_fetch(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--out", type=_parse_folder, default=Path("data/pbmc"), help="folder (default: %(default)s)"
    )
    parser.add_argument(
        "--simulate", action="store_true", help="simulated cells instead: needs no network"
    )
    parser.set_defaults(run=_fetch)


def _add_convert(parser: argparse.ArgumentParser) -> None:
    add_input_flags(parser)
    parser.add_argument(
        "--out", type=_parse_folder, required=True, help="the store to write, STORE.zarr"
    )
    _add_feature_flags(parser)
    parser.add_argument(
        "--keep-obs",
        metavar="all|COLUMN",
        help="columns of obs that the store keeps, and that come out in the embedding",
        **SEVERAL,
    )
    parser.add_argument(
        "--block-cells",
        type=parse_positive,
        default=layout.BLOCK_CELLS,
        help="cells of a block (default: %(default)s)",
    )
    parser.add_argument(
        "--codec",
        choices=get_args(layout.Codec),
        default="balanced",
        help="lz4, with zstd for binary counts (default: %(default)s), lz4 alone, or zstd alone",
    )
    parser.set_defaults(run=_convert)


def _add_feature_flags(parser: argparse.ArgumentParser) -> None:
    """Add what says which features a store gets."""
    parser.add_argument(
        "--features",
        metavar="[NAME=]same|intersection|union|FILE",
        help="when files of a modality differ (default: same); FILE lists names, one a line",
        **SEVERAL,
    )
    parser.add_argument(
        "--top",
        metavar="NAME=NUMBER",
        help="keep the features that vary most within batches (rna) or are seen in most cells "
        "(atac)",
        **SEVERAL,
    )
    parser.add_argument(
        "--features-from",
        metavar="RUN|STORE",
        help="fit the modalities and features of a trained model (its run folder, or a shared "
        "one) or of another store",
    )
    parser.add_argument(
        "--new-modality",
        metavar="NAME",
        help="modalities that what --features-from names does not have, to train a model on with",
        **SEVERAL,
    )


def _add_append(parser: argparse.ArgumentParser) -> None:
    add_input_flags(parser)
    parser.add_argument(
        "--to",
        required=True,
        help="the store that gets them, a folder; it decides features and blocks",
    )
    # The store decides what these flags of `convert` would.
    parser.set_defaults(
        run=_append,
        features_from=None,
        new_modality=[],
        features=[],
        top=[],
        block_cells=0,
        codec="balanced",
        keep_obs=[],
    )


def _add_split(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("store", help=_STORE_HELP)
    parser.add_argument(
        "--by",
        default=CELLS,
        metavar="cells|batch|COLUMN",
        help="what goes to the tests together: single cells (default); batches, as donors are, "
        "by that word or by the column that they were read from; levels of a covariate of batches; "
        "or categories of a column that the store keeps",
    )
    parser.add_argument(
        "--test", metavar="NAME", help="batches, or categories, for the tests", **SEVERAL
    )
    parser.add_argument(
        "--test-share",
        type=_parse_test_share,
        default=SplitRule.share,
        metavar="SHARE",
        help="share of the cells for the tests, where --by is cells (default: %(default)s)",
    )
    parser.add_argument(
        "--seed", type=parse_natural, default=0, help="another one draws other cells"
    )
    for side in ("train", "test"):
        parser.add_argument(
            f"--out-{side}", type=_parse_folder, required=True, help=f"the {side} part, a store"
        )
    parser.set_defaults(run=_split)


def _parse_test_share(text: str) -> float:
    try:
        share = float(text)
    except ValueError:
        share = 0.0
    if not 0 < share < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a share between 0 and 1")
    return share


def _add_simulate(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--out",
        type=_parse_folder,
        required=True,
        help="SIM.h5mu (with the truth) or SIM.zarr (any size)",
    )
    parser.add_argument("--cells", type=int, default=2000)
    parser.add_argument(
        "--modality", nargs="+", default=["rna:2000", "adt:50"], metavar="NAME:FEATURES"
    )
    parser.add_argument(
        "--paired",
        type=float,
        default=0.5,
        help="share of cells that carry every modality (default: %(default)s)",
    )
    parser.add_argument("--batches", type=int, default=2)
    parser.add_argument("--shared", type=int, default=8, help="dimensions seen by every modality")
    parser.add_argument("--private", type=int, default=4, help="dimensions of each modality alone")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--kind", metavar="NAME=KIND", **SEVERAL)
    add_pool_flags(parser)
    parser.set_defaults(run=_simulate)


def _add_svd(parser: argparse.ArgumentParser) -> None:
    default = svd.SvdOptions()
    parser.add_argument("store", help="a folder; the result is saved in it")
    parser.add_argument(
        "--modality", nargs="+", action="extend", default=[], metavar="NAME", help="default: all"
    )
    parser.add_argument(
        "--components",
        type=parse_positive,
        default=default.components,
        help="default: %(default)s",
    )
    parser.add_argument(
        "--power",
        type=parse_natural,
        default=default.power,
        help="iterations (default: %(default)s)",
    )
    parser.add_argument(
        "--seed", type=parse_natural, default=default.seed, help="seed of the start"
    )
    add_pool_flags(parser)
    parser.set_defaults(run=_svd)


def _parse_folder(text: str) -> Path:
    """A path; a URL is refused, which else would become a folder called `s3:`."""
    if "://" in text:
        fix = "write it to a folder, then copy it there"
        raise StoreError("only a folder can be written to", where="--out", got=text, fix=fix)
    return parse_path(text)
