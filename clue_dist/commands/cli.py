"""The console script `clue`: the commands in groups, each with an example.

Only the module of the command that was typed is imported, and it parses the words that follow. So
`clue --help` answers at once, and `clue train` and `launch/train.py` cannot differ.
"""

from __future__ import annotations

import importlib
import sys
from typing import Annotated

import typer

from clue_dist import __version__
from clue_dist.commands.catalogue import COMMANDS, name_module
from clue_dist.process import run_main

# All words after the name of a command, --help among them, go to the parser of that command.
_PASS_WORDS = {
    "allow_extra_args": True,
    "ignore_unknown_options": True,
    "help_option_names": [],
}

app = typer.Typer(
    name="clue",
    help="Cross-Linked Unified Embedding of single cells: train a model, and ask it. "
    "`clue COMMAND --help` lists what a command takes.",
    no_args_is_help=True,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
)


def main() -> None:
    """Run the command that was typed; its exit code becomes that of the process."""
    app(prog_name="clue")


def _print_version(is_wanted: bool) -> None:
    if is_wanted:
        print(f"clue_dist {__version__}")
        raise typer.Exit


@app.callback()
def _parse_options(
    version: Annotated[
        bool,
        typer.Option(
            "--version", callback=_print_version, is_eager=True, help="Print the version, and exit."
        ),
    ] = False,
) -> None:
    """Options of `clue` itself act while they are parsed."""


def _run_command(context: typer.Context) -> None:
    """Run the module of a command as if its words were all that was typed."""
    name = str(context.info_name)
    sys.argv = [f"clue {name}", *context.args]
    run_main(importlib.import_module(name_module(name)).main)


for _name, _entry in COMMANDS.items():
    app.command(
        _name,
        short_help=_entry.format_help(),
        rich_help_panel=_entry.group,
        context_settings=_PASS_WORDS,
        add_help_option=False,
    )(_run_command)
