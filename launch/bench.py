"""Measure where the time goes on this machine: data alone, the model alone, both together.

python launch/bench.py --config configs/atlas.json --set store=S.zarr [--json OUT.json]

Under `deepspeed`, torchrun or srun all ranks are measured together. Nothing is written but OUT.json. What the system
keeps in memory is read faster than what lies on the disk: a store larger than the memory gives honest figures.
"""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path
from typing import TYPE_CHECKING

from clue_dist import config as configs
from clue_dist.errors import ConfigError
from clue_dist.files import write_file
from clue_dist.process import run_main
from clue_dist.ranks import Ranks

if TYPE_CHECKING:
    from clue_dist.train.setup import Setup


def parse_bench_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config", required=True, help="a recipe, see configs/")
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="PATH=VALUE",
        help="override one setting",
        nargs="+",
    )
    parser.add_argument(
        "--seconds", type=float, default=2.0, help="of one repeat (default: %(default)s)"
    )
    parser.add_argument(
        "--repeats", type=int, default=5, help="the median of so many counts (default: %(default)s)"
    )
    parser.add_argument("--json", type=Path, metavar="OUT", help="also write the figures there")
    parser.add_argument(
        "--local_rank", type=int, help=argparse.SUPPRESS
    )  # the deepspeed launcher passes it
    return parser.parse_args()


def check_bench_arguments(args: argparse.Namespace) -> None:
    if args.seconds <= 0 or args.repeats < 1:
        got = f"--seconds {args.seconds:g} --repeats {args.repeats}"
        raise ConfigError(
            "nothing to measure", got=got, expected="seconds above 0, one repeat or more"
        )
    if args.json and (args.json.is_dir() or not args.json.absolute().parent.is_dir()):
        raise ConfigError(
            "the figures go into a file of a folder that is there", where=f"--json {args.json}"
        )
    if args.json and not os.access(
        args.json if args.json.exists() else args.json.absolute().parent, os.W_OK
    ):
        got, fix = (
            "no permission to write, or a disk that is read only",
            "choose another file, or leave --json out",
        )
        raise ConfigError(
            "the figures cannot be written", where=f"--json {args.json}", got=got, fix=fix
        )


def main() -> None:
    args = parse_bench_arguments()
    ranks = Ranks.from_environment()

    def ready() -> Setup:
        check_bench_arguments(args)
        config = configs.load_config(args.config, [text for group in args.set for text in group])

        from clue_dist.train.setup import prepare_setup

        return prepare_setup(config, ranks.world, writes=False)

    setup = ranks.run_before_joining(ready)

    from clue_dist.train.bench import measure_speed

    report = measure_speed(setup, ranks, args.seconds, args.repeats)
    if ranks.is_first:
        if args.json:
            write_file(args.json, json.dumps(report.as_dict(), indent=1) + "\n")
        print(report.text(), flush=True)
    ranks.leave_group()


if __name__ == "__main__":
    run_main(main)
