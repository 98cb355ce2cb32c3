"""python launch/differential.py --run RUN --store S.zarr --modality rna: `clue differential`."""

from clue_dist.commands.differential import main
from clue_dist.process import run_main

if __name__ == "__main__":
    run_main(main)
