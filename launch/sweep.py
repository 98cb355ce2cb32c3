"""python launch/sweep.py configs/sweep.yaml --out runs/sweep: `clue sweep`."""

from clue_dist.commands.sweep import main
from clue_dist.process import run_main

if __name__ == "__main__":
    run_main(main)
