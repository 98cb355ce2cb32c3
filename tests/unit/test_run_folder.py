"""Whatever somebody left in a run folder, a run goes on or says what to do."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from clue_dist.config import Config, LogConfig
from clue_dist.errors import SavingError
from clue_dist.files import translate_write_errors
from clue_dist.inference.profiles import read_metrics
from clue_dist.ranks import Ranks
from clue_dist.train.sinks import Sinks

QUIET = Config(log=LogConfig(wandb="disabled", tensorboard=False))
LINES = [json.dumps({"step": step, "split": "train", "loss": 1.0}).encode() for step in (1, 2, 3)]
UNREADABLE = [
    b"12",
    b'"\xff"',
    b"\xff\xfe",
    b"null",
    b"[" * 10**5,
    b'{"step": "2"}',
    b'{"loss": 1}',
]


@pytest.mark.parametrize("line", UNREADABLE)
def test_a_line_of_metrics_that_cannot_be_read_costs_that_line_alone(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], line: bytes
) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b"\n".join([LINES[0], line, *LINES[1:], line]))
    assert read_metrics(path)[0]["step"].tolist() == [1, 2, 3]
    assert read_metrics(path)[1] == 2
    with Sinks(tmp_path, QUIET, 10, 2, Ranks()):
        assert "lines that cannot be read are left out: 1" in capsys.readouterr().out
    assert path.read_bytes() == b"".join(kept + b"\n" for kept in LINES[:2])
    with Sinks(tmp_path, QUIET, 10, 2, Ranks()):
        assert not capsys.readouterr().out


def test_an_error_of_saving_does_not_show_a_whole_file(tmp_path: Path) -> None:
    with pytest.raises(SavingError) as raised, translate_write_errors("a file", tmp_path):
        (b"text" * 10_000 + b"\xff").decode()
    assert "UnicodeDecodeError: 'utf-8' codec can't decode byte 0xff" in str(raised.value)
    assert len(str(raised.value)) < 1000
