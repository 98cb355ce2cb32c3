"""python launch/fine_tune.py --run RUN --store S.zarr --out NEW: `clue fine-tune`."""

from clue_dist.commands.fine_tune import main
from clue_dist.process import run_main

if __name__ == "__main__":
    run_main(main)
