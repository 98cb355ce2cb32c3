"""python launch/transfer.py --run RUN --store S.zarr --reference R.zarr ...: `clue transfer`."""

from clue_dist.commands.transfer import main
from clue_dist.process import run_main

if __name__ == "__main__":
    run_main(main)
