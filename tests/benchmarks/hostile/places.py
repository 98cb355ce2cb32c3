"""Something else where a file or a folder of a store was: links, pipes, pickles, nothing."""

from __future__ import annotations

import os
import shutil
import socket
from collections.abc import Callable
from pathlib import Path

import numpy as np

from clue_dist.store import layout, svd
from tests.benchmarks.hostile.stores import ALL, attempts, copied, sound_values
from tests.benchmarks.hostile.trial import Trial, command, wrong
from tests.benchmarks.hostile.watch import bomb


def files(base: Path, folder: Path, number: int, rng: np.random.Generator) -> Trial:
    """Something else where a file or a folder of the store was."""
    root = copied(base, folder)
    everything = sorted(p for p in root.rglob("*") if p.is_file())
    places = [
        root / layout.MANIFEST,
        *sorted((root / svd.FOLDER).iterdir()),
        root / svd.FOLDER,
        root / "strata",
    ]
    folders = sorted(p for p in root.rglob("*") if p.is_dir())
    how = list(REPLACED)[number % len(REPLACED)]
    of = places if rng.random() < 0.3 else folders if rng.random() < 0.3 else everything
    path = of[rng.integers(len(of))]
    outside = folder / "outside"
    outside.mkdir()
    must = REPLACED[how](path, outside)
    before = _listing(outside)
    tried = attempts(root, sound_values(base / "s.zarr"))
    tried["append"] = lambda: command(
        "append", f"rna={base / 'more.h5ad'}", "--to", root, "--workers", 1
    )
    tried["outside"] = lambda: (
        None if _listing(outside) == before else wrong("files outside the store were changed")
    )
    return Trial(f"{path.relative_to(root)}: {how}", tried, frozenset(must))


def _listing(folder: Path) -> list[tuple[str, bytes]]:
    return [
        (str(p.relative_to(folder)), p.read_bytes())
        for p in sorted(folder.rglob("*"))
        if p.is_file()
    ]


def _moved(path: Path, outside: Path) -> Path:
    return Path(shutil.move(path, outside / path.name))


def link_out(path: Path, outside: Path) -> frozenset[str]:
    path.symlink_to(_moved(path, outside))
    return ALL | {"append"}


def link_inside(path: Path, outside: Path) -> frozenset[str]:
    """To itself under another name."""
    path.rename(path.with_name(path.name + "-2"))
    path.symlink_to(path.name + "-2")
    return ALL | {"append"}


def link_in_a_circle(path: Path, outside: Path) -> frozenset[str]:
    _moved(path, outside)
    path.symlink_to(path.name)
    return ALL | {"append"}


def dangling(path: Path, outside: Path) -> frozenset[str]:
    _moved(path, outside)
    path.symlink_to(outside / "nowhere")
    return ALL | {"append"}


def to_a_device(path: Path, outside: Path) -> frozenset[str]:
    _moved(path, outside)
    path.symlink_to("/dev/zero")
    return ALL | {"append"}


def stray_link(path: Path, outside: Path) -> frozenset[str]:
    (path.parent / "stray").symlink_to("/etc")
    return ALL | {"append"}


def pipe(path: Path, outside: Path) -> frozenset[str]:
    _moved(path, outside)
    os.mkfifo(path)
    return frozenset({"check"})


def stray_pipe(path: Path, outside: Path) -> frozenset[str]:
    os.mkfifo(path.parent / "stray")
    return frozenset({"check"})


def bound_socket(path: Path, outside: Path) -> frozenset[str]:
    _moved(path, outside)
    here = Path.cwd()
    os.chdir(path.parent)  # a socket's path must be short
    try:
        socket.socket(socket.AF_UNIX).bind(path.name)
    finally:
        os.chdir(here)
    return frozenset({"check"})


def other_kind(path: Path, outside: Path) -> frozenset[str]:
    """A folder for a file, a file for a folder."""
    was_file = path.is_file()
    _moved(path, outside)
    path.mkdir() if was_file else path.write_bytes(b"")
    return frozenset({"check"})


def pickled(path: Path, outside: Path) -> frozenset[str]:
    if path.is_file():
        path.write_bytes(bomb(outside.parents[1] / "canary"))
        return frozenset({"check"})
    (path / "extra.pkl").write_bytes(bomb(outside.parents[1] / "canary"))
    return frozenset({"check"})


def emptied(path: Path, outside: Path) -> frozenset[str]:
    if path.is_file():
        path.write_bytes(b"")
    else:
        _moved(path, outside)
        path.mkdir()
        return frozenset()  # of an SVD nothing is left, which is no damage
    return frozenset({"check"})


def zeroed(path: Path, outside: Path) -> frozenset[str]:
    for file in [path] if path.is_file() else [p for p in path.rglob("*") if p.is_file()]:
        file.write_bytes(bytes(file.stat().st_size))
    return frozenset({"check"})


def absurdly_large(path: Path, outside: Path) -> frozenset[str]:
    """A terabyte of nothing, which takes no room on the disk."""
    for file in [path] if path.is_file() else [p for p in path.rglob("*") if p.is_file()]:
        os.truncate(file, 2**40)
    return frozenset({"check"})


def removed(path: Path, outside: Path) -> frozenset[str]:
    _moved(path, outside)
    return frozenset()  # of an SVD nothing is left, which is no damage


REPLACED: dict[str, Callable[[Path, Path], frozenset[str]]] = {
    "a link that leads out": link_out,
    "a link inside the store": link_inside,
    "a link to itself": link_in_a_circle,
    "a link to nothing": dangling,
    "a link to a device": to_a_device,
    "a link beside it": stray_link,
    "a pipe": pipe,
    "a pipe beside it": stray_pipe,
    "a socket": bound_socket,
    "a folder for a file, or a file for a folder": other_kind,
    "a pickle": pickled,
    "empty": emptied,
    "zeros": zeroed,
    "a terabyte": absurdly_large,
    "gone": removed,
}
