"""A search of hyperparameters: what it tries, how it goes on, and its table."""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
import textwrap
from pathlib import Path

import pytest
import yaml

from clue_dist import config_file
from clue_dist.errors import ConfigError
from clue_dist.train.arguments import parse_train_arguments
from clue_dist.train.sweep import run_sweep
from clue_dist.train.sweep_plan import SweepPlan, expand_command, list_trials, read_sweep_plan

ROOT = Path(__file__).parents[2]
RANDOM = {
    "method": "random",
    "run_cap": 5,
    "parameters": {
        "store": {"value": "s.zarr"},
        "train.lr": {"distribution": "log_uniform_values", "min": "1e-4", "max": 1e-2},
        "model.latent": {"values": [16, 32]},
        "data.window_blocks": {"min": 4, "max": 8},
        "model.trunk.dropout": {"distribution": "q_uniform", "min": 0, "max": 0.4, "q": 0.1},
    },
}


def make_plan(**changes: object) -> SweepPlan:
    return SweepPlan.model_validate(RANDOM | changes)


def test_a_grid_tries_every_combination_once() -> None:
    parameters = {
        "store": {"value": "s"},
        "train.lr": {"values": [0.1, 0.2, 0.1]},
        "model.latent": {"min": 3, "max": 5},
    }
    trials = list_trials(make_plan(method="grid", run_cap=None, parameters=parameters))
    choices = [(t.parameters["train.lr"], t.parameters["model.latent"]) for t in trials]
    assert choices == [(0.1, 3), (0.1, 4), (0.1, 5), (0.2, 3), (0.2, 4), (0.2, 5)]
    with pytest.raises(ConfigError, match=r"a grid needs values[\s\S]*train\.lr"):
        list_trials(make_plan(method="grid"))


def test_random_trials_are_the_same_at_every_call_and_more_of_them_change_none() -> None:
    few, many, others = (
        list_trials(make_plan(), *arguments) for arguments in ((None,), (40,), (40, 1))
    )
    assert len(few) == 5
    assert many[:5] == few
    assert not {trial.name for trial in others} & {trial.name for trial in many}
    for trial in many:
        assert trial.parameters["store"] == "s.zarr"
        assert 1e-4 <= trial.parameters["train.lr"] <= 1e-2
        assert trial.parameters["model.latent"] in (16, 32)
        assert trial.parameters["data.window_blocks"] in range(4, 9)
        assert trial.parameters["model.trunk.dropout"] in (0.0, 0.1, 0.2, 0.3, 0.4)
    # A logarithmic distribution has as many trials in each decade.
    assert 8 < sum(trial.parameters["train.lr"] < 1e-3 for trial in many) < 32
    with pytest.raises(ConfigError, match="no end of its own"):
        list_trials(make_plan(run_cap=None))
    for wrong in (0, -1):
        with pytest.raises(ConfigError, match=r"where: --trials\n.*\n.* 1 or more"):
            list_trials(make_plan(), wrong)
    with pytest.raises(ConfigError, match="where: --seed"):
        list_trials(make_plan(), 3, -1)


def test_the_name_of_a_trial_says_what_was_set() -> None:
    parameters = {
        "store": {"value": "data/s.zarr"},  # the same in all trials
        "train.lr": {"values": [0.00123456]},
        "model.trunk.hidden": {"values": [128]},
        "model.decoder.hidden": {"values": [[64, 64]]},
        "objective.alignment": {"values": ["../mse / cosine"]},
    }
    plan = make_plan(method="grid", run_cap=None, parameters=parameters)
    (trial,) = list_trials(plan)
    assert trial.name == (
        "lr=0.00123_model.trunk.hidden=128_model.decoder.hidden=-64-64-_alignment=..-mse-cosine_"
        + trial.run_id
    )
    # The id tells trials apart, also where the name cannot; more values change none.
    other_ids, more_ids = (
        [
            other.run_id
            for other in list_trials(
                make_plan(method="grid", parameters=parameters | {"train.lr": {"values": values}})
            )
        ]
        for values in ([0.001234], [0.00123456, 1])
    )
    assert trial.run_id not in other_ids
    assert trial.run_id in more_ids
    (long,) = list_trials(
        make_plan(method="grid", parameters={"store": {"values": ["a" * 300]}}), 1
    )
    assert len(f"{long.name}.log") < 150
    (alone,) = list_trials(make_plan(method="grid", parameters={"store": {"value": "s"}}))
    assert alone.name == alone.run_id


