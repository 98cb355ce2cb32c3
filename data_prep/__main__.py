"""python -m data_prep: see `commands`."""

import gc

if __name__ == "__main__":
    gc.disable()  # packages stay: to look through them for garbage while they load takes a sixth of that time

    from clue_dist.process import run_main
    from data_prep.cli.commands import main

    gc.freeze()  # nor is it looked for among them later
    gc.enable()
    run_main(main)
