"""What a person types: `clue COMMAND` and `launch/COMMAND.py` run the module of that name."""
