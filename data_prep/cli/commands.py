"""The command line: python -m data_prep convert | append | svd | check | inspect | fetch | simulate."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from pathlib import Path
from typing import Any, get_args

from clue_dist.errors import DataError, StoreError, list_names
from clue_dist.files import parse_path
from clue_dist.kinds import KINDS
from clue_dist.store import layout
from clue_dist.store.location import parse_location
from clue_dist.store.manifest import Manifest
from data_prep import inspect, svd
from data_prep.append import append_cells, format_addition
from data_prep.check import check_store
from data_prep.cli.feature_choices import parse_choices
from data_prep.cli.inputs import parse_inputs
from data_prep.convert import ConversionOptions, convert_inputs, format_conversion
from data_prep.fetch import fetch_cells
from data_prep.jobs.workers import open_pool
from data_prep.options import FIELDS, ObsColumns, PerModality, ReadingOptions
from data_prep.readers.fragments import ConversionInput
from data_prep.simulate import SimulationSpec, parse_features, write_h5mu

SEVERAL: dict[str, Any] = {"nargs": "+", "action": "extend", "default": []}  # values of a flag


def main() -> None:
    args = _parser().parse_args()
    args.run(args)


def _convert(args: argparse.Namespace) -> None:
    inputs, options = _asked(args)
    with open_pool(args.workers, args.scheduler) as workers:
        manifest = convert_inputs(inputs, args.out, options, workers)
    print(f"{args.out}: {format_conversion(manifest)}")


def _append(args: argparse.Namespace) -> None:
    before = Manifest.read(parse_location(args.to)).provenance.get("columns", {})
    inputs, options = _asked(args, FIELDS | before)
    with open_pool(args.workers, args.scheduler) as workers:
        manifest = append_cells(inputs, args.to, options, workers)
    print(f"{args.to}: {format_addition(manifest)}")


def _asked(
    args: argparse.Namespace, columns: Mapping[str, str] = FIELDS
) -> tuple[list[ConversionInput], ConversionOptions]:
    """columns: of batch and label, where the command line names no others."""
    kinds = _pairs(args.kind, "--kind")
    named = {"batch": args.batch_key, "label": args.label_key}
    explicit = frozenset(field for field, column in named.items() if column)
    keys = ObsColumns(
        {field: named[field] or column for field, column in columns.items()}, explicit
    )
    layers = PerModality.parse_values(args.layer, "--layer", "layers")
    ids = PerModality.parse_values(args.feature_ids, "--feature-ids", "columns")
    barcodes = PerModality.parse_values(args.barcodes, "--barcodes", "lists")
    inputs = parse_inputs(
        args.inputs, ReadingOptions(keys, kinds, layers, ids, barcodes, args.cut_sites)
    )
    names = [given.modality for given in inputs]
    choices = parse_choices(names, kinds, args.features, args.bins, args.top, args.features_from)
    return inputs, ConversionOptions(
        args.seed, args.block_cells, args.codec, choices, args.features_from, kinds, keys
    )


def _svd(args: argparse.Namespace) -> None:
    options = svd.SvdOptions(args.components, args.power, args.seed)
    with open_pool(args.workers, args.scheduler) as workers:
        notes = svd.compute_svd(args.store, args.modality, options, workers)
    print(f"{args.store}: singular vectors\n{svd.format_svds(notes)}")


def _check(args: argparse.Namespace) -> None:
    problems = check_store(args.store)
    if problems:
        shown = "".join(f"\n    {problem}" for problem in problems)
        fix = "restore these files from a copy, or convert again"
        raise StoreError(f"{len(problems)} problems", where=args.store, got=shown, fix=fix)
    print(f"{args.store}: sound")


def _inspect(args: argparse.Namespace) -> None:
    found = inspect.collect_facts(args.store)
    print(inspect.dump_facts(found) if args.json else inspect.format_facts(found))


def _fetch(args: argparse.Namespace) -> None:
    fetch_cells(args.out, args.simulate)


def _simulate(args: argparse.Namespace) -> None:
    if args.out.suffix not in (".h5mu", ".zarr"):
        got = args.out.suffix or "none"
        raise DataError(
            "the output's ending says its format",
            where=f"--out {args.out}",
            got=got,
            expected=".h5mu or .zarr",
        )
    kinds = _pairs(args.kind, "--kind")
    features = parse_features(args.modality)
    sizes = {
        name: getattr(args, name)
        for name in ("cells", "paired", "batches", "shared", "private", "seed")
    }
    spec = SimulationSpec.from_features(features, kinds, **sizes)
    if args.out.suffix == ".h5mu":
        write_h5mu(spec, args.out)
    else:
        with open_pool(args.workers, args.scheduler) as workers:
            print(
                format_conversion(
                    convert_inputs(
                        spec.build_sources(),
                        args.out,
                        ConversionOptions(seed=args.seed, kinds=kinds),
                        workers,
                    )
                )
            )
    print(f"{args.out}: {args.cells:,} simulated cells")


def _pairs(texts: list[str], flag: str) -> dict[str, str]:
    for text in texts:
        if "=" not in text:
            raise DataError("not NAME=VALUE", where=flag, got=text)
    return dict(text.split("=", 1) for text in texts)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m data_prep", description=__doc__)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    _add_convert(commands.add_parser("convert", help="raw counts -> a store"))
    _add_append(
        commands.add_parser("append", help="more cells for a store, which is not rewritten")
    )
    _add_simulate(commands.add_parser("simulate", help="a mosaic of any size with known truth"))

    _add_svd(
        commands.add_parser("svd", help="singular vectors of all cells, for training to start from")
    )

    p = commands.add_parser("check", help="verify every byte of a store")
    p.add_argument("store", help="a folder or a URL: s3://, gs://, https://")
    p.set_defaults(run=_check)

    p = commands.add_parser("inspect", help="what is in a store")
    p.add_argument("store", help="a folder or a URL: s3://, gs://, https://")
    p.add_argument("--json", action="store_true", help="for programs")
    p.set_defaults(run=_inspect)

    p = commands.add_parser(
        "fetch", help="real PBMC from the package index, cut into a mosaic and a paired test set"
    )
    p.add_argument(
        "--out", type=_local, default=Path("data/pbmc"), help="folder (default: %(default)s)"
    )
    p.add_argument(
        "--simulate", action="store_true", help="simulated cells instead: needs no network"
    )
    p.set_defaults(run=_fetch)
    return parser


def _add_convert(p: argparse.ArgumentParser) -> None:
    _input_options(p)
    p.add_argument("--out", type=_local, required=True, help="the store to write, STORE.zarr")
    p.add_argument(
        "--features",
        metavar="[NAME=]same|intersection|union|FILE",
        help="when files of a modality differ (default: same); FILE lists names, one a line",
        **SEVERAL,
    )
    p.add_argument(
        "--top",
        metavar="NAME=NUMBER",
        help="keep the features that vary most within batches (rna) or are seen in most cells (atac)",
        **SEVERAL,
    )
    p.add_argument(
        "--features-from", metavar="STORE", help="fit the modalities and features of another store"
    )
    p.add_argument(
        "--block-cells",
        type=_positive,
        default=layout.BLOCK_CELLS,
        help="cells of a block (default: %(default)s)",
    )
    codec = "lz4, with zstd for binary counts (default: %(default)s), lz4 alone, or zstd alone"
    p.add_argument("--codec", choices=get_args(layout.Codec), default="balanced", help=codec)
    p.set_defaults(run=_convert)


def _add_append(p: argparse.ArgumentParser) -> None:
    _input_options(p)
    p.add_argument(
        "--to",
        required=True,
        help="the store that gets them, a folder; it decides features and blocks",
    )
    p.set_defaults(
        run=_append, features_from=None, features=[], top=[], block_cells=0, codec="balanced"
    )


def _input_options(p: argparse.ArgumentParser) -> None:
    p.add_argument(
        "inputs",
        nargs="+",
        metavar="[DATASET:][NAME=]FILE",
        help=".h5ad, .h5mu, 10x .h5, a Matrix Market folder, or fragments.tsv.gz",
    )
    p.add_argument(
        "--batch-key",
        help=f"obs column of the batch (default: {FIELDS['batch']}, where there is one)",
    )
    p.add_argument(
        "--label-key",
        help=f"obs column of the cell type (default: {FIELDS['label']}, where there is one)",
    )
    p.add_argument(
        "--layer",
        action="append",
        default=[],
        metavar="[NAME=]LAYER",
        help="layer of raw counts instead of X; raw.X is one",
    )
    _feature_options(p)
    p.add_argument(
        "--kind",
        action="append",
        default=[],
        metavar="NAME=KIND",
        help=f"{list_names(KINDS)}: where the name does not say",
    )
    p.add_argument("--seed", type=int, default=0, help="of the shuffle")
    _pool_options(p)


def _feature_options(p: argparse.ArgumentParser) -> None:
    p.add_argument(
        "--feature-ids",
        metavar="[NAME=]COLUMN",
        help="column of var that names the features, gene_ids, say, instead of var_names; A,B: the first there is",
        **SEVERAL,
    )
    p.add_argument(
        "--bins",
        metavar="NAME=WIDTH",
        help="genome bins so many bp wide, from peaks or fragments: atac=5000",
        **SEVERAL,
    )
    p.add_argument(
        "--barcodes",
        metavar="[NAME=]FILE|MODALITY",
        help="cells of a fragments file: those listed, or those of another modality (default: every barcode)",
        **SEVERAL,
    )
    p.add_argument(
        "--cut-sites",
        action="store_true",
        help="count both ends of a fragment, not its middle once",
    )


def _add_simulate(p: argparse.ArgumentParser) -> None:
    p.add_argument(
        "--out", type=_local, required=True, help="SIM.h5mu (with the truth) or SIM.zarr (any size)"
    )
    p.add_argument("--cells", type=int, default=2000)
    p.add_argument("--modality", nargs="+", default=["rna:2000", "adt:50"], metavar="NAME:FEATURES")
    p.add_argument(
        "--paired",
        type=float,
        default=0.5,
        help="share of cells that carry every modality (default: %(default)s)",
    )
    p.add_argument("--batches", type=int, default=2)
    p.add_argument("--shared", type=int, default=8, help="dimensions seen by every modality")
    p.add_argument("--private", type=int, default=4, help="dimensions of each modality alone")
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--kind", action="append", default=[], metavar="NAME=KIND")
    _pool_options(p)
    p.set_defaults(run=_simulate)


def _add_svd(p: argparse.ArgumentParser) -> None:
    default = svd.SvdOptions()
    p.add_argument("store", help="a folder; the result is saved in it")
    p.add_argument(
        "--modality", nargs="+", action="extend", default=[], metavar="NAME", help="default: all"
    )
    p.add_argument(
        "--components", type=_positive, default=default.components, help="default: %(default)s"
    )
    p.add_argument(
        "--power", type=_natural, default=default.power, help="iterations (default: %(default)s)"
    )
    p.add_argument("--seed", type=_natural, default=default.seed, help="of the start")
    _pool_options(p)
    p.set_defaults(run=_svd)


def _local(text: str) -> Path:
    """A path, which a URL would become too: one of a folder `s3:`."""
    if "://" in text:
        fix = "write it to a folder, then copy it there"
        raise StoreError("only a folder can be written to", where="--out", got=text, fix=fix)
    return parse_path(text)


def _natural(text: str) -> int:
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"{text!r} is not a number from 0 on")
    return int(text)


def _positive(text: str) -> int:
    if not text.isdecimal() or not 1 <= int(text) <= 65536:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number from 1 to 65536")
    return int(text)


def _pool_options(p: argparse.ArgumentParser) -> None:
    where = p.add_mutually_exclusive_group()
    where.add_argument("--workers", type=_positive, help="threads (default: one per core)")
    where.add_argument("--scheduler", metavar="tcp://HOST:PORT", help="a running Dask scheduler")
