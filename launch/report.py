"""python launch/report.py --run RUN [--embedding OUT.h5mu] [--scores scores.json]

Writes RUN/report/index.html; the last line printed is its path.
"""

import argparse

from clue_dist.files import parse_path
from clue_dist.inference.report import write_report
from clue_dist.process import run_main


def main() -> None:
    """Write the page of the run that the arguments name, and print its path."""
    parser = argparse.ArgumentParser(
        prog="launch/report.py", description="Write one page about a run."
    )
    parser.add_argument("--run", type=parse_path, required=True, help="folder of the trained run")
    parser.add_argument(
        "--embedding", type=parse_path, help="output of launch/embed.py --per-modality"
    )
    parser.add_argument("--scores", type=parse_path, help="scores.json of launch/evaluate.py")
    arguments = parser.parse_args()
    print(write_report(arguments.run, arguments.embedding, arguments.scores))


if __name__ == "__main__":
    run_main(main)
