"""python launch/export.py --run RUN --out FOLDER: `clue export`."""

from clue_dist.commands.export import main
from clue_dist.process import run_main

if __name__ == "__main__":
    run_main(main)
