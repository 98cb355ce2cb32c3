"""Run `python -m data_prep COMMAND`; `data_prep.cli.commands` holds the commands."""

import gc

if __name__ == "__main__":
    # Packages stay for good. Looking through them for garbage takes a sixth of the time that it
    # takes to load them, so it is not done meanwhile, and not later.
    gc.disable()
    from clue_dist.process import run_main, skip_cleanup
    from data_prep.cli.commands import main

    gc.freeze()
    gc.enable()
    skip_cleanup()  # to take apart what was loaded takes a tenth of the time to load it, too
    run_main(main)
