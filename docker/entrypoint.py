"""Runs a command as the one that a container is for, and lets training save when the container is stopped.

A stop reaches this process alone. It is handed to the ranks of launch/train.py: they save and leave with exit code 75,
and the launcher and this process after them. The `deepspeed` command must not get it, it would die at once, and the
container with it. A command that does not train gets the signal itself.
"""

import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from types import FrameType

import psutil

STOPS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)


def is_training_command(command: list[str]) -> bool:
    """Whether this is Python running train.py itself, not a launcher that is told to."""
    script = next((word for word in command[1:] if not word.startswith("-")), "")
    return "python" in Path(command[0]).name and Path(script).name == "train.py"


def count_ranks() -> list[psutil.Process]:
    """Training processes that this one started, directly or through a launcher, which may be gone."""
    found = []
    for process in psutil.process_iter(["cmdline"]):
        with suppress(ProcessLookupError):
            if (
                process.info["cmdline"]
                and is_training_command(process.info["cmdline"])
                and os.getsid(process.pid) == os.getsid(0)
            ):
                found.append(process)
    return found


def main() -> None:
    try:
        child = subprocess.Popen(sys.argv[1:])
    except OSError as error:
        sys.exit(f"error: cannot start {sys.argv[1]}: {error.strerror}")

    def stop(number: int, frame: FrameType | None) -> None:
        training = count_ranks()
        for rank in training:
            with suppress(psutil.NoSuchProcess):
                rank.terminate()
        if not training:
            child.send_signal(number)

    for number in STOPS:
        signal.signal(number, stop)
    code = child.wait()
    while (
        count_ranks()
    ):  # saving, after a launcher that did not wait: with this process they would all be killed
        time.sleep(0.2)
    sys.exit(code if code >= 0 else 128 - code)


if __name__ == "__main__":
    main()
