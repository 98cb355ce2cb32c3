"""What the commands that ask a trained model share: their flags, the model, the store."""

from __future__ import annotations

import argparse
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from clue_dist.commands.catalogue import build_command_parser
from clue_dist.config import MIN_KNOWN
from clue_dist.files import parse_path
from clue_dist.process import postpone_collections, print_error
from clue_dist.ranks import Ranks

if TYPE_CHECKING:
    from clue_dist.inference.cells import ArgumentNames
    from clue_dist.inference.load_model import TrainedModel
    from clue_dist.store.reader import Store


def build_model_parser(command: str, store: str, out: str) -> argparse.ArgumentParser:
    """Make the parser of a command that asks a model about the cells of a store.

    Args:
        command: its name in the catalogue.
        store: what the store holds, for the help.
        out: what the output is, for the help.
    """
    parser = build_command_parser(command)
    parser.add_argument("--run", type=parse_path, required=True, help="folder of the trained run")
    parser.add_argument("--store", required=True, help=f"{store}: a folder or a URL")
    parser.add_argument("--out", type=parse_path, required=True, help=out)
    parser.add_argument("--checkpoint", default="best", help="best, last, or a checkpoint's name")
    parser.add_argument(
        "--modalities",
        nargs="+",
        metavar="NAME",
        help="those of the store to use (default: all that the model knows)",
    )
    parser.add_argument(
        "--min-known",
        type=_parse_share,
        default=MIN_KNOWN,
        metavar="SHARE",
        help="least share of a modality's features that each converted file must have had "
        "(default: %(default)s)",
    )
    parser.add_argument("--batch-size", type=_positive, default=4096, help="cells embedded at once")
    return parser


def add_value_arguments(parser: argparse.ArgumentParser, batch: str, batch_help: str) -> None:
    """Add the arguments of commands that ask for values of features.

    Args:
        parser: of the command.
        batch: the default of --batch.
        batch_help: what --batch may be.
    """
    parser.add_argument(
        "--from",
        dest="from_",
        nargs="+",
        metavar="NAME",
        help="modalities to infer values from (default: all that a cell has)",
    )
    parser.add_argument(
        "--batch",
        nargs="+",
        default=[batch],
        metavar="BATCH|COVARIATE=LEVEL",
        help=f"{batch_help} (default: {batch})",
    )
    parser.add_argument(
        "--features", nargs="+", metavar="NAME", help="features wanted (default: all)"
    )
    parser.add_argument("--seed", type=int, default=0, help="of what is drawn (default: 0)")


def parse_batch_choice(arguments: argparse.Namespace) -> str | list[str]:
    """What --batch says: a batch's name or a choice, or levels of covariates, a word each."""
    words: list[str] = arguments.batch
    return words[0] if len(words) == 1 else words


def _parse_share(text: str) -> float:
    try:
        share = float(text)
    except ValueError:
        share = -1.0
    if not 0 <= share <= 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number from 0 to 1")
    return share


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number from 1 on")
    return int(text)


def name_file_arguments() -> ArgumentNames:
    """Name what a command takes to read an .h5ad of counts that is given in place of a store."""
    from clue_dist.inference.cells import ArgumentNames

    return ArgumentNames(
        modality="",
        layer="",
        feature_ids="",
        min_known="--min-known ",
        instead="convert the cells into a store, and say it there: `clue prep convert NAME=FILE "
        "--features-from RUN --out STORE`",
    )


@contextmanager
def open_model_and_store(
    arguments: argparse.Namespace, check_arguments: Callable[[], None]
) -> Iterator[tuple[TrainedModel, Store, Ranks]]:
    """Open what the arguments of `build_model_parser` ask for. After success the ranks part.

    Args:
        arguments: what the parser returned.
        check_arguments: what else must hold on every rank before any work begins.

    Yields:
        The model, the store, and this process among the ranks.
    """

    def open_both() -> tuple[TrainedModel, Store]:
        check_arguments()
        with postpone_collections():
            from clue_dist.inference.cells import choose_modalities
            from clue_dist.inference.load_model import load_model
            from clue_dist.store.reader import Store
        trained_model = load_model(arguments.run, arguments.checkpoint)
        store = choose_modalities(Store(arguments.store), trained_model, arguments.modalities)
        return trained_model, store

    ranks = Ranks.from_environment()
    with print_cell_warnings(ranks):
        trained_model, store = ranks.run_before_joining(open_both)
        yield trained_model, store, ranks.join_group()
    ranks.leave_group()


@contextmanager
def print_cell_warnings(ranks: Ranks) -> Iterator[None]:
    """Print warnings of cells on rank 0 as commands print them, without a line of code."""
    from clue_dist.inference.cells.named_counts import CellWarning

    with warnings.catch_warnings():
        show_other = warnings.showwarning

        def show_warning(
            message: Warning | str, category: type[Warning], *place: Any, **more: Any
        ) -> None:
            if not issubclass(category, CellWarning):
                show_other(message, category, *place, **more)
            elif ranks.is_first:
                print_error(f"warning: {message}")

        warnings.showwarning = show_warning
        yield