def test_what_cannot_be_searched_is_said(tmp_path: Path) -> None:
    path = tmp_path / "sweep.yaml"
    wrong = {
        "method: bayes": RANDOM | {"method": "bayes"},
        "min": RANDOM | {"parameters": {"train.lr": {"min": 2, "max": 1}}},
        "beta": RANDOM | {"parameters": {"train.lr": {"distribution": "beta"}}},
        "nothing": RANDOM | {"parameters": {"train.lr": {}}},
    }
    for content in wrong.values():
        path.write_text(yaml.safe_dump(content))
        with pytest.raises(ConfigError, match="the sweep cannot be understood"):
            read_sweep_plan(path)
    path.write_text("{")
    with pytest.raises(ConfigError, match="the sweep cannot be read") as refusal:
        read_sweep_plan(path)
    assert Path(str(refusal.value.fix).removeprefix("see ")).is_file()
    with pytest.raises(ConfigError, match=r"does not exist[\s\S]*or a recipe: sweep"):
        read_sweep_plan(tmp_path / "nowhere.yaml")
    with pytest.raises(ConfigError, match=r"--set wants dotted\.path=value"):
        read_sweep_plan(Path("sweep"), ["store"])
    with pytest.raises(ConfigError, match="unknown macro"):
        expand_command(make_plan(command=["${nothing}"]), {})


