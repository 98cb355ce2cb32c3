"""python launch/bench.py --config configs/atlas.json --set store=S.zarr: `clue bench`."""

from clue_dist.commands.bench import main
from clue_dist.process import run_main

if __name__ == "__main__":
    run_main(main)
