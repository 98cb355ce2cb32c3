"""What some ranks saved, any other number of ranks takes up: weights, optimizer and counts."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from clue_dist.checkpoint import engine_state
from clue_dist.checkpoint.engine_state import (
    UPDATES,
    collect_shapes,
    collect_tensors,
    count_updates,
    restore_shards,
)
from clue_dist.checkpoint.shards import assemble_tensors, format_label, iterate_shards
from clue_dist.deepspeed_internals import ParameterShard

SHAPES = {"first": [2, 3], "second": [4]}
WEIGHTS = {"first": torch.arange(1.0, 7.0), "second": torch.arange(7.0, 11.0)}
SUMS = torch.tensor([8.0, 9.0])  # a buffer
Range = tuple[str, int, int]  # parameter, first element, and the one after the last
# Of each rank. A parameter begins and ends inside a rank, or spans some of them.
SAVED: list[list[Range]] = [[("first", 0, 4)], [("first", 4, 6), ("second", 0, 4)]]
RESTORED: list[list[Range]] = [
    [("first", 0, 1)],
    [("first", 1, 5)],
    [("first", 5, 6), ("second", 0, 3)],
    [("second", 3, 4)],
]


class Model(nn.Module):
    """Two parameters and a buffer."""

    def __init__(self) -> None:
        super().__init__()
        for name, shape in SHAPES.items():
            self.register_parameter(name, nn.Parameter(torch.zeros(shape)))
        self.register_buffer("sums", SUMS.clone())


def join_ranges(ranges: list[Range], factor: float = 1) -> Tensor:
    """The weights of ranges end to end, behind one element that belongs to no parameter."""
    return factor * torch.cat(
        [torch.zeros(1), *(WEIGHTS[n][start:stop] for n, start, stop in ranges)]
    )


def make_engine(ranges: list[Range], updates: int) -> Any:
    """An engine of one rank, all whose shards lie in one tensor."""
    master = join_ranges(ranges) if updates else torch.zeros_like(join_ranges(ranges))
    shards, place = [], 1
    for name, start, stop in ranges:
        shards.append(ParameterShard(name, start, stop - start, master, place))
        place += stop - start
    averages = {"exp_avg": join_ranges(ranges, 10), "exp_avg_sq": join_ranges(ranges, 100)}
    state = {master: averages | {UPDATES: torch.tensor(float(updates))}} if updates else {}
    optimizer = SimpleNamespace(state=state, defaults={})
    return SimpleNamespace(module=Model(), basic_optimizer=optimizer, shards=shards, master=master)


@pytest.fixture
def files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """The files of a checkpoint after seven updates."""
    for name in ("list_saved_shards", "list_updated_shards"):
        monkeypatch.setattr(engine_state, name, lambda engine: engine.shards)
    paths = []
    for rank, ranges in enumerate(SAVED):
        monkeypatch.setattr(engine_state.dist, "get_rank", lambda rank=rank: rank)
        engine = make_engine(ranges, 7)
        assert count_updates(engine) == 7
        metadata = {"shapes": json.dumps(collect_shapes(engine))}
        paths.append(tmp_path / f"rank-{rank}.safetensors")
        save_file(collect_tensors(engine, with_optimizer=True), paths[-1], metadata)
    return paths


def test_other_ranks_take_up_what_was_saved(files: list[Path]) -> None:
    for ranges in RESTORED:
        engine = make_engine(ranges, 0)
        assert count_updates(engine) == 0
        restore_shards(engine, files, 7)
        state = engine.basic_optimizer.state[engine.master]
        assert engine.master.equal(join_ranges(ranges))
        assert state["exp_avg"].equal(join_ranges(ranges, 10))
        assert state["exp_avg_sq"].equal(join_ranges(ranges, 100))
        assert count_updates(engine) == 7


def test_before_the_first_update_the_optimizer_has_no_state(files: list[Path]) -> None:
    engine = make_engine(RESTORED[1], 0)
    shards = [shard for shard in iterate_shards(files) if shard.key != "weights"]
    assert len(shards) == 6
    assert {shard.key for shard in shards} == {"exp_avg", "exp_avg_sq"}
    save_file(
        {f"weights:0:{name}": values for name, values in WEIGHTS.items()},
        files[0],
        {"shapes": json.dumps(SHAPES)},
    )
    restore_shards(engine, files[:1], 0)
    assert engine.master.equal(join_ranges(RESTORED[1]))
    assert not engine.basic_optimizer.state


def test_shards_that_are_missing_are_an_error(files: list[Path]) -> None:
    for part in (files[:1], files[1:]):
        with pytest.raises(KeyError, match="values of first"):
            restore_shards(make_engine(RESTORED[1], 0), part, 7)
        with pytest.raises(KeyError, match="values of first"):
            assemble_tensors(part)
    shapes = SHAPES | {"scale": [1]}  # of which not even one element is found
    tensors = {f"weights:0:{name}": values for name, values in WEIGHTS.items()}
    save_file(tensors, files[0], {"shapes": json.dumps(shapes)})
    with pytest.raises(KeyError, match="values of scale"):
        assemble_tensors(files[:1])


def test_the_name_of_a_parameter_may_hold_colons(tmp_path: Path) -> None:
    file = tmp_path / "rank-0.safetensors"
    save_file({format_label("exp_avg", 5, "a:b:c"): torch.ones(2)}, file)
    (shard,) = iterate_shards([file])
    assert shard[:3] == ("exp_avg", 5, "a:b:c")
    # A rank may ask for elements that lie before or behind the shard.
    assert [len(shard.read(*ends)) for ends in ((0, None), (1, 9), (0, -3), (4, 9))] == [2, 1, 0, 0]


def test_tensors_are_put_together_from_the_files_of_all_ranks(files: list[Path]) -> None:
    whole = {name: values.view(SHAPES[name]) for name, values in WEIGHTS.items()}
    tensors = assemble_tensors(files)
    assert tensors.keys() == {*SHAPES, "sums"}
    assert all(tensors[name].equal(values) for name, values in whole.items())
    assert tensors["sums"].equal(SUMS)
    averages = assemble_tensors(files, "exp_avg")
    assert averages.keys() == SHAPES.keys()
    assert all(averages[name].equal(10 * values) for name, values in whole.items())


def test_the_best_weights_are_saved_without_the_optimizer(
    files: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    for rank, labels in ((0, {"weights:0:first", "weights:0:sums"}), (1, {"weights:0:first"})):
        monkeypatch.setattr(engine_state.dist, "get_rank", lambda rank=rank: rank)
        engine = make_engine(SAVED[0], 7)
        assert collect_tensors(engine, with_optimizer=False).keys() == labels
        assert UPDATES in engine.basic_optimizer.state[engine.master]
