"""The command lines of `clue train` and `clue bench`: what is read, checked and announced.

A mistake in the config is answered at once: what takes seconds to import comes after that check.
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from clue_dist import config_file
from clue_dist.config import Config
from clue_dist.errors import ConfigError
from clue_dist.files import parse_path
from clue_dist.number_checks import require_number
from clue_dist.process import postpone_collections
from clue_dist.ranks import Ranks

if TYPE_CHECKING:
    from clue_dist.train.initial_weights import WarmStart
    from clue_dist.train.setup import Setup

# Settings that follow from the store, which is another one when weights are trained on.
_FROM_STORE = (
    "train.epochs",
    "train.validate_every",
    "train.checkpoint_every",
    "data.batch_size",
)
_SLOWER = 0.3  # share of the run's learning rate: the weights are nearly where they shall be


def parse_train_arguments(parser: argparse.ArgumentParser) -> argparse.Namespace:
    """Parse the command line of `clue train` with a parser that has no such arguments yet."""
    _add_settings(parser)
    parser.add_argument(
        "--resume",
        default="auto",
        help="auto (default): go on from the newest sound checkpoint; never; a folder",
    )
    parser.add_argument(
        "--init-from",
        type=parse_path,
        metavar="RUN",
        help="begin with the weights of this run, on a store of the same features",
    )
    parser.add_argument(
        "--dry-run",
        action="store_true",
        help="check the config and the store, print what would run",
    )
    return parser.parse_args()


def parse_bench_arguments(parser: argparse.ArgumentParser) -> argparse.Namespace:
    """Parse the command line of `clue bench` with a parser that has no such arguments yet."""
    _add_settings(parser)
    parser.add_argument(
        "--seconds", type=float, default=2.0, help="length of one repeat (default: %(default)s)"
    )
    parser.add_argument(
        "--repeats", type=int, default=5, help="the median of so many counts (default: %(default)s)"
    )
    parser.add_argument(
        "--json", type=parse_path, metavar="OUT", help="also write the figures there"
    )
    return parser.parse_args()


def _add_settings(parser: argparse.ArgumentParser) -> None:
    """Add what both command lines have in common."""
    parser.add_argument(
        "--config",
        type=parse_path,
        required=True,
        help="a JSON file, or the name of a recipe in configs/, as atlas",
    )
    parser.add_argument(
        "--set",
        action="extend",
        default=[],
        metavar="PATH=VALUE",
        help="override one setting",
        nargs="+",
        dest="overrides",  # every --set together
    )


def list_further_settings(run_config: Path) -> dict[str, Any]:
    """List what differs from the settings of a run where its weights are trained on.

    Args:
        run_config: config.json of the run.

    Returns:
        Settings by dotted path.

    Raises:
        ConfigError: config.json is damaged.
    """
    learning_rate = config_file.load_config(run_config).train.lr * _SLOWER
    return dict.fromkeys(_FROM_STORE, "auto") | {"train.lr": float(f"{learning_rate:g}")}


def prepare_training(arguments: argparse.Namespace, world: int) -> tuple[Setup, WarmStart | None]:
    """Check what a command line asks for, as `prepare_run` does.

    Args:
        arguments: what `parse_train_arguments` gave.
        world: the number of ranks.

    Raises:
        ClueError: what `prepare_run` raises.
    """
    config = config_file.load_config(arguments.config, arguments.overrides)
    return prepare_run(
        config, world, arguments.resume, arguments.init_from, imports_loop=not arguments.dry_run
    )


def prepare_run(
    config: Config,
    world: int,
    resume: str,
    init_from: Path | None,
    *,
    imports_loop: bool = True,
) -> tuple[Setup, WarmStart | None]:
    """Check the settings of a training run, and import all that it needs.

    Args:
        config: the settings.
        world: the number of ranks.
        resume: where the run goes on from, see `loop.run_training`.
        init_from: the run whose weights it begins with.
        imports_loop: whether training follows; else what takes longest to import is left out.

    Returns:
        What is trained on what; the weights of `init_from`.

    Raises:
        ConfigError: settings that cannot work.
        StoreError: there is no store, or a damaged one.
        ResumeError: `init_from` names no run with weights.
    """
    if init_from is not None and resume not in ("auto", "never"):
        raise ConfigError(
            "a run begins with the weights of a run or goes on from a checkpoint, not both",
            got=f"--init-from {init_from} --resume {resume}",
            fix="leave one of the two out",
        )
    config_file.require_paths(config)

    with postpone_collections():
        from clue_dist.train.initial_weights import follow_head_rank, plan_warm_start
        from clue_dist.train.setup import prepare_setup

    if init_from is not None:
        config = follow_head_rank(config, init_from)
    setup = prepare_setup(config, world)
    warm_start = None if init_from is None else plan_warm_start(init_from, setup)
    if imports_loop:
        # DeepSpeed looks for compilers and GPUs while it is imported: before the ranks join.
        with postpone_collections():
            import clue_dist.train.loop  # noqa: F401
    return setup, warm_start


def print_plan(setup: Setup, arguments: argparse.Namespace, warm_start: WarmStart | None) -> None:
    """Print what will be trained; in a dry run, also where the run stands in its folder.

    Of a run under `--resume auto` the newest checkpoint is not read, which may take minutes.

    Raises:
        ResumeError: in a dry run, training would be refused.
    """
    print(setup.format_summary(), flush=True)
    if not arguments.dry_run:
        return

    from clue_dist.checkpoint.resuming import find_starting_point
    from clue_dist.train.setup import is_run_finished

    start = find_starting_point(
        setup.run_folder,
        setup.config,
        setup.store.fingerprint,
        arguments.resume,
        Ranks(),
        earlier_weights=None if warm_start is None else warm_start.weights,
        reads_all=False,
    )
    step = start.state.step
    if is_run_finished(setup, start.state):
        print(f"  finished at step {step}: nothing is left to train", flush=True)
    elif start.checkpoint is not None:
        condition = ", if that checkpoint is sound" if arguments.resume == "auto" else ""
        print(f"  would go on from step {step}{condition}", flush=True)
    elif warm_start is not None:
        print("\n".join(warm_start.describe_weights()), flush=True)
    inherited = start.describe_inherited(setup.config)
    if inherited is not None:
        print(f"  {inherited}", flush=True)
    if start.changes:
        print(f"  differs from the run: {start.describe_changes()}", flush=True)


def prepare_benchmark(arguments: argparse.Namespace, world: int) -> Setup:
    """Check what is to be measured, as `prepare_training` does; no run folder is needed."""
    # Measuring takes minutes: what cannot be written is said first.
    require_bench_arguments(arguments)
    config = config_file.load_config(arguments.config, arguments.overrides)

    from clue_dist.train.setup import prepare_setup

    return prepare_setup(config, world, writes=False)


def require_bench_arguments(arguments: argparse.Namespace) -> None:
    """Require something for `clue bench` to measure, and a file that its figures can go into.

    Raises:
        ConfigError: there is none.
    """
    require_number("--seconds", arguments.seconds, above=True)
    require_number("--repeats", arguments.repeats, 1, whole=True)
    if arguments.json is None:
        return
    folder = arguments.json.absolute().parent
    if arguments.json.is_dir() or not folder.is_dir():
        raise ConfigError(
            "the figures go into a file of a folder that is there",
            where=f"--json {arguments.json}",
        )
    if not os.access(arguments.json if arguments.json.exists() else folder, os.W_OK):
        raise ConfigError(
            "the figures cannot be written",
            where=f"--json {arguments.json}",
            got="no permission to write, or a disk that is read only",
            fix="choose another file, or leave --json out",
        )
