"""Write the weights of a run, and a card that explains them, into a folder to be shared."""

import argparse

from clue_dist.commands.catalogue import build_command_parser
from clue_dist.commands.model_arguments import print_cell_warnings
from clue_dist.files import parse_path
from clue_dist.process import run_main
from clue_dist.ranks import Ranks, run_on_first_rank


def main() -> None:
    """Export the run that the arguments name, and print the folder."""
    arguments = _parse_arguments()

    from clue_dist.inference.export import CardTexts, export_run

    def export_model() -> None:
        export_run(
            arguments.run or arguments.folder,
            arguments.out,
            checkpoint=arguments.checkpoint,
            scores=arguments.scores,
            texts=CardTexts(arguments.title, arguments.data, arguments.licence),
            cells=arguments.with_cells,
        )
        print(arguments.out)

    with print_cell_warnings(Ranks.from_environment()):
        run_on_first_rank(export_model)


def _parse_arguments() -> argparse.Namespace:
    parser = build_command_parser("export")
    runs = parser.add_mutually_exclusive_group(required=True)
    runs.add_argument("folder", nargs="?", metavar="RUN", type=parse_path, help="the trained run")
    runs.add_argument("--run", type=parse_path, help="the same, as other commands take it")
    parser.add_argument("--out", type=parse_path, required=True, help="the folder to make")
    parser.add_argument("--checkpoint", default="best", help="best, last, or a checkpoint's name")
    parser.add_argument(
        "--scores", type=parse_path, help="scores.json of `clue evaluate`, for the card"
    )
    parser.add_argument(
        "--title", default="", help="title of the card (default: the folder's name)"
    )
    parser.add_argument(
        "--data", default="", metavar="TEXT", help="what was measured, and where it can be had"
    )
    parser.add_argument(
        "--licence",
        "--license",
        default="",
        metavar="TEXT",
        help="terms under which others may use the model",
    )
    parser.add_argument(
        "--with-cells",
        metavar="STORE",
        help="reference cells that travel with the model, a store or an .h5ad of `clue embed "
        "--per-modality`: z and obs, no counts",
    )
    return parser.parse_args()


if __name__ == "__main__":
    run_main(main)
