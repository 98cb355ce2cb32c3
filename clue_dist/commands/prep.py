"""The commands of data_prep, under `clue prep`."""

from clue_dist.process import postpone_collections, run_main


def main() -> None:
    """Run the command of data_prep that the words name."""
    with postpone_collections():
        from data_prep.cli.commands import main as run_preparation

    run_preparation("clue prep")


if __name__ == "__main__":
    run_main(main)
