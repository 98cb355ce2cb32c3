"""python launch/embed.py --run RUN --store S.zarr --out OUT.h5mu: `clue embed`."""

from clue_dist.commands.embed import main
from clue_dist.process import run_main

if __name__ == "__main__":
    run_main(main)
