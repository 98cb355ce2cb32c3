"""Notes whatever runs code that came with an input: modules, pickled objects, programs."""

import os
import pickle
import sys
import sysconfig
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

CANARY = "hostile_canary"  # a module that leaves a file behind when it is imported
RUNS = {"os.system", "os.exec", "os.posix_spawn", "subprocess.Popen", "pty.spawn"}
LOADS = {"pickle.find_class", "marshal.loads"}
# What may load objects of this environment: numba its compiled kernels, Dask its own tasks, Python
# its modules.
LOADERS = tuple(
    f"{os.sep}site-packages{os.sep}{n}{os.sep}" for n in ("numba", "dask", "distributed")
)
IMPORTS = "<frozen importlib._bootstrap_external>"
STANDARD = sysconfig.get_path("stdlib") + os.sep
_noted: list[str] | None = None  # of the input that is being tried
_folder: Path | None = None  # of the module, and of the marks that code leaves behind


def plant_canary(folder: Path) -> None:
    """Make the module, and have it found by its name from now on."""
    global _folder
    _folder = folder
    folder.mkdir(parents=True, exist_ok=True)
    mark = folder / "imported"
    text = f"from pathlib import Path\nPath({str(mark)!r}).touch()\nclass Canary:\n    pass\n"
    (folder / f"{CANARY}.py").write_text(text)
    sys.path.insert(0, str(folder))
    sys.addaudithook(_note_event)


class _Bomb:
    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[object, tuple[object, ...]]:
        return os.mkdir, (str(self.mark),)


def make_bomb() -> bytes:
    """A pickle that leaves a mark behind when it is loaded; the module must be planted."""
    assert _folder is not None
    return pickle.dumps(_Bomb(_folder / "unpickled"))


@contextmanager
def note_code() -> Iterator[list[str]]:
    """What runs in this block, a line each; the module must be planted."""
    global _noted
    assert _folder is not None
    _noted = []
    try:
        yield _noted
    finally:
        found, _noted = _noted, None
        for mark in (_folder / "imported", _folder / "unpickled"):
            if mark.exists():
                found.append(mark.name)
                mark.unlink() if mark.is_file() else mark.rmdir()


def _note_event(event: str, args: tuple[object, ...]) -> None:
    if _noted is None:
        return
    named = event == "import" and CANARY in str(args[0])
    if named or event in RUNS or (event in LOADS and not _is_expected()):
        _noted.append(f"{event} {args}"[:200])


def _is_expected() -> bool:
    """Whether the nearest caller that is no part of the standard library may load what it does."""
    frame: FrameType | None = sys._getframe(2)
    while frame is not None:
        name = frame.f_code.co_filename
        if name == IMPORTS or any(folder in name for folder in LOADERS):
            return True
        if not name.startswith(("<frozen ", STANDARD)) or f"{os.sep}site-packages{os.sep}" in name:
            return False
        frame = frame.f_back
    return False
