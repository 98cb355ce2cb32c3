"""A launcher for tests: N ranks of a Python script on this machine. It starts twice as fast as `deepspeed`.

python tests/ranks.py N SCRIPT ARGS
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time

PATIENCE = 20.0  # seconds for the other ranks once one has failed
HUNG = 99  # exit code where one did not end by itself


def main() -> int:
    world = int(sys.argv[1])
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    shared = os.environ | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(world)}
    ranks = [
        subprocess.Popen([sys.executable, "-u", *sys.argv[2:]], env=shared | {"RANK": str(r), "LOCAL_RANK": str(r)})
        for r in range(world)
    ]
    signal.signal(signal.SIGTERM, lambda number, _: [rank.send_signal(number) for rank in ranks])
    deadline, hung = None, False
    while any(rank.poll() is None for rank in ranks):
        if deadline is None and any(rank.poll() for rank in ranks):
            deadline = time.monotonic() + PATIENCE
        if deadline is not None and time.monotonic() > deadline:
            print("tests/ranks.py: a rank did not end after another had failed", file=sys.stderr)
            hung = True
            for rank in ranks:
                rank.kill()
        time.sleep(0.05)
    codes = [rank.wait() for rank in ranks]
    return HUNG if hung else next((code if code > 0 else 128 - code for code in codes if code), 0)


if __name__ == "__main__":
    sys.exit(main())
