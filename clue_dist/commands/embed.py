"""Embed the cells of a store with a trained model."""

import argparse

from clue_dist.commands.model_arguments import build_model_parser, open_model_and_store
from clue_dist.errors import format_count
from clue_dist.process import run_main


def main() -> None:
    """Embed the store that the arguments name, and say how many cells it has."""
    arguments = _parse_arguments()

    from clue_dist.inference.answer_files import require_answer_path
    from clue_dist.inference.cells import open_cells
    from clue_dist.inference.embed import EMBEDDING_FORMATS, embed_cells
    from clue_dist.inference.file_order import parse_like, require_file_order

    def check_arguments() -> None:
        like = None if arguments.like is None else parse_like(arguments.like)[1]
        require_answer_path(arguments.out, EMBEDDING_FORMATS, like)
        if arguments.like is not None:
            require_file_order(arguments.out, arguments.like)

    with open_model_and_store(arguments, check_arguments) as opened:
        trained_model, store, ranks = opened
        embed_cells(
            trained_model,
            open_cells(store, trained_model, min_known=arguments.min_known),
            arguments.out,
            run=arguments.run,
            per_modality=arguments.per_modality,
            batch_size=arguments.batch_size,
            like=arguments.like,
            ranks=ranks,
        )
        if ranks.is_first:
            n_cells = store.manifest.n_cells
            model_name = f"{arguments.run} ({trained_model.name})"
            print(f"{format_count(n_cells, 'cell')} embedded with {model_name}\n{arguments.out}")


def _parse_arguments() -> argparse.Namespace:
    parser = build_model_parser(
        "embed", store="store of the cells to embed", out="OUT.h5mu, .h5ad or .zarr"
    )
    parser.add_argument(
        "--per-modality", action="store_true", help="also the full z from each modality alone"
    )
    parser.add_argument(
        "--like",
        metavar="[DATASET:]FILE",
        help="give the embedding the barcodes and the order of this file, one of cells or a text "
        "with a barcode on each line; --out is then an .h5ad or .zarr",
    )
    return parser.parse_args()


if __name__ == "__main__":
    run_main(main)
