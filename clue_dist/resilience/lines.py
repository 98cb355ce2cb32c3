"""Connections between rank 0 and every other rank, over which nothing is said until one leaves.

The system breaks a connection as soon as the process at its other end is gone, whatever this one is waiting for. A
collective that has not begun, or the making of a process group, would not notice.
"""

from __future__ import annotations

import os
import secrets
import selectors
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from typing import Any, cast

from clue_dist.ranks import Ranks

_WHERE = (
    "clue_dist/lines"  # in the store: the port of rank 0, and what to say there before one's rank
)
_RANK = 8  # digits of the rank
_WELCOME, _AGREED, _BYE = b"welcome", b"agreed", b"bye"
_TICK = 0.25  # seconds
_CONNECTING = 3.0  # seconds to connect and be answered; then there is no line


class Lines:
    """This rank's ends. A line counts once both have heard of each other; where none comes about, as of a firewall
    or too few descriptors, none breaks.

    polite: whether to say goodbye. Who leaves without is taken for lost.

    Raises:
        RuntimeError: rank 0 is gone, and the store with it, or does not answer.
    """

    def __init__(self, ranks: Ranks, store: Any) -> None:
        self.polite = True
        self._token = secrets.token_hex(8)
        self._server: socket.socket | None = None
        self._ends: dict[socket.socket, int | None] = {}  # whose, once it has said so
        self._agreed: set[socket.socket] = set()
        if ranks.is_first:
            with suppress(OSError):
                self._server = _listening(ranks.world)
            store.set(
                _WHERE,
                f"{self._server.getsockname()[1]} {self._token}"
                if self._server is not None
                else "",
            )
            return
        store.wait([_WHERE])
        if where := store.get(_WHERE).decode():
            port, token = where.split()
            with suppress(OSError):
                self._call(int(port), f"{token}{ranks.rank:0{_RANK}}".encode())

    def _call(self, port: int, who: bytes) -> None:
        line = socket.create_connection((os.environ["MASTER_ADDR"], port), timeout=_CONNECTING)
        line.sendall(who)
        if line.recv(len(_WELCOME)) == _WELCOME:
            line.sendall(_AGREED)
            self._ends[_lasting(line)] = 0
            self._agreed.add(line)

    def broken(self, over: threading.Event) -> Iterator[int]:
        """Each rank whose process ended without a goodbye. Runs until `over` is set, in a thread of its own."""
        with selectors.DefaultSelector() as ready:
            for line in [*self._ends, *([self._server] if self._server is not None else [])]:
                ready.register(line, selectors.EVENT_READ)
            while not over.is_set():
                for key, _ in ready.select(_TICK):
                    line = cast("socket.socket", key.fileobj)
                    if line is self._server:
                        self._accept(ready)
                        continue
                    try:
                        said = line.recv(64)
                    except BlockingIOError:
                        continue
                    except ConnectionError:
                        said = b""  # it has ended in the midst of something
                    except OSError:
                        said = _BYE  # the way there is gone, of which nothing follows
                    if not (said and self._answer(line, said)):
                        ready.unregister(line)
                        rank = self._hang_up(line)
                        if rank is not None and not said:
                            yield rank
        self._leave()

    def _accept(self, ready: selectors.BaseSelector) -> None:
        assert self._server is not None
        try:
            line = _lasting(self._server.accept()[0])
            ready.register(line, selectors.EVENT_READ)
            self._ends[line] = None
        except OSError:  # no descriptor is left, for one
            time.sleep(_TICK)

    def _answer(self, line: socket.socket, said: bytes) -> bool:
        """Whether to go on listening to who said that."""
        token, rank = said[:-_RANK], said[-_RANK:]
        if self._ends[line] is None and token == self._token.encode() and rank.isdigit():
            self._ends[line] = int(rank)
            with suppress(OSError):
                line.sendall(_WELCOME)
            return True
        if self._ends[line] is not None and said == _AGREED:
            self._agreed.add(line)
            return True
        return False

    def _hang_up(self, line: socket.socket) -> int | None:
        """The rank at the other end, if both had agreed on that."""
        rank = self._ends.pop(line)
        line.close()
        return rank if line in self._agreed else None

    def _leave(self) -> None:
        for line in self._ends:
            with suppress(OSError), line:
                if self.polite:
                    line.sendall(_BYE)
        if self._server is not None:
            self._server.close()


def _listening(backlog: int) -> socket.socket:
    """At any port, of IPv4 and, where the system has it, IPv6."""
    both = socket.has_dualstack_ipv6()
    family = socket.AF_INET6 if both else socket.AF_INET
    server = socket.create_server(("", 0), family=family, backlog=backlog, dualstack_ipv6=both)
    server.setblocking(False)
    return server


def _lasting(line: socket.socket) -> socket.socket:
    """Not blocking, and kept from those on the way that forget connections over which nothing is said."""
    line.setblocking(False)
    line.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    if hasattr(socket, "TCP_KEEPIDLE"):
        line.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, 60)  # seconds
    return line
