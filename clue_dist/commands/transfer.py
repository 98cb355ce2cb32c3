"""Carry labels from the labelled cells of one store to the cells of another."""

import argparse

from clue_dist.commands.model_arguments import (
    build_model_parser,
    name_file_arguments,
    open_model_and_store,
)
from clue_dist.errors import format_count
from clue_dist.process import run_main


def main() -> None:
    """Label the cells of the store that the arguments name, and say how many are unknown."""
    arguments = _parse_arguments()

    from clue_dist.inference.cells import open_cells
    from clue_dist.inference.output_files import require_table_path
    from clue_dist.inference.reference_cells import open_own_reference, open_reference
    from clue_dist.inference.transfer import label_cells, write_labels
    from clue_dist.neighbours.label_transfer import UNKNOWN_LABEL, TransferSettings

    with open_model_and_store(arguments, lambda: require_table_path(arguments.out)) as opened:
        trained_model, store, ranks = opened

        def label_store() -> None:
            if arguments.reference is None:
                known = open_own_reference(arguments.run, trained_model)
            else:
                known = open_reference(
                    arguments.reference,
                    trained_model,
                    name_file_arguments(),
                    min_known=arguments.min_known,
                )
            labels = label_cells(
                trained_model,
                known,
                open_cells(store, trained_model, min_known=arguments.min_known),
                arguments.label_key,
                settings=TransferSettings(
                    kept=arguments.kept, least_confidence=arguments.least_confidence
                ),
                batch_size=arguments.batch_size,
            )
            write_labels(labels, arguments.out)
            n_unknown = int((labels.label == UNKNOWN_LABEL).sum())
            print(f"{format_count(len(labels), 'cell')} labelled, {n_unknown:,} unknown")
            print(arguments.out)

        ranks.run_on_first(label_store)


def _parse_arguments() -> argparse.Namespace:
    parser = build_model_parser(
        "transfer", store="store of the cells to label", out="labels as .csv, .csv.gz or .parquet"
    )
    parser.add_argument(
        "--reference",
        metavar="STORE",
        help="labelled cells, a store or an .h5ad of `clue embed --per-modality` (default: those "
        "that travel with the model, else its training store)",
    )
    parser.add_argument(
        "--label-key",
        default="cell_type",  # what a store calls labels, whatever their column was called
        metavar="COLUMN",
        help="of the reference, with the labels: any that it keeps (default: %(default)s, as a "
        "store calls the labels that it was converted with)",
    )
    parser.add_argument(
        "--kept",
        type=float,
        default=0.9,
        metavar="SHARE",
        help="of the cells of known types, not to be called unknown (default: %(default)s)",
    )
    parser.add_argument(
        "--least-confidence",
        type=float,
        default=0.0,
        metavar="PROBABILITY",
        help="below which a label is unknown, too (default: %(default)s)",
    )
    return parser.parse_args()


if __name__ == "__main__":
    run_main(main)
