"""python launch/impute.py --run RUN --store S.zarr --modality M --out OUT.h5ad: `clue impute`."""

from clue_dist.commands.impute import main
from clue_dist.process import run_main

if __name__ == "__main__":
    run_main(main)
