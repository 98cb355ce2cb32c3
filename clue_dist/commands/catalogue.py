"""The commands of `clue`: what each does, an example, and the group that it is listed in.

A command is a row of COMMANDS and a module of its name beside this one, whose `main` parses the
words and does the work. That module imports what is heavy in `main`, so that help is quick.
"""

from __future__ import annotations

import argparse
import os
import socket
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from clue_dist.errors import ConfigError
from clue_dist.process import CommandParser

TRAINING = "From counts to a model"
ANSWERS = "Ask a model"
QUALITY = "How good it is, and how fast"
SHARING = "Pass a model on"


@dataclass(frozen=True)
class CommandEntry:
    """How help presents a command."""

    group: str  # heading in the list of commands
    summary: str  # one line
    example: str  # a command line to copy
    takes_ranks: bool = True  # whether several processes can share the work

    def format_help(self) -> str:
        """Write the summary and the example, a line each."""
        return f"{self.summary}\n{self.example}"


COMMANDS = {
    "prep": CommandEntry(
        TRAINING,
        "Convert raw counts into a store, append to it, check, inspect or split it.",
        "clue prep convert counts.h5mu --out S.zarr",
        takes_ranks=False,
    ),
    "train": CommandEntry(
        TRAINING,
        "Train a model on a store.",
        "clue train --config atlas --set store=S.zarr run=runs/atlas",
    ),
    "sweep": CommandEntry(
        TRAINING,
        "Search hyperparameters, without a server.",
        "clue sweep sweep --set store=S.zarr --out runs/sweep",
        takes_ranks=False,
    ),
    "fine-tune": CommandEntry(
        TRAINING,
        "Teach a trained model new batches, or train it on with new cells or modalities.",
        "clue fine-tune --run runs/atlas --store new.zarr --out runs/atlas-new",
    ),
    "embed": CommandEntry(
        ANSWERS,
        "Embed the cells of a store.",
        "clue embed --run runs/atlas --store S.zarr --out z.h5mu",
    ),
    "impute": CommandEntry(
        ANSWERS,
        "Impute a modality of the cells of a store, or denoise one.",
        "clue impute --run runs/atlas --store S.zarr --modality adt --from rna --out adt.h5ad",
    ),
    "differential": CommandEntry(
        ANSWERS,
        "Find the features that mark groups of cells.",
        "clue differential --run runs/atlas --store S.zarr --modality rna --out markers.csv",
        takes_ranks=False,
    ),
    "match": CommandEntry(
        ANSWERS,
        "Find partners of cells across two modalities.",
        "clue match --run runs/atlas --store S.zarr --first rna --second atac --out pairs.csv",
        takes_ranks=False,
    ),
    "transfer": CommandEntry(
        ANSWERS,
        "Carry labels from the labelled cells of one store to the cells of another.",
        "clue transfer --run runs/atlas --store new.zarr --reference S.zarr --out labels.csv",
        takes_ranks=False,
    ),
    "evaluate": CommandEntry(
        QUALITY,
        "Score how well modalities match, and whether z is one space.",
        "clue evaluate --run runs/atlas --store test.zarr --out scores.json",
    ),
    "report": CommandEntry(
        QUALITY,
        "Write one page about a run.",
        "clue report --run runs/atlas --embedding z.h5mu --scores scores.json",
        takes_ranks=False,
    ),
    "bench": CommandEntry(
        QUALITY,
        "Measure where the time goes on this machine.",
        "clue bench --config atlas --set store=S.zarr",
    ),
    "export": CommandEntry(
        SHARING,
        "Write the weights of a run, and a card that explains them, into a folder to be shared.",
        "clue export --run runs/atlas --out atlas-model --licence CC-BY-4.0",
        takes_ranks=False,
    ),
}


def name_module(command: str) -> str:
    """Name the module of a command."""
    return f"clue_dist.commands.{command.replace('-', '_')}"


def build_command_parser(command: str, details: str = "") -> argparse.ArgumentParser:
    """Make the parser of a command, which has no arguments yet but those of ranks.

    Args:
        command: its name in COMMANDS.
        details: what help says beyond the summary.
    """
    entry = COMMANDS[command]
    parser = CommandParser(
        prog=f"clue {command}",
        description="\n\n".join(filter(None, [entry.summary, details])),
        epilog=f"example:\n  {entry.example}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    if entry.takes_ranks:
        parser.add_argument(
            "--ranks",
            type=int,
            action=_StartRanks,
            metavar="NUMBER",
            help="share the work among so many processes on this machine, one for each GPU; for "
            "several machines use deepspeed, torchrun or srun",
        )
    # The launcher adds this argument; the variable LOCAL_RANK says the same.
    parser.add_argument("--local_rank", "--local-rank", help=argparse.SUPPRESS)
    return parser


class _StartRanks(argparse.Action):
    """Replaces this process by the deepspeed launcher, which starts the command on every rank."""

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: Any,
        option_string: str | None = None,
    ) -> None:
        if "RANK" in os.environ or values < 1:
            raise ConfigError(
                "ranks cannot be started",
                where=f"--ranks {values}",
                got="a process that a launcher started" if "RANK" in os.environ else None,
                expected="a number from 1 on, where no launcher is at work",
                fix="leave --ranks out",
            )
        if values > 1:
            command = parser.prog.removeprefix("clue ")
            words = _remove_option(sys.argv[1:], str(option_string))
            os.execv(sys.executable, build_launch(name_module(command), values, words))


def _remove_option(words: Sequence[str], option: str) -> list[str]:
    """Leave out an option that takes one value, also where it was cut short or has a `=`."""
    kept, skips = [], False
    for word in words:
        name, equals, _ = word.partition("=")
        if skips:
            skips = False
        elif len(name) > 2 and option.startswith(name):
            skips = not equals
        else:
            kept.append(word)
    return kept


def build_launch(module: str, n_ranks: int, words: Sequence[str]) -> list[str]:
    """Build the command line that starts a module on several ranks of this machine."""
    with socket.socket() as probe:  # two jobs on a machine must not meet at the same port
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    launcher = [sys.executable, "-m", "deepspeed.launcher.runner", "--quiet"]
    ranks = ["--num_accelerators", str(n_ranks), "--master_port", str(port)]
    return [*launcher, *ranks, "--module", module, *words]
