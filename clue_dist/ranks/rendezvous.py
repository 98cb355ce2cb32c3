"""The rendezvous of a job: torch's store of keys and values, which rank 0 or torchrun serves.

Two jobs on one machine may be given the same port, as by default they are. The one that comes later
must not disturb the other: a rank writes nothing but its claim before it knows that it belongs to
the job, and all keys of a job begin with a token of its rank 0.
"""

from __future__ import annotations

import itertools
import os
import secrets
import socket
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from datetime import timedelta
from typing import Any, NamedTuple, cast

from clue_dist.errors import shorten_error
from clue_dist.process import mark_as_rank, print_error
from clue_dist.ranks import job
from clue_dist.ranks.job import MeetingPoint, RankClaim

NOTICE_AFTER = 5.0  # seconds of waiting after which a rank says for whom it waits
LOOK_INTERVAL = 0.1  # seconds between two looks for what is awaited
_JOB, _PLACE = "clue_dist/job", "clue_dist/place"  # keys of claims


class RendezvousConnections(NamedTuple):
    """Two connections to the rendezvous.

    They are made together: rank 0, which serves it, may be gone later, and torch would try to
    connect to it for long.
    """

    main: Any  # for the main thread
    beside: Any  # for threads beside it
    point: MeetingPoint
    rounds: Iterator[int]  # numbers of the exchanges of messages, which all ranks make in one order


_connections: dict[tuple[int, int], RendezvousConnections] = {}  # by rank and world


def connect_to_rendezvous(rank: int, world: int, local_rank: int) -> RendezvousConnections:
    """Connect to the rendezvous of the job that this process belongs to, once for all calls.

    Raises:
        RankError: several machines and no MASTER_ADDR; another job holds the port.
        LostError: the rendezvous cannot be reached.
    """
    # The number on the machine is no key: it gives way to that of the device, see
    # `train.engine.join_process_group`, and a rank that asked anew would be taken for a stranger.
    if (rank, world) not in _connections:
        _connections[rank, world] = _make_connections(rank, world, local_rank)
    return _connections[rank, world]


def _make_connections(rank: int, world: int, local_rank: int) -> RendezvousConnections:
    """Connect, and set the variables that say so."""
    point = job.locate_meeting(rank, world, os.environ)
    holder = job.describe_process(os.getpid())
    claim = RankClaim(
        job.name_job(world, os.environ, sys.argv), world, holder, secrets.token_hex(16)
    )
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(world), LOCAL_RANK=str(local_rank))
    os.environ.update(MASTER_ADDR=point.host, MASTER_PORT=str(point.port))
    mark_as_rank()
    try:
        # torchrun keeps its server when it starts the ranks again: what the ranks of an earlier
        # attempt wrote there must not be read by those of this one.
        attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
        store = _open_part(_open_store(point), f"attempt/{attempt}")
        store = admit_rank(store, claim, point)
    except TimeoutError as error:
        raise point.make_lost_error("no word from rank 0") from error
    except RuntimeError as error:
        raise point.make_lost_error(shorten_error(error)) from error
    return RendezvousConnections(store, store.clone(), point, itertools.count())


def _open_store(point: MeetingPoint) -> Any:
    """Serve the store on rank 0, unless torchrun does, and connect to it."""
    import torch.distributed as dist

    serves = point.rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != str(True)
    if not serves:
        _await_listener(point)
    try:
        return dist.TCPStore(  # type: ignore[attr-defined]
            point.host,
            point.port,
            point.world,
            is_master=serves,
            timeout=timedelta(seconds=job.JOIN_LIMIT),
            wait_for_workers=False,
            multi_tenant=True,
        )
    except RuntimeError as error:
        if "EADDRINUSE" in str(error):
            raise point.make_taken_error(job.describe_listener(point.port)) from error
        raise


def _open_part(store: Any, prefix: str) -> Any:
    """Open the part of a store whose keys begin with a prefix."""
    import torch.distributed as dist

    return dist.PrefixStore(prefix, store)  # type: ignore[attr-defined]


def _await_listener(point: MeetingPoint) -> None:
    """Wait until somebody listens where the ranks meet; torch would print pages while it waits.

    Raises:
        TimeoutError: nobody does in time.
    """

    def can_connect() -> bool:
        try:
            socket.create_connection((point.host, point.port), NOTICE_AFTER).close()
        except OSError:
            return False
        return True

    _await(can_connect, lambda: print_wait(point, [0]))


