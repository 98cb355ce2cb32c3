"""A DeepSpeed whose private parts are not known is refused by name and version."""

import logging
import sys
from types import ModuleType, SimpleNamespace

import pytest
import torch.distributed as dist

from clue_dist import deepspeed_internals
from clue_dist.config import Config
from clue_dist.deepspeed_internals import bf16_optimizer, deepspeed, utils
from clue_dist.errors import ClueError
from clue_dist.train.engine import LARGEST_BUCKET, make_deepspeed_config


def make_package(version: str) -> ModuleType:
    package = ModuleType("deepspeed")
    package.__file__ = "site-packages/deepspeed"
    package.__version__ = version  # type: ignore[attr-defined]
    return package


KNOWN, UNKNOWN = ["0.19.8", "0.19.8+cu12", "0.19.12"], ["0.18.9", "0.19.7", "0.20.0", "1.0"]


def is_refused(version: str) -> bool:
    try:
        deepspeed_internals.require_known_deepspeed(make_package(version))
    except ClueError:
        return True
    return False


def test_known_versions_alone_pass() -> None:
    assert [version for version in KNOWN + UNKNOWN if not is_refused(version)] == KNOWN


@pytest.mark.parametrize("version", UNKNOWN)
def test_other_versions_are_named_beside_the_known_ones(version: str) -> None:
    with pytest.raises(ClueError) as raised:
        deepspeed_internals.require_known_deepspeed(make_package(version))
    assert f"got: DeepSpeed {version}\n" in str(raised.value)
    assert "expected: 0.19.8 or later, but before 0.20\n" in str(raised.value)
    assert 'pip install "deepspeed>=0.19.8,<0.20"' in str(raised.value)


def test_an_attribute_that_is_gone_is_named_with_the_version() -> None:
    package = make_package("0.19.99")
    with pytest.raises(ClueError, match=r"0\.19\.99, whose SimpleNamespace has no `grad_position`"):
        deepspeed_internals.read_private(SimpleNamespace(), "grad_position", package)
    with pytest.raises(ClueError, match="whose deepspeed has no `ops`"):
        deepspeed_internals.read_private(package, "ops", package)


def test_what_no_user_can_act_on_is_not_printed(capsys: pytest.CaptureFixture[str]) -> None:
    logger = logging.getLogger("DeepSpeed")
    handler = logging.StreamHandler(sys.stdout)
    logger.addHandler(handler)
    try:
        logger.warning("**** You are using ZeRO with an untested optimizer, proceed with caution")
        logger.warning("something else")
    finally:
        logger.removeHandler(handler)
    bf16_optimizer.see_memory_usage("begin bf16_optimizer", force=True)
    assert capsys.readouterr().out == "something else\n"


def test_no_compiler_is_started_to_learn_that_gloo_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    def probe() -> None:
        raise AssertionError("operators are probed")

    monkeypatch.delitem(vars(deepspeed.ops), "__compatible_ops__", raising=False)
    monkeypatch.setattr(deepspeed.ops, "_probe_compatible_ops", probe)
    deepspeed_internals.disable_shared_memory_collectives()
    assert not deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"]


def test_only_gloo_gathers_by_broadcasts(monkeypatch: pytest.MonkeyPatch) -> None:
    former, sent = utils.all_gather_into_tensor_dp_groups, []
    monkeypatch.setattr(utils, "all_gather_into_tensor_dp_groups", former)  # put back at the end
    monkeypatch.setattr(dist, "broadcast", lambda part, **places: sent.append((part, places)))
    deepspeed_internals.choose_gathering("gloo")
    # Two groups of weights: of the first two ranks have parts, of the second one alone has.
    utils.all_gather_into_tensor_dp_groups([], [["a", "b"], ["c"]], ["both", "alone"])
    assert sent == [
        (part, {"group": "both", "group_src": rank}) for rank, part in enumerate(["a", "b"])
    ]
    deepspeed_internals.choose_gathering("nccl")
    assert utils.all_gather_into_tensor_dp_groups.__module__ == utils.__name__


@pytest.mark.parametrize(("n_weights", "expected"), [(1_000, 1_000), (10**9, LARGEST_BUCKET)])
def test_the_bucket_of_gradients_is_no_larger_than_the_model(n_weights: int, expected: int) -> None:
    config = Config(data={"batch_size": 64})
    made = make_deepspeed_config(config, 2, False, n_weights)
    assert made["zero_optimization"]["reduce_bucket_size"] == expected
