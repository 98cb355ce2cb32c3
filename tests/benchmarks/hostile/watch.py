"""Notes whatever runs code that came with an input: modules that it names, objects that it pickled, other programs."""

from __future__ import annotations

import os
import pickle
import sys
import sysconfig
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

from tests.benchmarks.hostile.spoil import CANARY

_RUNS = {"os.system", "os.exec", "os.posix_spawn", "subprocess.Popen", "pty.spawn"}
_LOADS = {"pickle.find_class", "marshal.loads"}
# What may load objects of this environment: numba its compiled kernels, Dask its own tasks, Python its modules.
_OWN = ("numba", "dask", "distributed")
_IMPORTS = "<frozen importlib._bootstrap_external>"
_STANDARD = sysconfig.get_path("stdlib") + os.sep
_noted: list[str] | None = None  # of the input that is being tried


def plant(folder: Path) -> None:
    """A module that leaves a file behind when it is imported; it can be found by its name from now on."""
    folder.mkdir(parents=True, exist_ok=True)
    mark = folder / "imported"
    text = f"from pathlib import Path\nPath({str(mark)!r}).touch()\nclass Canary:\n    pass\n"
    (folder / f"{CANARY}.py").write_text(text)
    sys.path.insert(0, str(folder))
    sys.addaudithook(_hook)


def bomb(folder: Path) -> bytes:
    """A pickle that leaves a file behind in `plant`'s folder when it is loaded."""
    return pickle.dumps(_Bomb(str(folder / "unpickled")))


class _Bomb:
    def __init__(self, mark: str) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[object, tuple[object, ...]]:
        return os.mkdir, (self.mark,)


@contextmanager
def watched(folder: Path) -> Iterator[list[str]]:
    """What ran in this block, a line each; folder: `plant`'s."""
    global _noted
    _noted = []
    try:
        yield _noted
    finally:
        found, _noted = _noted, None
        for mark in (folder / "imported", folder / "unpickled"):
            if mark.exists():
                found.append(mark.name)
                mark.unlink() if mark.is_file() else mark.rmdir()


def _hook(event: str, args: tuple[object, ...]) -> None:
    if _noted is None:
        return
    named = event == "import" and CANARY in str(args[0])
    if named or event in _RUNS or (event in _LOADS and not _own()):
        _noted.append(f"{event} {args}"[:200])


def _own() -> bool:
    """Whether the nearest caller that is no part of the standard library may load what it does."""
    frame: FrameType | None = sys._getframe(2)
    while frame is not None:
        name = frame.f_code.co_filename
        if name == _IMPORTS or any(
            f"{os.sep}site-packages{os.sep}{own}{os.sep}" in name for own in _OWN
        ):
            return True
        if not name.startswith(("<frozen ", _STANDARD)) or f"{os.sep}site-packages{os.sep}" in name:
            return False
        frame = frame.f_back
    return False
