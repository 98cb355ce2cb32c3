"""data_prep: raw counts of single cells -> a shuffled, validated, compressed store. `python -m data_prep --help`."""