def admit_rank(store: Any, claim: RankClaim, point: MeetingPoint) -> Any:
    """Claim the place of this rank in its job.

    Args:
        store: the store that was found where the ranks meet.
        claim: the claim of this rank.
        point: where that is, and which rank this is.

    Returns:
        The part of the store that is the job's alone.

    Raises:
        RankError: the store is that of another job, or a rank of this number is there already.
        LostError: as RankError, where starting the job again can help.
    """
    where = f"key {_JOB} at {point}"
    if point.rank == 0:
        first = RankClaim.decode(store.compare_set(_JOB, "", claim.encode()), where)
        is_member = first.token == claim.token
    else:
        _await_keys(store, [_JOB], lambda: print_wait(point, [0]))
        first = RankClaim.decode(store.get(_JOB), where)
        is_member = (first.job, first.world) == (claim.job, claim.world)
    if not is_member:
        raise point.make_taken_error(first.holder)
    job_store = _open_part(store, f"job/{first.token}")
    place = f"{_PLACE}/{point.rank}"
    found = RankClaim.decode(
        job_store.compare_set(place, "", claim.encode()), f"key {place} at {point}"
    )
    if found.token != claim.token:  # of another job that has the same name
        raise point.make_taken_error(found.holder)
    return job_store


def exchange_messages(connections: RendezvousConnections, message: bytes) -> list[bytes]:
    """Exchange a message with all ranks, before there is a process group.

    Returns:
        The messages of all ranks, by rank.

    Raises:
        LostError: not all ranks came in time.
    """
    store, point, number = connections.main, connections.point, next(connections.rounds)
    sent, received = (
        [f"clue_dist/{what}/{number}/{rank}" for rank in range(point.world)]
        for what in ("sent", "received")
    )

    def say_who_is_late() -> None:
        if point.rank == 0:  # one rank speaks for all
            print_wait(point, _find_missing(store, sent))

    try:
        store.set(sent[point.rank], message)
        _await_keys(store, sent, say_who_is_late)
        messages = store.multi_get(sent)
        store.set(received[point.rank], b"1")
        if point.rank == 0:  # the rendezvous may end with this process
            _await_keys(store, received, lambda: None)
    except TimeoutError as error:
        missing = _find_missing(store, sent) or _find_missing(store, received)
        raise point.make_lost_error(f"no word from {job.list_ranks(missing)}") from error
    except RuntimeError as error:
        raise point.make_lost_error(shorten_error(error)) from error
    return cast("list[bytes]", messages)


def _await_keys(store: Any, keys: Sequence[str], say_late: Callable[[], None]) -> None:
    """Wait until keys are written. torch's own `wait` would warn when its time is up."""
    _await(lambda: bool(store.check(list(keys))), say_late)


def _await(has_come: Callable[[], bool], say_late: Callable[[], None]) -> None:
    """Wait until `has_come` is true; after `NOTICE_AFTER` seconds call `say_late` and wait on.

    Raises:
        TimeoutError: it is not true within `JOIN_LIMIT` seconds.
    """
    started, is_told = time.monotonic(), False
    while not has_come():
        waited = time.monotonic() - started
        if waited > job.JOIN_LIMIT:
            raise TimeoutError
        if waited > NOTICE_AFTER and not is_told:
            say_late()
            is_told = True
        time.sleep(LOOK_INTERVAL)


def print_wait(point: MeetingPoint, awaited: Sequence[int]) -> None:
    """Print for whom a rank waits; of the ranks that wait for rank 0, one of each machine does."""
    is_speaker = point.rank <= 1 or os.environ.get("LOCAL_RANK") == "0"
    if is_speaker and awaited:
        print_error(
            f"rank {point.rank} of {point.world} waits for {job.list_ranks(awaited)} at {point}, "
            f"for {job.JOIN_LIMIT:.0f} s at most; {job.RUN_ALONE}"
        )


def _find_missing(store: Any, keys: Sequence[str]) -> list[int]:
    """Find the ranks whose key, of one for each rank, is not written yet."""
    return [rank for rank, key in enumerate(keys) if not store.check([key])]
