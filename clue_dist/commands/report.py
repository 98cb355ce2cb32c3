"""Write one page about a run, RUN/report/index.html; the last line printed is its path."""

from clue_dist.commands.catalogue import build_command_parser
from clue_dist.files import parse_path
from clue_dist.process import run_main
from clue_dist.ranks import run_on_first_rank


def main() -> None:
    """Write the page of the run that the arguments name, and print its path."""
    parser = build_command_parser("report")
    parser.add_argument("--run", type=parse_path, required=True, help="folder of the trained run")
    parser.add_argument(
        "--embedding", type=parse_path, help="output of `clue embed --per-modality`"
    )
    parser.add_argument("--scores", type=parse_path, help="scores.json of `clue evaluate`")
    parser.add_argument(
        "--imputed", type=parse_path, help="output of `clue impute`, compared with --truth"
    )
    parser.add_argument("--truth", help="store that holds the counts of the imputed cells")
    parser.add_argument(
        "--wandb", action="store_true", help="log the report to the run's wandb run, too"
    )
    arguments = parser.parse_args()

    from clue_dist.inference.report import write_report

    def report_run() -> None:
        page = write_report(
            arguments.run, arguments.embedding, arguments.scores, arguments.imputed, arguments.truth
        )
        if arguments.wandb:
            from clue_dist.inference.report.wandb_tables import log_report

            log_report(arguments.run, page)
        print(page)

    run_on_first_rank(report_run)


if __name__ == "__main__":
    run_main(main)
