"""python -m data_prep: see `commands`."""

import gc

gc.disable()  # to look over and over for what could go again would take a sixth of the imports, and nothing can go

from clue_dist.errors import run_main  # noqa: E402
from data_prep.commands import main  # noqa: E402

gc.freeze()
gc.enable()

if __name__ == "__main__":
    run_main(main)
