"""A launcher for tests: N ranks of a script, several times faster to start than by `deepspeed`.

    python tests/ranks.py SERVER                  listens at the socket SERVER until its input ends
    python tests/ranks.py SERVER N SCRIPT ARGS    has the server start N ranks, and waits for them
    python tests/ranks.py SERVER N -m MODULE ARGS    likewise
    python tests/ranks.py SERVER N -c CODE ARGS      likewise

Ranks are forked from the server, which has imported what they need: that is most of what a small
run takes. All of them iterate over sets in the order of the server. What must not depend on that
order is compared with a process that was started by itself.
"""

from __future__ import annotations

import contextlib
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
PRELOADED = (
    "clue_dist.train.loop",
    "torch._dynamo",
    "deepspeed.runtime.zero.muon.muon_optimizer",
    "clue_dist.inference.report",
    "mudata",
    "data_prep.cli.commands",
    "data_prep.convert",
    "warm_kernels",
)
FAILURE_LIMIT = 20.0  # seconds for the other ranks to end, once one has failed
STOP_SIGNALS = (signal.SIGHUP, signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
HUNG, GONE = 99, 98  # exit codes where a rank did not end by itself, and where the server is gone


def request_ranks(server: str, words: list[str]) -> int:
    """Have the server start ranks with the output, folder and environment of this process.

    Signals that ask for a stop are passed on to the ranks. Returns their exit code.
    """
    with socket.socket(socket.AF_UNIX) as connection:
        connection.connect(server)
        fields = [int(words[0]), words[1:], os.getcwd(), dict(os.environ)]
        request = json.dumps(fields).encode() + b"\n"
        n_sent = socket.send_fds(connection, [request], [0, 1, 2])
        connection.sendall(request[n_sent:])
        for number in STOP_SIGNALS:
            signal.signal(number, lambda number, _: connection.sendall(bytes([number])))
        reply = connection.recv(1)
    if not reply:
        print("tests/ranks.py: the server is gone", file=sys.stderr)
    return reply[0] if reply else GONE


def serve_requests(path: Path) -> int:
    """Fork a launcher for each request, until the input of this process ends."""
    with socket.socket(socket.AF_UNIX) as server:
        # The socket appears under its name once it listens, but requests wait for the imports.
        server.bind(str(path.with_suffix(".new")))
        server.listen()
        path.with_suffix(".new").rename(path)
        gc.disable()  # a fifth of what imports take
        for name in PRELOADED:
            importlib.import_module(name)
        gc.freeze()  # so that ranks share the pages of all this
        gc.enable()
        signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for the launchers
        while server in select.select([server, sys.stdin], [], [])[0]:
            connection, _ = server.accept()
            if os.fork() == 0:
                server.close()
                return answer_request(connection)
            connection.close()
    return 0


def answer_request(connection: socket.socket) -> int:
    """Start the ranks that are asked for, and reply with their exit code.

    In each of the ranks, which are forked here, this returns when the script has ended.
    """
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    request, outputs, *_ = socket.recv_fds(connection, 1 << 16, 3)
    while not request.endswith(b"\n"):
        more = connection.recv(1 << 16)
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
    exit_codes: dict[int, int | None] = {}  # by process; None as long as it runs
    port = environment.get("MASTER_PORT") or find_free_port()
    for rank in range(world):
        process = os.fork()
        if process == 0:
            connection.close()
            if world > 1:
                os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=port, WORLD_SIZE=str(world))
                os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), LOCAL_SIZE=str(world))
            return run_script(words)
        exit_codes[process] = None
    code = await_exit(exit_codes, connection)
    with contextlib.suppress(BrokenPipeError):  # the process that asked may have been killed
        connection.sendall(bytes([code]))
    return 0


def find_free_port() -> str:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return str(probe.getsockname()[1])


def run_script(words: list[str]) -> int:
    """Run a script, a module (`-m`) or code (`-c`) with its arguments as Python starts it."""
    if words[0] == "-u":  # the server has no buffer either
        words = words[1:]
    if words[0] == "-m":
        sys.argv, sys.path[0] = words[1:], os.getcwd()
        runpy.run_module(words[1], run_name="__main__", alter_sys=True)
    elif words[0] == "-c":
        sys.argv, sys.path[0] = ["-c", *words[2:]], os.getcwd()
        exec(compile(words[1], "<string>", "exec"), {"__name__": "__main__"})
    else:
        sys.argv, sys.path[0] = words, os.path.dirname(words[0])
        runpy.run_path(words[0], run_name="__main__")
    return 0


def await_exit(exit_codes: dict[int, int | None], connection: socket.socket) -> int:
    """Wait until all ranks have ended. Returns the first exit code, by rank, that is not 0."""
    deadline, is_hung = None, False
    while None in exit_codes.values():
        if select.select([connection], [], [], 0.02)[0]:
            number = connection.recv(1)  # nothing where the process that asked is gone
            signal_ranks(exit_codes, number[0] if number else signal.SIGKILL)
        collect_exit_codes(exit_codes)
        if deadline is None and any(exit_codes.values()):
            deadline = time.monotonic() + FAILURE_LIMIT
        if deadline is not None and time.monotonic() > deadline:
            print("tests/ranks.py: a rank did not end after another had failed", file=sys.stderr)
            deadline, is_hung = None, True
            signal_ranks(exit_codes, signal.SIGKILL)
    if is_hung:
        return HUNG
    return next((code if code > 0 else 128 - code for code in exit_codes.values() if code), 0)


def signal_ranks(exit_codes: dict[int, int | None], number: int) -> None:
    """Send a signal to every rank that still runs."""
    for process, code in exit_codes.items():
        if code is None:
            os.kill(process, number)


def collect_exit_codes(exit_codes: dict[int, int | None]) -> None:
    """Note the exit code of every rank that has ended."""
    for process, code in exit_codes.items():
        if code is None:
            ended, status = os.waitpid(process, os.WNOHANG)
            if ended:
                exit_codes[process] = os.waitstatus_to_exitcode(status)


def main() -> int:
    server, *words = sys.argv[1:]
    return request_ranks(server, words) if words else serve_requests(Path(server))


if __name__ == "__main__":
    sys.exit(main())
