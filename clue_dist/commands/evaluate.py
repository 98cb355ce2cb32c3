"""Score how well modalities match, and whether z is one space."""

from clue_dist.commands.model_arguments import build_model_parser, open_model_and_store
from clue_dist.process import run_main


def main() -> None:
    """Score the store that the arguments name, write the scores and print them."""
    parser = build_model_parser(
        "evaluate",
        store="store with cells the model has not seen; matching needs paired ones",
        out="where to write scores.json",
    )
    parser.add_argument(
        "--max-cells",
        type=int,
        help="score a random part, so many paired cells and so many in all "
        "(default: all paired cells, 20,000 where neighbours are searched)",
    )
    arguments = parser.parse_args()

    from clue_dist.inference.evaluate import evaluate_store, require_scores_path
    from clue_dist.inference.score_tables import format_scores

    with open_model_and_store(
        arguments, lambda: require_scores_path(arguments.out, arguments.max_cells)
    ) as opened:
        trained_model, store, ranks = opened
        scores = evaluate_store(
            trained_model,
            store,
            arguments.out,
            run=arguments.run,
            max_cells=arguments.max_cells,
            min_known=arguments.min_known,
            batch_size=arguments.batch_size,
            ranks=ranks,
        )
        if ranks.is_first:
            print(f"{format_scores(scores)}\n{arguments.out}")


if __name__ == "__main__":
    run_main(main)
