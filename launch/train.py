"""Train CLUE on a store.

deepspeed launch/train.py --config configs/atlas.json [--set train.lr=1e-4 ...] [--resume auto|never|DIR] [--dry-run]

The config is read and checked before anything heavy is imported or started.
"""

import argparse
import sys

from clue_dist import config as configs
from clue_dist.errors import run_main

STOPPED = 75  # exit code after a stop signal: saved, not finished, start me again (EX_TEMPFAIL)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", required=True, help="a recipe, see configs/")
    parser.add_argument(
        "--set", action="append", default=[], metavar="PATH=VALUE", help="override one setting", nargs="+"
    )
    parser.add_argument(
        "--resume", default="auto", help="auto (default): go on from the newest sound checkpoint; never; a folder"
    )
    parser.add_argument("--dry-run", action="store_true", help="check the config and the store, print what would run")
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)  # the deepspeed launcher passes it
    return parser.parse_args()


def main() -> None:
    args = arguments()
    config = configs.load(args.config, [text for group in args.set for text in group])
    configs.require_paths(config)

    from clue_dist.ranks import Ranks
    from clue_dist.train.setup import prepare

    ranks = Ranks.from_env()
    setup = prepare(config, ranks.world)
    if ranks.first:
        print(setup.summary(), flush=True)
    if args.dry_run:
        return

    from clue_dist.train.loop import fit

    result = fit(setup, ranks, args.resume)
    if ranks.first and result.finished:
        best = (
            ""
            if result.state.best is None
            else f", best validation {result.state.best:.4f} at step {result.state.best_step}"
        )
        print(f"finished at step {result.state.step}{best}: {config.run}", flush=True)
    ranks.close()
    if not result.finished:
        sys.exit(STOPPED)


if __name__ == "__main__":
    run_main(main)
