"""deepspeed launch/train.py --config configs/atlas.json: `clue train`, under a launcher too."""

from clue_dist.commands.train import main
from clue_dist.process import run_main

if __name__ == "__main__":
    run_main(main)
