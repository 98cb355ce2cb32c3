"""python launch/match.py --run RUN --store S.zarr --first rna ... --out P.csv: `clue match`."""

from clue_dist.commands.match import main
from clue_dist.process import run_main

if __name__ == "__main__":
    run_main(main)
