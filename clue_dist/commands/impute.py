"""Impute a modality of the cells of a store with a trained model."""

import argparse

from clue_dist.commands.model_arguments import (
    add_value_arguments,
    build_model_parser,
    open_model_and_store,
    parse_batch_choice,
)
from clue_dist.errors import format_count
from clue_dist.process import run_main


def main() -> None:
    """Impute as the arguments say, and say how many cells there are."""
    arguments = _parse_arguments()

    from clue_dist.inference.answer_files import require_answer_path
    from clue_dist.inference.cells import open_cells
    from clue_dist.inference.imputation_question import ImputationChoices
    from clue_dist.inference.impute import IMPUTATION_FORMATS, write_imputation

    choices = ImputationChoices(
        arguments.modality,
        from_=arguments.from_,
        batch=parse_batch_choice(arguments),
        features=arguments.features,
        library_size=arguments.library_size,
        log1p=arguments.log1p,
        samples=arguments.samples,
        interval=arguments.interval,
        threshold=arguments.threshold,
        seed=arguments.seed,
    )
    with open_model_and_store(
        arguments, lambda: require_answer_path(arguments.out, IMPUTATION_FORMATS)
    ) as opened:
        trained_model, store, ranks = opened
        n_cells = write_imputation(
            trained_model,
            open_cells(store, trained_model, min_known=arguments.min_known),
            arguments.out,
            choices,
            run=arguments.run,
            batch_size=arguments.batch_size,
            ranks=ranks,
        )
        if ranks.is_first:
            model_name = f"{arguments.run} ({trained_model.name})"
            answer = f"{choices.modality} of {format_count(n_cells, 'cell')} by {model_name}"
            print(f"{answer}\n{arguments.out}")


def _parse_arguments() -> argparse.Namespace:
    parser = build_model_parser("impute", store="store of the cells", out="OUT.h5ad or .zarr")
    parser.add_argument("--modality", required=True, help="whose values are wanted")
    add_value_arguments(
        parser,
        "own",
        "name of a batch to decode for, own (of each cell), or average; or levels of covariates, "
        "where the others are each cell's own",
    )
    parser.add_argument(
        "--library-size",
        type=_parse_size,
        help="expected counts of profiles with so many counts, or own, those of each cell "
        "(default: shares, per 10,000 counts)",
    )
    parser.add_argument(
        "--log1p", action="store_true", help="the expected ln(1 + counts per 10,000) of a profile"
    )
    parser.add_argument("--samples", type=int, default=0, help="profiles to draw of each cell")
    parser.add_argument(
        "--interval",
        type=float,
        help="add layers lower and upper: bounds of so many draws, as 0.9",
    )
    parser.add_argument(
        "--threshold", type=float, help="make smaller values zero, and the matrices sparse"
    )
    return parser.parse_args()


def _parse_size(text: str) -> float | str:
    """A number, or a word that is checked later."""
    try:
        return float(text)
    except ValueError:
        return text


if __name__ == "__main__":
    run_main(main)
