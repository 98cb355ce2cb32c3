"""Teach a trained model new batches, or train it on with new cells or modalities."""

from __future__ import annotations

import argparse

from clue_dist.commands.catalogue import build_command_parser
from clue_dist.commands.model_arguments import print_cell_warnings
from clue_dist.commands.train import train_by_arguments
from clue_dist.files import parse_path
from clue_dist.process import print_error, run_main
from clue_dist.ranks import Ranks
from clue_dist.train.arguments import list_further_settings

_DETAILS = """\
--train batches finds what the decoders must know of new batches, in a minute and on one process.
All other weights stay bit for bit, and no cell's embedding moves. --train all goes on training all
weights, on a store of old and new cells, paired or not, perhaps with a modality more: features of
the modalities that the run knows must be the run's (`clue prep convert --features-from RUN
--new-modality NAME`)."""


def main() -> None:
    """Teach the model what the arguments ask for."""
    parser = build_command_parser("fine-tune", _DETAILS)
    parser.add_argument("--run", type=parse_path, required=True, help="a run, or a shared model")
    parser.add_argument("--store", required=True, help="the cells, a folder or a URL")
    parser.add_argument("--out", type=parse_path, required=True, help="folder of the new model")
    parser.add_argument(
        "--train", choices=("batches", "all"), default="batches", help="(default: %(default)s)"
    )
    parser.add_argument(
        "--set",
        action="extend",
        default=[],
        metavar="PATH=VALUE",
        help="override one setting of the run, where all weights train",
        nargs="+",
        dest="overrides",
    )
    parser.add_argument(
        "--dry-run", action="store_true", help="with --train all: check, and print what would run"
    )
    arguments = parser.parse_args()
    if arguments.train == "all":
        train_by_arguments(plan_further_training(arguments))
        return

    from clue_dist.inference.cells import open_cells
    from clue_dist.inference.load_model import load_model
    from clue_dist.inference.new_batches import tune_batches

    if arguments.overrides:
        print_error("warning: --set counts only with --train all")
    trained_model = load_model(arguments.run)
    with print_cell_warnings(Ranks.from_environment()):
        cells = open_cells(arguments.store, trained_model)
        tune_batches(arguments.run, trained_model, cells, arguments.out)
    print(arguments.out)


def plan_further_training(arguments: argparse.Namespace) -> argparse.Namespace:
    """Make the arguments of `clue train` that train a run's weights on, with the run's settings.

    Args:
        arguments: those of `clue fine-tune`.
    """
    config_file = arguments.run / "config.json"
    settings = [f"{path}={value}" for path, value in list_further_settings(config_file).items()]
    settings += [f"store={arguments.store}", f"run={arguments.out}"]
    return argparse.Namespace(
        config=config_file,
        overrides=[*settings, *arguments.overrides],
        resume="auto",
        init_from=arguments.run,
        dry_run=arguments.dry_run,
    )


if __name__ == "__main__":
    run_main(main)
