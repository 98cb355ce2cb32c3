"""Who is let into a job, and what becomes of values that no rank of the job has written."""

from __future__ import annotations

import itertools
import pickle
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch.distributed as dist

from clue_dist.errors import (
    LOST,
    ClueError,
    FolderError,
    LostError,
    RankError,
    StoreError,
)
from clue_dist.ranks import Ranks, rendezvous
from clue_dist.ranks.job import MeetingPoint, RankClaim, locate_meeting, name_job
from clue_dist.ranks.messages import (
    ERROR_CLASSES,
    MOST_CHARACTERS,
    decode_error,
    decode_value,
    encode_error,
    encode_value,
)
from clue_dist.ranks.rendezvous import RendezvousConnections, admit_rank, exchange_messages
from clue_dist.resilience.bulletin import Bulletin, Failure
from clue_dist.resilience.peers import LOSS_LIMIT, Peers, PeerState

WORLD = 2
TOKEN = "ab"


class Bomb:
    """Leaves a file behind when it is unpickled."""

    mark: Path

    def __reduce__(self) -> tuple[Callable[..., None], tuple[Path]]:
        return Path.touch, (self.mark,)


@pytest.fixture
def store() -> Any:
    return dist.HashStore()  # type: ignore[attr-defined]


def stand_at(rank: int, is_given: bool = True) -> MeetingPoint:
    return MeetingPoint(rank, WORLD, "127.0.0.1", 29500, is_given)


def connect(store: Any) -> RendezvousConnections:
    return RendezvousConnections(store, store, stand_at(0), itertools.count())


def claim_place(name: str, token: str = TOKEN, world: int = WORLD) -> RankClaim:
    return RankClaim(name, world, f"process of {name}", token)


# --- which job --------------------------------------------------------------------------------


def test_all_ranks_of_a_job_name_it_alike() -> None:
    step = {"SLURM_STEP_NUM_TASKS": "2", "SLURM_JOB_ID": "7", "SLURM_STEP_ID": "1"}
    first, second = ({**step, "SLURM_PROCID": rank} for rank in "01")
    assert name_job(2, first, ["train.py"]) == name_job(2, second, ["train.py"])
    first, second = ({"RANK": rank, "LOCAL_SIZE": "2"} for rank in "01")
    assert name_job(2, first, []) == name_job(2, second, [])
    first, second = ({"RANK": rank, "LOCAL_SIZE": "1"} for rank in "01")  # two machines
    commands = [["train.py", f"--local_rank={rank}", "--config", "a.json"] for rank in "01"]
    assert name_job(2, first, commands[0]) == name_job(2, second, commands[1])


@pytest.mark.parametrize(
    "other",
    [
        {"SLURM_STEP_NUM_TASKS": "2", "SLURM_JOB_ID": "7", "SLURM_STEP_ID": "2"},
        {"SLURM_STEP_NUM_TASKS": "2", "SLURM_JOB_ID": "8", "SLURM_STEP_ID": "1"},
        {"RANK": "1", "TORCHELASTIC_RUN_ID": "mine"},
        {"RANK": "1", "TORCHELASTIC_RUN_ID": "none", "LOCAL_WORLD_SIZE": "2"},
        {"RANK": "1", "LOCAL_SIZE": "1"},
    ],
)
def test_other_jobs_have_other_names(other: dict[str, str]) -> None:
    step = {"SLURM_STEP_NUM_TASKS": "2", "SLURM_JOB_ID": "7", "SLURM_STEP_ID": "1"}
    assert name_job(2, other, ["train.py"]) != name_job(2, step, ["train.py"])


