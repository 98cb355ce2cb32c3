"""What a rank reads from the environment of its launcher, and what the ranks do together."""

from __future__ import annotations

import itertools
import socket
from typing import Any

import pytest
import torch
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st

from clue_dist.errors import LOST, ConfigError
from clue_dist.ranks import Ranks
from clue_dist.ranks.job import choose_port
from clue_dist.train import engine as engines
from tests.processes import run_ranks

SLURM = {"SLURM_PROCID": "5", "SLURM_LOCALID": "1", "SLURM_NTASKS": "8"}


@pytest.mark.parametrize(
    ("env", "expected"),
    [
        ({}, Ranks(0, 1, 0)),
        ({"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1"}, Ranks(3, 4, 1)),
        ({**SLURM, "SLURM_STEP_NUM_TASKS": "8"}, Ranks(5, 8, 1)),
        ({**SLURM, "SLURM_PROCID": "0"}, Ranks(0, 1, 0)),  # a batch script without srun
        # A launcher runs in a step of srun.
        ({**SLURM, "SLURM_STEP_NUM_TASKS": "8", "RANK": "0", "WORLD_SIZE": "2"}, Ranks(0, 2, 0)),
    ],
)
def test_environment(env, expected):
    assert Ranks.from_environment(env) == expected


@pytest.mark.parametrize("env", [{"RANK": "2", "WORLD_SIZE": "2"}, {"RANK": "one"}, {"RANK": "-1"}])
def test_an_environment_that_makes_no_sense_is_an_error(env):
    with pytest.raises(ConfigError, match=f"RANK={env['RANK']}"):
        Ranks.from_environment(env)


@given(count=st.integers(0, 1000), world=st.integers(1, 20))
def test_slices_cover_everything_once_and_evenly(count, world):
    whole = list(range(count))
    parts = [whole[Ranks(rank, world).slice_for_rank(count)] for rank in range(world)]
    assert list(itertools.chain(*parts)) == whole
    assert max(map(len, parts)) - min(map(len, parts)) <= 1


