"""Runs the command of a container, and lets training save when the container is stopped.

A stop reaches this process alone. It is passed on to the ranks of launch/train.py: they save and
leave with exit code 75, then the launcher ends, then this process. The `deepspeed` command must not
get the signal: it would die at once, and the container with it. A command that does not train gets
the signal itself.
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

STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)


def is_training_command(command: list[str]) -> bool:
    """Tell whether this is Python that trains, and not a launcher that starts training."""
    words = [word for word in command[1:] if not word.startswith("-")]
    if "python" not in Path(command[0]).name or not words:
        return False
    script = Path(words[0]).name
    trains = script in ("train.py", "clue_dist.commands.train")
    return trains or (script in ("clue", "clue_dist") and words[1:2] == ["train"])


def find_ranks() -> list[psutil.Process]:
    """Find the training processes that came of this one, even if their launcher has gone."""
    ranks = []
    for process in psutil.process_iter(["cmdline"]):
        with suppress(ProcessLookupError):
            command = process.info["cmdline"]
            trains = command and is_training_command(command)
            if trains and os.getsid(process.pid) == os.getsid(0):
                ranks.append(process)
    return ranks


def main() -> None:
    try:
        child = subprocess.Popen(sys.argv[1:])
    except OSError as error:
        sys.exit(f"error: cannot start {sys.argv[1]}: {error.strerror}")

    def pass_on(number: int, frame: FrameType | None) -> None:
        ranks = find_ranks()
        for rank in ranks:
            with suppress(psutil.NoSuchProcess):
                rank.terminate()
        if not ranks:
            child.send_signal(number)

    for number in STOP_SIGNALS:
        signal.signal(number, pass_on)
    code = child.wait()
    # The launcher may end before the ranks have saved, and they would be killed with this process.
    while find_ranks():
        time.sleep(0.2)
    sys.exit(code if code >= 0 else 128 - code)


if __name__ == "__main__":
    main()