def test_the_launcher_is_the_nearest_process_that_is_no_rank(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A script around the command of each rank is a rank itself; the launcher is above it."""
    rank = {"RANK": "1"}
    tree = [FakeProcess(30, rank), FakeProcess(20, rank), FakeProcess(10, {}), FakeProcess(1, rank)]
    monkeypatch.setattr("psutil.Process", lambda: SimpleNamespace(parents=lambda: tree))
    assert name_job(2, rank | {"LOCAL_SIZE": "2"}, []).startswith("launched by process 10 on ")


class FakeProcess:
    """A process as psutil shows it."""

    def __init__(self, pid: int, environment: dict[str, str]) -> None:
        self.pid, self.environ = pid, lambda: environment


@pytest.mark.parametrize("port", ["http", "0", "65536", "-1", ""])
def test_a_port_that_is_none_is_an_error(port: str) -> None:
    with pytest.raises(RankError, match=f"MASTER_PORT={port}"):
        locate_meeting(0, 2, {"MASTER_PORT": port})


# --- who is let in ----------------------------------------------------------------------------


def test_ranks_of_one_job_share_its_keys(store: Any) -> None:
    first = admit_rank(store, claim_place("a"), stand_at(0))
    second = admit_rank(store, claim_place("a", "cd"), stand_at(1))
    first.set("key", "value")
    assert second.get("key") == b"value"
    assert not store.check(["key"])


@pytest.mark.parametrize("rank", range(WORLD))
@pytest.mark.parametrize(
    "stranger", [claim_place("b", "cd"), claim_place("a", "cd", world=4)], ids=["job", "world"]
)
def test_a_rank_of_another_job_leaves_without_a_trace(
    store: Any, stranger: RankClaim, rank: int
) -> None:
    """The job goes on: the place of its own rank 1 is still free."""
    admit_rank(store, claim_place("a"), stand_at(0))
    keys = store.num_keys()
    with pytest.raises(RankError, match=r"taken by another job[\s\S]*process of a") as raised:
        admit_rank(store, stranger, stand_at(rank))
    assert raised.value.exit_code == 2
    assert "--master_port 29501" in str(raised.value)
    assert store.num_keys() == keys
    admit_rank(store, claim_place("a", "ef"), stand_at(1))


def test_of_two_ranks_of_one_number_the_second_leaves(store: Any) -> None:
    """As where two jobs on several machines were started by the same command."""
    admit_rank(store, claim_place("a"), stand_at(0))
    admit_rank(store, claim_place("a", "cd"), stand_at(1))
    for rank in range(WORLD):
        with pytest.raises(RankError, match="taken by another job"):
            admit_rank(store, claim_place("a", "ef"), stand_at(rank))


def test_a_job_that_slurm_starts_again_elsewhere_is_tried_again(store: Any) -> None:
    admit_rank(store, claim_place("a"), stand_at(0))
    with pytest.raises(LostError, match="taken") as raised:
        admit_rank(store, claim_place("b", "cd"), stand_at(0, is_given=False))
    assert raised.value.exit_code == LOST


# --- values that nobody of the job has written ------------------------------------------------

HOSTILE = {
    "pickle": b"",  # written by the test
    "not UTF-8": b"\xff\xfe\x80",
    "empty": b"",
    "deep": b"[" * 100_000,
    "a number": b"12",
    "a number without end": b"9" * 10_000,
    "null": b"null",
    "a list": b'["rank", null, [1, 2]]',
    "an object": b'{"class": "SystemExit", "what": "x"}',
    "a class that is none": b'{"class":"os","what":"","where":null,"got":null,"expected":null,'
    b'"fix":null}',
    "a false exit code": b'[0, 0, "fine"]',
}


@pytest.fixture(params=list(HOSTILE))
def hostile(request: pytest.FixtureRequest, tmp_path: Path) -> Any:
    """A value; unpickling it would leave a file."""
    Bomb.mark = tmp_path / "mark"
    yield pickle.dumps(Bomb()) if request.param == "pickle" else HOSTILE[request.param]
    assert not Bomb.mark.exists()


def require_refusal(read: Callable[[], object], key: str) -> None:
    """What is read must be an error that says what, where, what was found, and what to do."""
    with pytest.raises(RankError) as raised:
        read()
    error = raised.value
    assert key in str(error.where)
    assert None not in (error.got, error.expected, error.fix)
    assert len(str(error)) < 1000
    assert str(error).replace("\n", "").isprintable()


@pytest.mark.parametrize("rank", range(WORLD))
def test_a_hostile_claim_of_a_job(store: Any, hostile: bytes, rank: int) -> None:
    hostile = hostile or b" "  # an empty value is as good as none, and is written over
    store.set("clue_dist/job", hostile)
    require_refusal(
        lambda: admit_rank(store, claim_place("a"), stand_at(rank)), "key clue_dist/job"
    )


@pytest.mark.parametrize("rank", range(WORLD))
def test_a_hostile_claim_of_a_place(store: Any, hostile: bytes, rank: int) -> None:
    key = f"clue_dist/place/{rank}"
    store.set(f"job/{TOKEN}/{key}", hostile or b" ")
    if rank > 0:
        admit_rank(store, claim_place("a"), stand_at(0))
    require_refusal(lambda: admit_rank(store, claim_place("a"), stand_at(rank)), f"key {key}")


def test_a_holder_that_is_hostile_text(store: Any) -> None:
    escape = RankClaim("b", WORLD, "\x1b[2J" + "x" * 10**6 + "\ud800", TOKEN)
    store.set("clue_dist/job", escape.encode())
    require_refusal(lambda: admit_rank(store, claim_place("a"), stand_at(1)), "127.0.0.1:29500")


def test_a_token_that_cannot_be_part_of_a_key(store: Any) -> None:
    store.set("clue_dist/job", claim_place("a", token="\ud800").encode())
    require_refusal(lambda: admit_rank(store, claim_place("a"), stand_at(1)), "key clue_dist/job")


def test_a_hostile_message(store: Any, hostile: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    connect_to = lambda *_: connect(store)  # noqa: E731
    monkeypatch.setattr("clue_dist.ranks.ranks.connect_to_rendezvous", connect_to)
    # Whatever an earlier test has left: a training in this process joins a group of its own.
    monkeypatch.setattr(Ranks, "have_joined", lambda self: False)
    store.set("clue_dist/sent/0/1", hostile)
    store.set("clue_dist/received/0/1", hostile)
    meet = lambda: Ranks(0, WORLD).run_before_joining(lambda: "done")  # noqa: E731
    if hostile == b"null":  # what a rank writes that has no error
        assert meet() == "done"
    else:
        require_refusal(meet, "the value of rank 1")


def test_a_hostile_value_in_a_collective(hostile: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Ranks, "have_joined", lambda self: True)
    monkeypatch.setattr(Ranks, "_gather_bytes", lambda self, message: [message, hostile])
    require_refusal(lambda: Ranks(0, WORLD).run_on_all(lambda: None), "the value of rank 1")


@pytest.mark.parametrize("rank", range(WORLD))
@pytest.mark.parametrize("key", ["failure", "loss", "late"])
def test_a_hostile_announcement_ends_the_job_with_one_error(
    store: Any, hostile: bytes, key: str, rank: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("clue_dist.resilience.peers.SIGN_INTERVAL", 0.0)
    peers = Peers(Ranks(rank, WORLD))
    peers._bulletin = Bulletin(Ranks(rank, WORLD), store)
    store.set(f"clue_dist/{key}", hostile)
    store.set("clue_dist/sign/0", hostile)  # a sign that does not change
    store.set("clue_dist/sign/1", hostile)
    if hostile == b"null" or (rank == 0 and key == "late"):  # which rank 0 writes and never reads
        assert peers._bulletin.read_failure() is None
        return
    if key == "late":
        peers._bulletin.exchange_signs()  # of rank 0, the first look counts as a sign of life
    peers._exchange_signs()  # ends by itself
    assert peers._state is PeerState.LOST
    assert peers._must_end(PeerState.LOST, LOSS_LIMIT + 1, 0)
    error = peers._causes[PeerState.LOST]
    require_refusal(lambda: (_ for _ in ()).throw(error), f"clue_dist/{key}")
    if key != "failure":
        failure = Bulletin(Ranks(1 - rank, WORLD), store).read_failure()
        assert failure == Failure(rank, 2, str(error))


def test_a_hostile_answer_to_an_announcement(store: Any, hostile: bytes) -> None:
    store.set("clue_dist/failure", hostile or b" ")
    bulletin = Bulletin(Ranks(1, WORLD), store)
    require_refusal(lambda: bulletin.announce_failure(Failure(1, 2, "x")), "clue_dist/failure")


# --- values that the job has written ----------------------------------------------------------


@pytest.mark.parametrize("kind", ERROR_CLASSES.values())
def test_an_error_arrives_as_it_was(kind: type[ClueError]) -> None:
    error = kind("what", where=Path("/run"), got=3, fix="mend it")
    arrived = decode_error(decode_value(encode_value(encode_error(error)), "here"), "here")
    assert type(arrived) is kind
    assert str(arrived) == str(error)
    assert arrived.exit_code == error.exit_code


def test_an_error_of_a_class_that_is_not_known_arrives_as_the_nearest_that_is() -> None:
    class Narrower(FolderError):
        pass

    assert type(decode_error(encode_error(Narrower("x")), "here")) is FolderError


def test_what_arrives_can_be_printed() -> None:
    arrived = decode_error(encode_error(StoreError("\x1b[2J" + "x" * 10**6)), "here")
    assert arrived is not None
    assert arrived.what.startswith("?[2Jxx")
    assert len(arrived.what) == MOST_CHARACTERS


def test_values_are_the_same_in_one_process_as_in_many() -> None:
    assert Ranks().gather_values((1, "a")) == [[1, "a"]]
    with pytest.raises(TypeError):
        Ranks().gather_values(Path("/run"))


def test_messages_are_exchanged_by_rank(store: Any) -> None:
    connections = connect(store)
    for number in range(2):  # a later exchange must not read what an earlier one has left
        store.set(f"clue_dist/sent/{number}/1", f"second {number}")
        store.set(f"clue_dist/received/{number}/1", "1")
        messages = exchange_messages(connections, b"first")
        assert messages == [b"first", f"second {number}".encode()]


def test_a_rank_that_is_given_another_device_keeps_its_connections(monkeypatch):
    """Training sets LOCAL_RANK to the device; a second training of the job reads it there."""
    made = []

    def make_connections(*numbers):
        made.append(numbers)
        return object()

    monkeypatch.setattr(rendezvous, "_connections", {})
    monkeypatch.setattr(rendezvous, "_make_connections", make_connections)
    first = rendezvous.connect_to_rendezvous(1, 2, 1)
    assert rendezvous.connect_to_rendezvous(1, 2, 0) is first
    assert made == [(1, 2, 1)]
