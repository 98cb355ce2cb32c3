"""`python -m clue_dist COMMAND` is `clue COMMAND`, where the console script is not on the path."""

from clue_dist.commands.cli import main

if __name__ == "__main__":
    main()
