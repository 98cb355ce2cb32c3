"""python launch/sweep.py configs/sweep.yaml --out runs/sweep [--trials 20] [--seed 0]

Trains one run for each choice of hyperparameters, one after the other, and ends with a table. The
same command typed again goes on where it was stopped.
"""

import argparse
import sys

from clue_dist.files import parse_path
from clue_dist.process import run_main
from clue_dist.train.sweep import run_sweep

EXIT_STOPPED = 75  # as of launch/train.py: start the command again to go on


def main() -> None:
    """Search the hyperparameters that the arguments name."""
    parser = argparse.ArgumentParser(
        prog="launch/sweep.py", description="Search hyperparameters without a server."
    )
    parser.add_argument("plan", type=parse_path, help="what to try, see configs/sweep.yaml")
    parser.add_argument("--out", type=parse_path, required=True, help="folder of the runs")
    parser.add_argument("--trials", type=int, help="the most trials (default: run_cap of the plan)")
    parser.add_argument("--seed", type=int, default=0, help="of a random search (default: 0)")
    arguments = parser.parse_args()
    results = run_sweep(arguments.plan, arguments.out, arguments.trials, arguments.seed)
    sys.exit(EXIT_STOPPED if any(result.status == "stopped" for result in results) else 0)


if __name__ == "__main__":
    run_main(main)
