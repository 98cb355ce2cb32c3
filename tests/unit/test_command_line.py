"""The console script `clue`: help, names of recipes, ranks, and what the wheel holds of it."""

from __future__ import annotations

import argparse
import importlib
import shlex
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from clue_dist import __version__, config_file
from clue_dist.commands import catalogue
from clue_dist.commands.catalogue import COMMANDS, build_command_parser, build_launch, name_module
from clue_dist.commands.cli import app
from clue_dist.commands.model_arguments import parse_batch_choice
from clue_dist.errors import ConfigError
from clue_dist.ranks import Ranks

ROOT = Path(__file__).parents[2]


class Parsed(Exception):
    """Raised in the place of all that follows the parsing of a command line."""


@pytest.fixture
def _stops_after_parsing(monkeypatch: pytest.MonkeyPatch) -> None:
    parse = argparse.ArgumentParser.parse_args

    def parse_and_stop(parser: argparse.ArgumentParser, *args: Any) -> None:
        raise Parsed(parse(parser, *args))

    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", parse_and_stop)


def test_help_lists_each_command_with_its_example_under_its_group() -> None:
    shown = CliRunner().invoke(app, ["--help"], env={"COLUMNS": "200", "TERM": "dumb"}).output
    for name, entry in COMMANDS.items():
        assert f" {name} " in shown
        assert entry.example in shown
        assert entry.group in shown


def test_the_version_is_printed() -> None:
    assert CliRunner().invoke(app, ["--version"]).output == f"clue_dist {__version__}\n"


