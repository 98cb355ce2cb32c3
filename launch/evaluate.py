"""python launch/evaluate.py --run RUN --store S.zarr --out scores.json: `clue evaluate`."""

from clue_dist.commands.evaluate import main
from clue_dist.process import run_main

if __name__ == "__main__":
    run_main(main)
