"""Connections that break when a process ends: only those that both ends had agreed on count."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest

from clue_dist.ranks import Ranks
from clue_dist.resilience import lines
from clue_dist.resilience.lines import Lines


class Store(dict[str, bytes]):
    """What `Lines` uses of a store, within one process."""

    def set(self, key: str, value: str) -> None:
        self[key] = value.encode()

    def get(self, key: str) -> bytes:  # type: ignore[override]
        return self[key]

    def wait(self, keys: list[str]) -> None:
        assert all(key in self for key in keys)


class Listening:
    """`broken` in a thread, and what it said."""

    def __init__(self, of: Lines) -> None:
        self.of, self.over, self.lost = of, threading.Event(), list[int]()
        self._pool = ThreadPoolExecutor(1)
        self._work = self._pool.submit(lambda: self.lost.extend(of.broken(self.over)))

    def leave(self, polite: bool = True) -> None:
        self.of.polite = polite
        self.over.set()
        self._work.result()
        self._pool.shutdown()


@pytest.fixture
def store(monkeypatch: pytest.MonkeyPatch) -> Store:
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setattr(lines, "_CONNECTING", 0.5)
    return Store()


@pytest.fixture
def first(store: Store) -> Iterator[Listening]:
    first = Listening(Lines(Ranks(0, 4), store))
    yield first
    first.leave()


def test_who_leaves_with_a_goodbye_is_not_lost_and_who_leaves_without_is(
    store: Store, first: Listening
) -> None:
    others = [Listening(Lines(Ranks(rank, 4), store)) for rank in (1, 2, 3)]
    others[0].leave()
    others[1].leave(polite=False)
    others[2].leave(polite=False)
    deadline = time.monotonic() + 10
    while len(first.lost) < 2 and time.monotonic() < deadline:
        time.sleep(0.01)
    first.leave()
    assert sorted(first.lost) == [2, 3]


@pytest.mark.parametrize("polite", [True, False])
def test_rank_0_is_lost_where_it_says_no_goodbye(
    store: Store, first: Listening, polite: bool
) -> None:
    other = Listening(Lines(Ranks(1, 4), store))
    first.leave(polite)
    deadline = time.monotonic() + 2
    while not other.lost and time.monotonic() < deadline:
        time.sleep(0.01)
    other.leave()
    assert other.lost == ([] if polite else [0])


@pytest.mark.parametrize(
    "there", ["nobody", "one who hangs up", "one who is silent", "one who says something else"]
)
def test_where_no_line_comes_about_none_is_broken(store: Store, there: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        store.set("clue_dist/lines", f"{server.getsockname()[1]} 0123456789abcdef")
        if there == "nobody":
            server.close()
        kept = []

        def answer() -> None:
            line, _ = server.accept()
            if there == "one who hangs up":
                line.close()
            elif there == "one who says something else":
                line.sendall(b"HTTP/1.1 400 Bad Request\r\n\r\n")
                line.close()
            kept.append(line)

        thread = threading.Thread(target=answer)
        if there != "nobody":
            thread.start()
        other = Listening(Lines(Ranks(1, 4), store))
        if there != "nobody":
            thread.join()
        time.sleep(0.6)
        other.leave()
        for line in kept:
            line.close()
    assert other.lost == []


def test_without_a_server_the_others_do_not_wait(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object, **__: object) -> socket.socket:
        raise OSError("no more descriptors")

    monkeypatch.setattr(socket, "create_server", refuse)
    first = Listening(Lines(Ranks(0, 2), store))
    other = Listening(Lines(Ranks(1, 2), store))
    for one in (first, other):
        one.leave()
        assert one.lost == []


def test_strangers_and_half_greetings_are_no_ranks(store: Store, first: Listening) -> None:
    port, token = store.get("clue_dist/lines").decode().split()
    for said in (
        "",
        "GET / HTTP/1.0",
        f"{token}",
        f"{token}0000000x",
        f"{'0' * len(token)}00000001",
        f"{token}00000002",
    ):
        with socket.create_connection(("127.0.0.1", int(port))) as line:
            line.sendall(said.encode())
            time.sleep(0.05)
    other = Listening(Lines(Ranks(3, 4), store))  # it still listens
    other.leave(polite=False)
    deadline = time.monotonic() + 10
    while not first.lost and time.monotonic() < deadline:
        time.sleep(0.01)
    first.leave()
    assert first.lost == [3]
