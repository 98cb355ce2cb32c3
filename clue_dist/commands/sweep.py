"""Search hyperparameters: one training run for each choice of them, one after the other."""

import sys

from clue_dist.commands.catalogue import build_command_parser
from clue_dist.errors import STOPPED
from clue_dist.files import parse_path
from clue_dist.process import run_main
from clue_dist.ranks import Ranks


def main() -> None:
    """Search the hyperparameters that the arguments name."""
    parser = build_command_parser(
        "sweep",
        "Reads what `wandb sweep` reads, but needs no server. The same command typed again goes on "
        "where it was stopped; it ends with a table.",
    )
    parser.add_argument(
        "plan",
        type=parse_path,
        help="what to try, as configs/sweep.yaml does, which `sweep` names in any folder",
    )
    parser.add_argument("--out", type=parse_path, required=True, help="folder of the runs")
    parser.add_argument("--trials", type=int, help="the most trials (default: run_cap of the plan)")
    parser.add_argument("--seed", type=int, default=0, help="of a random search (default: 0)")
    parser.add_argument(
        "--set",
        dest="overrides",
        nargs="+",
        action="extend",
        default=[],
        metavar="NAME=VALUE",
        help="settings that all trials share, as store=S.zarr",
    )
    arguments = parser.parse_args()
    Ranks.from_environment().require_alone("a search starts the ranks of its runs itself")

    from clue_dist.train.sweep import run_sweep

    results = run_sweep(
        arguments.plan, arguments.out, arguments.trials, arguments.seed, arguments.overrides
    )
    statuses = {result.status for result in results}
    sys.exit(STOPPED if "stopped" in statuses else int("finished" not in statuses))


if __name__ == "__main__":
    run_main(main)
