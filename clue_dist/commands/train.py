"""Train CLUE on a store: `clue train`, and `deepspeed launch/train.py` on many machines.

The config is checked before anything heavy is imported, config and store by all ranks before
anything is started.
"""

from __future__ import annotations

import argparse
import sys

from clue_dist.commands.catalogue import build_command_parser
from clue_dist.errors import STOPPED
from clue_dist.process import print_line, run_main
from clue_dist.ranks import Ranks
from clue_dist.train.arguments import parse_train_arguments, prepare_training, print_plan


def main() -> None:
    """Train a model on a store, or go on with one."""
    train_by_arguments(parse_train_arguments(build_command_parser("train")))


def train_by_arguments(arguments: argparse.Namespace) -> None:
    """Train as the arguments of `clue train` say, on all ranks alike; the process ends with it."""
    ranks = Ranks.from_environment()
    setup, warm_start = ranks.run_before_joining(lambda: prepare_training(arguments, ranks.world))
    setup = setup.agree_on_precision(ranks)
    if ranks.is_first:
        print_plan(setup, arguments, warm_start)
    if arguments.dry_run:
        return

    from clue_dist.train.loop import run_training

    result = run_training(setup, ranks, arguments.resume, warm_start)
    if ranks.is_first and result.finished:
        print_line(f"{result.format_ending()}: {setup.config.run}")
    ranks.leave_group()
    sys.exit(0 if result.finished else STOPPED)


if __name__ == "__main__":
    run_main(main)
