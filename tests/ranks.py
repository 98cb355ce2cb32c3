"""A launcher for tests: N ranks of a Python script on this machine, several times faster than `deepspeed`.

python tests/ranks.py SERVER              listens at the socket SERVER until its own input ends
python tests/ranks.py SERVER N SCRIPT ARGS

Ranks are forked from the server, which has imported all that they need: that is most of what a small run takes. They
have its order of sets: whatever must not depend on that is compared with a process that was started by itself.
"""

from __future__ import annotations

import gc
import importlib
import json
import os
import runpy
import select
import signal
import socket
import sys
import time
from pathlib import Path

# In this order: the first keeps DeepSpeed from compiling what the last imports.
IMPORTED = ("clue_dist.train.loop", "torch._dynamo", "deepspeed.runtime.zero.muon.muon_optimizer")
PATIENCE = 20.0  # seconds for the other ranks once one has failed
HUNG, GONE = 99, 98  # exit codes where one did not end by itself, where there is no telling


def ask(server: str, words: list[str]) -> int:
    """Have ranks run with this process's output, folder and environment; SIGTERM is passed on to them."""
    with socket.socket(socket.AF_UNIX) as line:
        line.connect(server)
        request = (
            json.dumps([int(words[0]), words[1:], os.getcwd(), dict(os.environ)]).encode() + b"\n"
        )
        sent = socket.send_fds(line, [request], [0, 1, 2])
        line.sendall(request[sent:])
        signal.signal(signal.SIGTERM, lambda number, _: line.sendall(bytes([number])))
        code = line.recv(1)
    if not code:
        print("tests/ranks.py: the server is gone", file=sys.stderr)
    return code[0] if code else GONE


def serve(path: Path) -> int:
    """A launcher of its own for each who asks."""
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(path.with_suffix(".new")))
        server.listen()
        path.with_suffix(".new").rename(path)
        for name in IMPORTED:
            importlib.import_module(name)
        gc.freeze()  # so that ranks share the pages of all this
        signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for the launchers
        while server in select.select([server, sys.stdin], [], [])[0]:
            line, _ = server.accept()
            if os.fork() == 0:
                server.close()
                return answer(line)
            line.close()
    return 0


def answer(line: socket.socket) -> int:
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    request, outputs, *_ = socket.recv_fds(line, 1 << 16, 3)
    while not request.endswith(b"\n"):
        more = line.recv(1 << 16)
        if not more:
            return GONE
        request += more
    for number, output in enumerate(outputs):
        os.dup2(output, number)
        os.close(output)
    world, words, folder, environment = json.loads(request)
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(environment)
    ranks: dict[int, int | None] = {}  # exit code by process, once it has ended
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = str(s.getsockname()[1])
    for rank in range(world):
        process = os.fork()
        if process == 0:
            line.close()
            if world > 1:
                os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=port, WORLD_SIZE=str(world))
                os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank))
            return run(words)
        ranks[process] = None
    code = watch(ranks, line)
    line.sendall(bytes([code]))
    return 0


def run(words: list[str]) -> int:
    """A script, as Python starts it."""
    sys.argv, sys.path[0] = words, os.path.dirname(words[0])
    runpy.run_path(words[0], run_name="__main__")
    return 0


def watch(ranks: dict[int, int | None], line: socket.socket) -> int:
    """Until all ranks have ended: the first exit code that is not 0."""
    deadline, hung = None, False
    while None in ranks.values():
        if select.select([line], [], [], 0.02)[0]:
            asked = line.recv(1)  # nothing where who asked is gone
            send(ranks, asked[0] if asked else signal.SIGKILL)
        collect(ranks)
        if deadline is None and any(ranks.values()):
            deadline = time.monotonic() + PATIENCE
        if deadline is not None and time.monotonic() > deadline:
            print("tests/ranks.py: a rank did not end after another had failed", file=sys.stderr)
            deadline, hung = None, True
            send(ranks, signal.SIGKILL)
    return (
        HUNG
        if hung
        else next((code if code > 0 else 128 - code for code in ranks.values() if code), 0)
    )


def send(ranks: dict[int, int | None], number: int) -> None:
    for process, code in ranks.items():
        if code is None:
            os.kill(process, number)


def collect(ranks: dict[int, int | None]) -> None:
    for process, code in ranks.items():
        if code is None:
            ended, status = os.waitpid(process, os.WNOHANG)
            if ended:
                ranks[process] = os.waitstatus_to_exitcode(status)


if __name__ == "__main__":
    sys.exit(ask(sys.argv[1], sys.argv[2:]) if sys.argv[2:] else serve(Path(sys.argv[1])))
