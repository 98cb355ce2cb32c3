"""python launch/report.py --run RUN: `clue report`."""

from clue_dist.commands.report import main
from clue_dist.process import run_main

if __name__ == "__main__":
    run_main(main)
