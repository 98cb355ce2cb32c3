"""Find the features that mark groups of cells, by what a trained model expects of them."""

import argparse

from clue_dist.commands.model_arguments import (
    add_value_arguments,
    build_model_parser,
    open_model_and_store,
    parse_batch_choice,
)
from clue_dist.process import run_main


def main() -> None:
    """Compare groups as the arguments say, and name the feature that marks each one most."""
    arguments = _parse_arguments()

    from clue_dist.inference.cells import open_cells
    from clue_dist.inference.differential import (
        DifferentialChoices,
        compare_groups,
        write_differences,
    )
    from clue_dist.inference.output_files import require_table_path

    choices = DifferentialChoices(
        arguments.modality,
        arguments.groupby,
        groups=arguments.groups,
        reference=arguments.reference,
        from_=arguments.from_,
        batch=parse_batch_choice(arguments),
        features=arguments.features,
        least_change=arguments.least_change,
        pairs=arguments.pairs,
        seed=arguments.seed,
    )
    with open_model_and_store(arguments, lambda: require_table_path(arguments.out)) as opened:
        trained_model, store, ranks = opened

        def compare_cells() -> None:
            cells = open_cells(store, trained_model, min_known=arguments.min_known)
            tables = compare_groups(trained_model, cells, choices, arguments.batch_size)
            write_differences(tables, arguments.out)
            firsts = (f"{group}: {table.index[0]}" for group, table in tables.items())
            print(*firsts, arguments.out, sep="\n")

        ranks.run_on_first(compare_cells)


def _parse_arguments() -> argparse.Namespace:
    parser = build_model_parser(
        "differential", store="store of the cells", out="tables as .csv, .csv.gz or .parquet"
    )
    parser.add_argument("--modality", required=True, help="whose features are compared")
    parser.add_argument(
        "--groupby",
        default="cell_type",
        metavar="COLUMN",
        help="what the store keeps of cells that tells the groups: cell_type (default), batch, or "
        "a column that --keep-obs kept",
    )
    parser.add_argument("--groups", nargs="+", metavar="NAME", help="groups wanted (default: all)")
    parser.add_argument(
        "--reference", metavar="NAME", help="group to compare them with (default: all other cells)"
    )
    add_value_arguments(
        parser,
        "average",
        "name of a batch to decode for, or average, a batch that is drawn for each pair of cells; "
        "or levels of covariates, where the others are drawn",
    )
    parser.add_argument(
        "--least-change",
        type=float,
        default=0.25,
        help="log2 fold change from which cells count as different (default: %(default)s)",
    )
    parser.add_argument(
        "--pairs",
        type=int,
        default=2000,
        metavar="NUMBER",
        help="pairs of cells that are drawn for each group (default: %(default)s)",
    )
    return parser.parse_args()


if __name__ == "__main__":
    run_main(main)
