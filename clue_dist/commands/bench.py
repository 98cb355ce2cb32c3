"""Measure where the time goes on this machine: data alone, the model alone, both together."""

from __future__ import annotations

import json

from clue_dist.commands.catalogue import build_command_parser
from clue_dist.process import run_main
from clue_dist.ranks import Ranks
from clue_dist.train.arguments import parse_bench_arguments, prepare_benchmark

_DETAILS = """\
Data alone, the model alone and both together are timed. Nothing is written but --json. What the
system keeps in memory is read faster than what lies on the disk: a store larger than the memory
gives honest figures."""


def main() -> None:
    """Prepare on all ranks alike, measure, and print the report."""
    arguments = parse_bench_arguments(build_command_parser("bench", _DETAILS))
    ranks = Ranks.from_environment()
    setup = ranks.run_before_joining(lambda: prepare_benchmark(arguments, ranks.world))
    setup = setup.agree_on_precision(ranks)

    from clue_dist.train.bench import measure_speed

    report = measure_speed(setup, ranks, arguments.seconds, arguments.repeats)
    if ranks.is_first:
        if arguments.json:
            arguments.json.write_text(json.dumps(report.as_dict(), indent=1) + "\n")
        print(report.format_text(), flush=True)
    ranks.leave_group()


if __name__ == "__main__":
    run_main(main)