@pytest.mark.usefixtures("_stops_after_parsing")
@pytest.mark.parametrize("name", COMMANDS)
def test_each_example_is_a_command_line_that_parses(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    program, command, *words = shlex.split(COMMANDS[name].example)
    assert (program, command) == ("clue", name)
    monkeypatch.setattr(sys, "argv", [f"clue {name}", *words])
    with pytest.raises(Parsed):
        importlib.import_module(name_module(name)).main()


@pytest.mark.usefixtures("_stops_after_parsing")
@pytest.mark.parametrize(("name", "batch"), [("impute", "own"), ("differential", "average")])
def test_commands_that_ask_for_values_take_the_same_words(
    name: str, batch: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def parse(*words: str) -> argparse.Namespace:
        monkeypatch.setattr(sys, "argv", [*shlex.split(COMMANDS[name].example)[1:], *words])
        with pytest.raises(Parsed) as parsed:
            importlib.import_module(name_module(name)).main()
        found: argparse.Namespace = parsed.value.args[0]
        return found

    assert parse_batch_choice(parse()) == batch
    assert parse_batch_choice(parse("--batch", "d1")) == "d1"
    words = ("--from", "rna", "adt", "--batch", "donor=d1", "kit=v2", "--features", "a", "b")
    found = parse(*words, "--seed", "3")
    assert (found.from_, found.features, found.seed) == (["rna", "adt"], ["a", "b"], 3)
    assert parse_batch_choice(found) == ["donor=d1", "kit=v2"]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run in a folder of its own, beside the store that it is of."""
    from tests.stores import make_store  # their imports are slow, and few tests use them
    from tests.unit.run_helpers import make_run

    folder = tmp_path_factory.mktemp("run")
    make_store(folder / "s.zarr")
    return make_run(folder / "run", folder / "s.zarr")


@pytest.mark.parametrize(
    ("command", "option", "value"),
    [
        ("evaluate --out o.json", "--max-cells", "1"),
        ("impute --out o.h5ad --modality adt", "--samples", "-1"),
        ("impute --out o.h5ad --modality adt", "--interval", "2"),
        ("impute --out o.h5ad --modality adt", "--threshold", "nan"),
        ("impute --out o.h5ad --modality adt", "--library-size", "0"),
        ("impute --out o.h5ad --modality adt", "--seed", "-1"),
        ("differential --out o.csv --modality adt", "--pairs", "0"),
        ("differential --out o.csv --modality adt", "--least-change", "-1"),
        ("differential --out o.csv --modality adt", "--groupby", "donor"),
        ("differential --out o.csv --modality adt", "--seed", "-1"),
        ("match --out o.csv --first rna --second adt", "--partners", "0"),
        ("transfer --out o.csv", "--kept", "2"),
        ("transfer --out o.csv", "--least-confidence", "2"),
        ("transfer --out o.csv", "--label-key", "donor"),
        ("embed --out o.h5ad", "--batch-size", "0"),
        ("embed --out o.h5ad", "--min-known", "2"),
        ("embed --out o.h5ad", "--modalities", "atac"),
    ],
)
def test_an_error_names_the_option_that_was_typed(
    command: str, option: str, value: str, run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    name, *words = command.split()
    typed = [*words, "--run", "run", "--store", "s.zarr", option, value]
    monkeypatch.chdir(run.parent)
    monkeypatch.setattr(sys, "argv", [f"clue {name}", *typed])
    with pytest.raises(ConfigError, match=rf"{option}\b"):
        importlib.import_module(name_module(name)).main()


def test_a_command_gets_its_words_as_they_were_typed(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    monkeypatch.setattr("clue_dist.commands.cli.run_main", lambda main: seen.append(sys.argv))
    words = ["train", "--set", "a=1", "b=-2", "--help", "-x", "c"]
    CliRunner().invoke(app, words)
    assert seen == [["clue train", *words[1:]]]


def test_the_shell_completes_commands_and_their_options(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["clue"])

    def complete(line: str) -> str:
        last = str(len(line.split()) - 1)
        env = {"_CLUE_COMPLETE": "complete_bash", "COMP_WORDS": line, "COMP_CWORD": last}
        return CliRunner().invoke(app, [], prog_name="clue", env=env).output

    assert complete("clue ev").split() == ["evaluate"]
    assert complete("clue train --re").split() == ["--resume"]
    assert complete("clue train --config atlas --s").split() == ["--set"]
    assert "--keep-obs" in complete("clue prep convert --k").split()


def test_help_and_parsing_import_nothing_heavy() -> None:
    modules = ["clue_dist.commands.cli", *(name_module(name) for name in COMMANDS)]
    heavy = "{'torch', 'numpy', 'pandas', 'numba', 'zarr', 'deepspeed', 'anndata'}"
    program = f"import sys, {', '.join(modules)}; print(sorted({heavy} & sys.modules.keys()))"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.stdout == "[]\n", done.stderr


def test_each_command_but_prep_has_a_script_that_runs_it() -> None:
    """`python -m data_prep` is the script of prep."""
    scripts = {path.stem.replace("_", "-"): path.read_text() for path in ROOT.glob("launch/*.py")}
    assert scripts.keys() == COMMANDS.keys() - {"prep"}
    for name, text in scripts.items():
        assert f"from {name_module(name)} import main\n" in text


def test_ranks_are_started_by_the_launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[list[str]] = []
    monkeypatch.setattr(catalogue.os, "execv", lambda program, words: started.append(words))
    monkeypatch.delenv("RANK", raising=False)
    monkeypatch.setattr(sys, "argv", ["clue train", "--ranks=2", "a", "--rank", "3", "b"])
    build_command_parser("train").parse_args(["--ranks", "2"])
    (words,) = started
    assert words[: words.index("--num_accelerators") + 2][-1] == "2"
    assert words[words.index("--module") :] == ["--module", "clue_dist.commands.train", "a", "b"]
    build_command_parser("train").parse_args(["--ranks", "1"])
    assert len(started) == 1


@pytest.mark.parametrize(("number", "rank"), [("0", None), ("2", "0")])
def test_ranks_that_cannot_be_started_are_refused(
    number: str, rank: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("RANK", raising=False)
    if rank is not None:
        monkeypatch.setenv("RANK", rank)
    with pytest.raises(ConfigError, match="ranks cannot be started"):
        build_command_parser("train").parse_args(["--ranks", number])


@pytest.mark.slow
def test_the_launcher_understands_what_starts_the_ranks() -> None:
    launcher = pytest.importorskip("deepspeed.launcher.runner")
    words = build_launch("some.module", 3, ["--set", "a=1"])
    assert words[:3] == [sys.executable, "-m", "deepspeed.launcher.runner"]
    parsed = launcher.parse_args(words[3:])
    assert (parsed.num_gpus, parsed.module, parsed.user_script) == (3, True, "some.module")
    assert parsed.user_args == ["--set", "a=1"]


@pytest.mark.parametrize("name", ["atlas", "atlas.json"])
def test_a_recipe_is_found_by_its_name_in_any_folder(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert config_file.load_config(name) == config_file.load_config(ROOT / "configs" / "atlas.json")
    Path(name).write_text('{"seed": 3}')  # a file goes before a recipe
    assert config_file.load_config(name).seed == 3


@pytest.mark.parametrize("name", ["atlsa", "nowhere/atlas.json", "atlas.yaml"])
def test_a_recipe_that_is_missing_is_answered_with_the_names(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match="does not exist") as caught:
        config_file.load_config(name)
    assert "a recipe: atlas, demo" in str(caught.value.expected)


@pytest.mark.slow
def test_the_wheel_holds_all_modules_the_recipes_and_the_console_script(tmp_path: Path) -> None:
    source = tmp_path / "source"
    for name in ("clue_dist", "data_prep", "configs"):  # a copy follows the link to configs/
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    program = "from setuptools import build_meta; print(build_meta.build_wheel('out'))"
    (source / "out").mkdir()
    command = [sys.executable, "-c", program]
    subprocess.run(command, cwd=source, check=True, capture_output=True)
    (path,) = (source / "out").glob("*.whl")
    with zipfile.ZipFile(path) as wheel:
        names = set(wheel.namelist())
        (scripts,) = (name for name in names if name.endswith("entry_points.txt"))
        assert "clue = clue_dist.commands.cli:main" in wheel.read(scripts).decode()
    packages = ("clue_dist", "data_prep")
    modules = {
        path.relative_to(ROOT).as_posix() for p in packages for path in (ROOT / p).rglob("*.py")
    }
    recipes = {f"clue_dist/recipes/{path.name}" for path in ROOT.glob("configs/*.json")}
    assert modules | recipes <= names
    assert all(name.startswith((*packages, "clue_dist-")) for name in names)


@pytest.mark.parametrize("name", [name for name in COMMANDS if name != "prep"])
def test_every_command_takes_what_the_launcher_adds(name: str) -> None:
    assert build_command_parser(name).parse_args(["--local_rank=1"]).local_rank == "1"


@pytest.mark.parametrize(("rank", "n_written"), [("0", 1), ("1", 0)])
@pytest.mark.parametrize(
    ("words", "writer"),
    [
        (["export", "--run", "r", "--out", "o"], "clue_dist.inference.export.export_run"),
        (["export", "r", "--out", "o"], "clue_dist.inference.export.export_run"),
        (["report", "--run", "r"], "clue_dist.inference.report.write_report"),
    ],
)
def test_of_several_ranks_the_first_alone_writes(
    words: list[str], writer: str, rank: str, n_written: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    written: list[object] = []
    monkeypatch.setattr(writer, lambda run, *args, **choices: written.append(run))
    monkeypatch.setattr(sys, "argv", words)
    for name, value in (("RANK", rank), ("WORLD_SIZE", "2"), ("LOCAL_RANK", rank)):
        monkeypatch.setenv(name, value)
    # The other rank says nothing that matters here.
    monkeypatch.setattr(Ranks, "have_joined", lambda ranks: True)
    monkeypatch.setattr(Ranks, "join_group", lambda ranks: ranks)
    monkeypatch.setattr(Ranks, "gather_values", lambda ranks, value: [[*value], [None, None]])
    importlib.import_module(name_module(words[0])).main()
    assert written == [Path("r")] * n_written


def test_a_search_is_refused_to_several_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["sweep", "plan.yaml", "--out", "o"])
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ConfigError, match=r"(?s)starts the ranks of its runs.*2 processes"):
        importlib.import_module(name_module("sweep")).main()
