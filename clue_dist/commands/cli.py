"""The console script `clue`: the commands in groups, each with an example.

Only the module of the command that was typed is imported, and it parses the words that follow. So
`clue --help` answers at once, and `clue train` and `launch/train.py` cannot differ.
"""

from __future__ import annotations

import importlib
import io
import re
import sys
from collections.abc import Sequence
from contextlib import redirect_stderr, redirect_stdout, suppress
from typing import Annotated, Any

import typer
from typer.core import CompletionItem, TyperCommand  # type: ignore[attr-defined]

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


class _PassingCommand(TyperCommand):
    """A command that another parser parses, whose options the shell completes all the same."""

    def shell_complete(self, ctx: Any, incomplete: str) -> list[Any]:
        """List the options of the command that begin like the word before the cursor."""
        options = list_options(str(ctx.info_name), ctx.args)
        return [CompletionItem(option) for option in options if option.startswith(incomplete)]


def list_options(command: str, words: Sequence[str]) -> list[str]:
    """List the options of a command, as its help names them.

    Args:
        command: its name.
        words: what was typed after it; of `prep`, the first one names a command of its own.
    """
    names = [word for word in words if not word.startswith("-")][: command == "prep"]
    sys.argv = [f"clue {command}", *names, "--help"]
    module = importlib.import_module(name_module(command))
    with redirect_stdout(io.StringIO()) as shown, redirect_stderr(shown), suppress(SystemExit):
        module.main()
    return sorted(set(re.findall(r"(?<![\w-])--[a-z][a-z-]*", shown.getvalue())))


def _run_command(context: typer.Context) -> None:
    """Run the module of a command as if its words were all that was typed."""
    name = str(context.info_name)
    sys.argv = [f"clue {name}", *context.args]
    run_main(importlib.import_module(name_module(name)).main)


for _name, _entry in COMMANDS.items():
    app.command(
        _name,
        cls=_PassingCommand,
        short_help=_entry.format_help(),
        rich_help_panel=_entry.group,
        context_settings=_PASS_WORDS,
        add_help_option=False,
    )(_run_command)