@pytest.mark.slow
def test_macros_become_what_the_agent_of_wandb_makes_of_them(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from wandb.sdk.launch.sweeps import utils

    monkeypatch.setenv("CLUE_TEST", "there")
    parameters = {"train.lr": 0.1, "log.tensorboard": False, "model.trunk.shared": True}
    names = ("args", "args_no_hyphens", "args_no_boolean_flags", "args_json")
    filled = utils.create_sweep_command_args(
        {"args": {name: {"value": value} for name, value in parameters.items()}}
    )
    for name in names:
        words = ["x-${envvar:CLUE_TEST}-${envvar:CLUE_ABSENT}", f"${{{name}}}"]
        head = utils.create_sweep_command(list(words))[0]
        plan = make_plan(command=words)
        assert expand_command(plan, parameters) == [head, *filled[name]]


def test_the_sweep_of_the_recipes_sets_what_training_reads(monkeypatch: pytest.MonkeyPatch) -> None:
    plan = read_sweep_plan(ROOT / "configs/sweep.yaml")
    for trial in list_trials(plan, 3):
        # `sh -c` passes on what stands behind the name of the script.
        shell, flag, script, _, *settings = expand_command(plan, trial.parameters)
        assert (shell, flag) == ("sh", "-c")
        # Which is found from any folder, and where there is no checkout.
        assert script.startswith("exec deepspeed -q --module clue_dist.commands.train ")
        assert "--config atlas --set" in script
        words = ["--config", "atlas", "--set", "run=a", *settings, "--set", "run=b"]
        monkeypatch.setattr(sys, "argv", ["launch/train.py", *words])
        found = parse_train_arguments(argparse.ArgumentParser())
        config = config_file.load_config(found.config, found.overrides)
        assert config.run == "b"
        assert config.train.lr == trial.parameters["train.lr"]
        assert config.model.latent == trial.parameters["model.latent"]


def test_a_search_is_found_by_its_name_and_takes_what_its_trials_share() -> None:
    plan = read_sweep_plan(Path("sweep"), ["store=S.zarr", "train.lr=0.01", "train.epochs=3"])
    assert plan.varied == [
        name for name in read_sweep_plan(ROOT / "configs/sweep.yaml").varied if name != "train.lr"
    ]
    for trial in list_trials(plan, 3):
        shared = {name: trial.parameters[name] for name in ("store", "train.lr", "train.epochs")}
        assert shared == {"store": "S.zarr", "train.lr": 0.01, "train.epochs": 3}


@pytest.fixture
def search(tmp_path: Path) -> Path:
    """A search whose program writes the metrics of a run, and does what `mood` says."""
    (tmp_path / "train.py").write_text(
        textwrap.dedent(
            """\
            import json, os, pathlib, sys, time
            settings = dict(word.split("=", 1) for word in sys.argv[1:] if "=" in word)
            mood = pathlib.Path(__file__).with_name("mood").read_text()
            run = pathlib.Path(settings["run"])
            run.mkdir(exist_ok=True)
            (run / "environment").write_text(os.environ["WANDB_RUN_ID"])
            with (run / "metrics.jsonl").open("a") as file:
                score = float(settings["train.lr"]) * 2
                line = {"step": 7, "split": "validation", "best_score": score}
                file.write(json.dumps(line) + "\\n" + json.dumps({"step": 8, "loss": 1}) + "\\n")
            if mood == settings["train.lr"]:
                sys.exit("error: no such thing\\n  where: here\\nthe launcher ends")
            """
        )
    )
    (tmp_path / "mood").write_text("fine")
    plan = {
        "name": "small",
        "method": "grid",
        "parameters": {"train.lr": {"values": [0.3, 0.1, 0.2]}},
        "command": [sys.executable, str(tmp_path / "train.py"), "--set", "${args_no_hyphens}"],
    }
    (tmp_path / "sweep.yaml").write_text(yaml.safe_dump(plan))
    return tmp_path


@pytest.mark.slow
def test_a_search_goes_on_where_it_was_and_ends_with_one_table(search: Path) -> None:
    plan, out = search / "sweep.yaml", search / "runs"
    (search / "mood").write_text("0.1")
    lines: list[str] = []
    results = run_sweep(plan, out, announce=lines.append)
    assert [(r.status, r.metric, r.step) for r in results] == [
        ("exit code 1", 0.2, 7),
        ("finished", 0.4, 7),
        ("finished", 0.6, 7),
    ]
    failed = results[0].name
    place = next(i for i, line in enumerate(lines) if line.startswith("  exit code 1"))
    assert lines[place + 1 : place + 3] == ["  error: no such thing", "    where: here"]
    assert lines[place + 3].startswith("trial 3 of 3")
    assert "the launcher ends" in (out / f"{failed}.log").read_text()
    assert failed == f"lr=0.1_{(out / failed / 'environment').read_text()}"
    (search / "mood").write_text("fine")
    with (out / "trials.jsonl").open("a") as file:
        file.write('{"name": "abc')  # of a search that was killed
    again = run_sweep(plan, out, announce=lines.append)
    assert [r.status for r in again] == ["finished"] * 3
    assert again[1:] == results[1:]  # which did not run again
    assert (out / failed / "metrics.jsonl").read_text().count("best_score") == 2
    assert "2 of 3 trials have finished before" in lines
    head, *rows = (out / "table.tsv").read_text().splitlines()
    assert head == "validation/best_score\tstep\tstatus\ttime\ttrain.lr\ttrial"
    settings = [row.split("\t")[4:] for row in rows]
    assert settings == [[str(r.parameters["train.lr"]), r.name] for r in again]


@pytest.mark.slow
def test_a_search_goes_on_whose_trials_had_other_names(search: Path) -> None:
    """Names were ids alone once, and change with what is varied; the id stays."""
    plan, out = search / "sweep.yaml", search / "runs"
    lines: list[str] = []
    (search / "mood").write_text("0.1")
    failed, *finished = (result.name for result in run_sweep(plan, out, announce=lines.append))
    results = (out / "trials.jsonl").read_text()
    for name in (failed, *finished):
        run_id = name.rpartition("_")[2]
        (out / name).rename(out / run_id)
        results = results.replace(name, run_id)
    (out / "trials.jsonl").write_text(results)
    (search / "mood").write_text("fine")
    again = run_sweep(plan, out, announce=lines.append)
    assert [r.status for r in again] == ["finished"] * 3
    assert {r.name for r in again} == {name.rpartition("_")[2] for name in (failed, *finished)}
    counts = [(out / r.name / "metrics.jsonl").read_text().count("best_score") for r in again]
    assert counts == [2, 1, 1]  # the one that failed went on in its folder


@pytest.mark.slow
def test_a_signal_reaches_the_run_and_ends_the_search(search: Path) -> None:
    (search / "train.py").write_text(
        textwrap.dedent(
            f"""\
            import os, signal, sys, time
            signal.signal(signal.SIGTERM, lambda *_: sys.exit(75))
            os.kill({os.getpid()}, signal.SIGTERM)
            time.sleep(30)
            """
        )
    )
    lines: list[str] = []
    before = signal.getsignal(signal.SIGTERM)
    (result,) = run_sweep(search / "sweep.yaml", search / "runs", announce=lines.append)
    assert result.status == "stopped"
    assert "stopped: the same command goes on from here" in lines
    assert signal.getsignal(signal.SIGTERM) == before
    (line,) = (search / "runs" / "trials.jsonl").read_text().splitlines()
    assert json.loads(line)["status"] == "stopped"
