"""The command line of data_prep: a mistake ends in a message and exit code 2, with no files."""

from __future__ import annotations

import re
import shlex
import sys
from pathlib import Path

import pytest

from clue_dist.process import run_main
from data_prep.cli.commands import build_preparation_parser, main
from tests.unit.prep_helpers import make_counts, write_h5ad


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder: good.h5ad and a file that is no folder."""
    write_h5ad(tmp_path / "good.h5ad", make_counts(20, 8))
    (tmp_path / "file").write_text("")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize(
    ("command", "message"),
    [
        (["convert", "rna=good.h5ad", "--out", "file/x.zarr"], "the folder cannot be made"),
        (
            ["convert", "rna=good.h5ad", "--out", "s3://bucket/x.zarr"],
            "got: s3://bucket/x.zarr\n  fix: write it to a",
        ),
        (["convert", "rna=good.h5ad", "--out", ""], "the output needs a name"),
        (["convert", "rna=good.h5ad", "--out", "x" * 300], "a path that cannot be used"),
        # The name is too long with .partial behind it.
        (["convert", "rna=good.h5ad", "--out", "x" * 250], "the folder cannot be made"),
        (["convert", f"rna={'x' * 300}", "--out", "x.zarr"], "a path that cannot be used"),
        (
            ["convert", "rna=good.h5ad", "--out", "x.zarr", "--features", "x" * 300],
            "a path that cannot be used",
        ),
        (["convert", "rna=good.h5ad", "--out", "/proc/x.zarr"], "the folder cannot be made"),
        (["convert", "rna=good.h5ad", "--out", "."], "the output needs a name"),
        (["convert", "rna=good.h5ad", "--out", "new/.."], "the output needs a name"),
        (
            ["convert", "rna=good.h5ad", "--out", "x.zarr", "--scheduler", "foo"],
            "expected: tcp://HOST:PORT",
        ),
        (
            ["convert", "rna=good.h5ad", "--out", "x.zarr", "--layer", "rnaa=counts"],
            "no such modality",
        ),
        (["convert", "rna=good.h5ad", "--out", "x.zarr", "--kind", "foo=rna"], "no such modality"),
        (["convert", "", "--out", "x.zarr"], "not an input"),
        (
            ["convert", "rna=good.h5ad", "--out", "x.zarr", "--features", "genes.txt"],
            "no such choice of features",
        ),
        (
            ["convert", "rna=good.h5ad", "--out", "x.zarr", "--top", "rna=5", "atac=5"],
            "no such modality",
        ),
        (
            ["convert", "rna=good.h5ad", "--out", "x.zarr", "--feature-ids", "symbol"],
            "no file has the column of var",
        ),
        (
            ["convert", "rna=good.h5ad", "--out", "x.zarr", "--barcodes", "rna"],
            "neither a list of barcodes nor another modality",
        ),
        (
            ["convert", "atac=good.h5ad", "--out", "x.zarr", "--bins", "atac=5000"],
            "are named as regions",
        ),
        (["simulate", "--out", "x.h5ad"], ".h5mu or .zarr"),
        (["simulate", "--out", "x"], ".h5mu or .zarr"),
        (
            ["simulate", "--out", "s3://bucket/x.zarr", "--cells", "20"],
            "only a folder can be written to",
        ),
        (["simulate", "--out", "file/x.h5mu", "--cells", "20"], "the folder cannot be made"),
        (["simulate", "--out", "file/x.zarr", "--cells", "20"], "the folder cannot be made"),
        (["simulate", "--out", "x.zarr", "--seed", "-1"], "where: --seed"),
        (["simulate", "--out", "x.h5mu", "--seed", "-1"], "where: --seed"),
        (["svd", "x.zarr"], "no store here"),
        (["convert", "rna=good.h5ad"], "error: the following arguments are required: --out"),
        (["convert", "--workers", "0"], "`python -m data_prep convert --help` lists"),
        (["fetch", "--out", "file", "--simulate"], "the folder cannot be made"),
    ],
)
def test_mistakes(
    here: Path,
    command: list[str],
    message: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(sys, "argv", ["data_prep", *command])
    with pytest.raises(SystemExit) as ended:
        run_main(main)
    assert ended.value.code == 2
    assert message in capsys.readouterr().err
    assert sorted(p.name for p in here.iterdir()) == ["file", "good.h5ad"]


def test_the_way_it_should_go(
    here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for command in (
        ["convert", "rna=good.h5ad"],
        ["simulate", "--cells", "20", "--modality", "rna:9", "adt:3"],
    ):
        monkeypatch.setattr(
            sys, "argv", ["data_prep", *command, "--out", f"new/{command[0]}.zarr", "--seed", "7"]
        )
        with pytest.raises(SystemExit) as ended:
            run_main(main)
        assert ended.value.code == 0
    assert "20 simulated cells" in capsys.readouterr().out
    assert sorted(p.name for p in (here / "new").iterdir()) == ["convert.zarr", "simulate.zarr"]


def test_help_shows_an_example_of_each_command_that_parses(
    capsys: pytest.CaptureFixture[str],
) -> None:
    parser = build_preparation_parser("clue prep")

    def read_example(*command: str) -> list[str]:
        with pytest.raises(SystemExit):
            parser.parse_args([*command, "--help"])
        shown = capsys.readouterr().out
        (example,) = re.findall(r"example:\n  clue prep (.*)\n", shown)
        return shlex.split(example)

    with pytest.raises(SystemExit):
        parser.parse_args(["--help"])
    commands = re.findall(r"^    (\w+) +\S", capsys.readouterr().out, re.MULTILINE)
    assert {"convert", "doctor", "fetch"} <= {*commands}
    assert parser.parse_args(read_example()).inputs
    for command in commands:
        words = read_example(command)
        assert words[0] == command
        parser.parse_args(words)
