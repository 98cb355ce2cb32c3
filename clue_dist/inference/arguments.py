"""What the command lines that use a trained run share: their arguments, and getting the model and the store."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from clue_dist.files import parse_path
from clue_dist.inference.load_model import TrainedModel, load_model
from clue_dist.ranks import Ranks
from clue_dist.store.reader import Store


def build_parser(script: str, description: str, store: str, out: str) -> argparse.ArgumentParser:
    """A parser with --run, --store, --out, --checkpoint and --batch-size. store, out: what these are, for the help."""
    parser = argparse.ArgumentParser(prog=f"launch/{script}", description=description)
    parser.add_argument("--run", type=parse_path, required=True, help="folder of the trained run")
    parser.add_argument("--store", required=True, help=f"{store}: a folder or a URL")
    parser.add_argument("--out", type=parse_path, required=True, help=out)
    parser.add_argument("--checkpoint", default="best", help="best, last, or a checkpoint's name")
    parser.add_argument("--batch-size", type=_positive, default=4096, help="cells embedded at once")
    parser.add_argument(
        "--local_rank", "--local-rank", help=argparse.SUPPRESS
    )  # the launcher's; LOCAL_RANK says it
    return parser


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number from 1 on")
    return int(text)


@contextmanager
def open_model_and_store(
    args: argparse.Namespace, check: Callable[[], None]
) -> Iterator[tuple[TrainedModel, Store, Ranks]]:
    """The model, the store and the ranks these arguments ask for; the ranks part after success.

    check: what else must hold on every rank.
    """

    def ready() -> tuple[TrainedModel, Store]:
        check()
        return load_model(args.run, args.checkpoint), Store(args.store)

    ranks = Ranks.from_environment()
    loaded, store = ranks.run_before_joining(ready)
    yield loaded, store, ranks.join_group()
    ranks.leave_group()