@pytest.mark.parametrize(
    ("local_rank", "gpus", "expected"),
    # Local rank 3 sees 1 GPU under srun --gpus-per-task=1.
    [(0, 0, "cpu"), (3, 0, "cpu"), (3, 1, "cuda:0"), (1, 2, "cuda:1")],
)
def test_every_rank_takes_its_own_gpu(local_rank, gpus, expected, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpus > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    assert Ranks(local_rank, 4, local_rank).choose_device() == torch.device(expected)


def test_more_ranks_than_gpus_is_an_error(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(ConfigError, match=r"more ranks[\s\S]*2 visible GPUs"):
        Ranks(6, 8, 2).choose_device()


def test_one_process_needs_no_set_up():
    ranks = Ranks().join_group()
    ranks.barrier()
    assert ranks.gather_values("x") == ["x"]
    ranks.leave_group()


def test_several_machines_need_an_address(monkeypatch):
    monkeypatch.delenv("MASTER_ADDR", raising=False)
    monkeypatch.setenv("SLURM_STEP_NUM_NODES", "2")
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.setenv(name, "0")  # join_group sets them; undone at the end
    with pytest.raises(ConfigError, match="MASTER_ADDR"):
        Ranks(1, 2, 0).join_group()


def test_jobs_their_attempts_and_their_steps_have_ports_of_their_own():
    ports = {
        choose_port({"SLURM_JOB_ID": str(1000 + 97 * job), "SLURM_RESTART_COUNT": str(restart)})
        for job in range(5)
        for restart in range(5)
    }
    steps = {choose_port({"SLURM_JOB_ID": "7", "SLURM_STEP_ID": str(step)}) for step in range(5)}
    assert len(ports) == 25
    assert len(steps) == 5
    assert all(20000 <= port < 30000 for port in ports)


RUN_CHECK = """
    from clue_dist.process import run_main
    from clue_dist.ranks import Ranks

    def main():
        ranks = Ranks.from_environment()
        ranks.run_before_joining(lambda: check(ranks.rank))
        raise SystemExit(99)  # no rank may get here

    run_main(main)
"""


def test_where_one_machine_cannot_begin_none_does():
    check = """
        from clue_dist.errors import ConfigError

        def check(rank):
            if rank == 1:
                raise ConfigError("the config file does not exist", where="here.json")
    """
    outputs = run_ranks(3, check, RUN_CHECK, expect=2)
    error = "the config file does not exist\n  where: here.json"
    assert f"error: rank 1 on {socket.gethostname()}: {error}" in outputs[0]
    assert outputs[1:] == ["", ""]


def test_an_error_that_all_ranks_raise_is_printed_once():
    check = """
        from clue_dist.errors import StoreError

        def check(rank):
            raise StoreError(f"damaged, says rank {rank}")
    """
    outputs = run_ranks(3, check, RUN_CHECK, expect=2)
    assert outputs == ["error: damaged, says rank 0\n", "", ""]


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 1])
def test_a_rank_that_never_comes_is_not_waited_for_long(rank):
    """The other rank of the two is not even started, as in a shell that srun gave two tasks."""
    check = f"""
        import os
        from clue_dist.ranks import job, rendezvous
        job.JOIN_LIMIT, rendezvous.NOTICE_AFTER = 3.0, 0.5
        os.environ.update(RANK="{rank}", WORLD_SIZE="2")

        def check(rank):
            pass
    """
    (output,) = run_ranks(1, check, RUN_CHECK, expect=LOST)
    assert "the ranks did not find each other" in output
    assert f"no word from rank {1 - rank}" in output
    assert "within 3 s" in output
    # Long before the end the rank says for whom it waits, and what to do without the others.
    assert output.startswith(f"rank {rank} of 2 waits for rank {1 - rank} at 127.0.0.1:")
    assert "to run alone, type RANK=0 WORLD_SIZE=1 before the command" in output
    assert "Traceback" not in output


def test_ranks_meet(tmp_path):
    code = """
        from pathlib import Path
        from clue_dist.ranks import Ranks
        ranks = Ranks.from_environment()
        assert ranks.gather_values(f"apart {ranks.rank}") == ["apart 0", "apart 1"]
        ranks.join_group()
        (Path(folder) / str(ranks.rank)).touch()
        ranks.barrier()
        assert (Path(folder) / str(1 - ranks.rank)).exists()
        assert ranks.gather_values(f"rank {ranks.rank}") == ["rank 0", "rank 1"]
        assert ranks.run_on_all(lambda: ranks.rank + 1) == [1, 2]
        assert ranks.run_on_first(lambda: f"rank {ranks.rank}") == "rank 0"
        ranks.leave_group()
    """
    run_ranks(2, f"folder = {str(tmp_path)!r}", code)


@pytest.mark.parametrize("world", [1, 2])
def test_the_process_group_is_told_its_gpu(monkeypatch: pytest.MonkeyPatch, world: int) -> None:
    joined: list[dict[str, Any]] = []
    gpu, ranks = torch.device("cuda", 1), Ranks(rank=0, world=world)
    monkeypatch.setattr(Ranks, "choose_device", lambda _: gpu)
    monkeypatch.setattr(Ranks, "open_rendezvous", lambda _: None)
    monkeypatch.setattr(torch.cuda, "set_device", lambda _: None)
    monkeypatch.setattr(dist, "is_initialized", lambda: bool(joined))
    monkeypatch.setattr(dist, "init_process_group", lambda *_, **options: joined.append(options))
    monkeypatch.setattr(engines.deepspeed, "init_distributed", lambda **_: None)
    monkeypatch.setenv("LOCAL_RANK", "0")
    assert engines.join_process_group(ranks) == gpu
    assert [options["device_id"] for options in joined] == [gpu]
