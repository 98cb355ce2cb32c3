"""Train CLUE on a store.

deepspeed launch/train.py --config configs/atlas.json [--set train.lr=1e-4 ...] [--resume auto|never|DIR] [--dry-run]

The config is checked before anything heavy is imported, config and store by all ranks before anything is started.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from clue_dist import config as configs
from clue_dist.process import print_line, run_main
from clue_dist.ranks import Ranks

if TYPE_CHECKING:
    from clue_dist.train.setup import Setup

STOPPED = 75  # exit code after a stop signal: saved, not finished, start me again (EX_TEMPFAIL)


def parse_train_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config", required=True, help="a recipe, see configs/")
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="PATH=VALUE",
        help="override one setting",
        nargs="+",
    )
    parser.add_argument(
        "--resume",
        default="auto",
        help="auto (default): go on from the newest sound checkpoint; never; a folder",
    )
    parser.add_argument(
        "--dry-run",
        action="store_true",
        help="check the config and the store, print what would run",
    )
    parser.add_argument(
        "--local_rank", type=int, help=argparse.SUPPRESS
    )  # the deepspeed launcher passes it
    return parser.parse_args()


def print_start(run: Path, resume: str) -> None:
    """What a run would go on from. Of "auto" the newest, of which nothing is read: that may take minutes."""
    from clue_dist.checkpoint.run_folder import choose_checkpoint, list_checkpoints, parse_step

    auto = resume == "auto"
    saved = (
        next(iter(list_checkpoints(run / "checkpoints")), None)
        if auto
        else choose_checkpoint(run, resume, Ranks())
    )
    if saved is not None:
        sound = ", if that checkpoint is sound" if auto else ""
        print(f"  would go on from step {parse_step(saved)}{sound}", flush=True)


def main() -> None:
    args = parse_train_arguments()
    ranks = Ranks.from_environment()

    def ready() -> Setup:
        config = configs.load_config(args.config, [text for group in args.set for text in group])
        configs.require_paths(config)

        from clue_dist.train.setup import prepare_setup

        prepared = prepare_setup(config, ranks.world)
        if not args.dry_run:
            import clue_dist.train.loop  # noqa: F401  DeepSpeed looks for compilers and GPUs: before the ranks join
        return prepared

    setup = ranks.run_before_joining(ready)
    if ranks.is_first:
        print(setup.format_summary(), flush=True)
        if args.dry_run:
            print_start(Path(setup.config.run), args.resume)
    if args.dry_run:
        return

    from clue_dist.train.loop import fit

    result = fit(setup, ranks, args.resume)
    if ranks.is_first and result.finished:
        best = (
            ""
            if result.state.best is None
            else f", best validation {result.state.best:.4f} at step {result.state.best_step}"
        )
        print_line(f"finished at step {result.state.step}{best}: {setup.config.run}")
    ranks.leave_group()
    if not result.finished:
        sys.exit(STOPPED)


if __name__ == "__main__":
    run_main(main)
