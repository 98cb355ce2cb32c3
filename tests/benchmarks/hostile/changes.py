"""Ways to change an input: edits of what lies at a path in it, its bytes, its files."""

import gzip
import os
import shutil
import socket
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from random import Random
from typing import Any

import h5py
import numpy as np

from tests.benchmarks.hostile.spoil import EDITS, VALUES
from tests.benchmarks.hostile.watch import CANARY, make_bomb

# --- edits ---

__all__ = ["CANARY", "VALUES", "deepcopy", "h5py"]  # which edits name


def list_edits(*groups: str) -> dict[str, bool]:
    """The edits of some groups, each with whether an input must then be refused."""
    texts = {
        must: "".join(EDITS[g].get(must, "") for g in groups) for must in ("refused", "either")
    }
    return {edit: must == "refused" for must, text in texts.items() for edit in text.splitlines()}


def evaluate(expression: str, before: Any = None, **names: Any) -> Any:
    """What an edit, in which the names of this module can stand, puts in the place of `before`."""
    return eval(expression, globals() | {"v": before} | names)


def set_some(values: np.ndarray, value: Any) -> np.ndarray:
    """Every 50th value becomes another, in a type that holds it."""
    changed = values.astype(np.result_type(values.dtype, np.min_scalar_type(value)))
    changed.reshape(-1)[7 % values.size :: 50] = value
    return changed


def set_one(values: np.ndarray, place: int, value: int) -> np.ndarray:
    """One value becomes another, of up to 64 bits."""
    changed = values.astype(np.int64)
    changed[place] = value
    return changed


def draw_like(values: np.ndarray) -> np.ndarray:
    """As many numbers of the same type at random."""
    high = min(int(np.iinfo(values.dtype).max), 2**62)
    return np.random.default_rng(0).integers(0, high, values.shape, endpoint=True)


# --- bytes ---


def spoil_bytes(path: Path, rng: Random) -> str:
    """Change the bytes of a file at random, and say how."""
    content = path.read_bytes()
    size, place = len(content), rng.randrange(len(content))
    head, rest = content[:place], content[place + 512 :]
    kinds = {
        f"cut short, at {place} of {size}": head,
        "cut in half": content[: size // 2],
        "without its last byte": content[:-1],
        "a byte flipped": flip_bytes(content, rng, 1, size),
        "ten bytes flipped": flip_bytes(content, rng, 10, size),
        "ten bytes flipped near the start": flip_bytes(content, rng, 10, 2000),
        f"a stretch of zeros, at {place} of {size}": head + bytes(min(512, size - place)) + rest,
        "a stretch of random bytes": head + rng.randbytes(512) + rest,
        "empty": b"",
        "HDF5's first bytes alone": content[:8],
        "random bytes behind HDF5's first": content[:8] + rng.randbytes(5000),
        "a pickle": make_bomb(),
        "a text": b"gene,count\nA,1\n",
        "a zip": b"PK\x03\x04" + rng.randbytes(500),
        "gzipped": gzip.compress(content),
    }
    kind = rng.choice(list(kinds))
    path.write_bytes(kinds[kind])
    return kind


def flip_bytes(content: bytes, rng: Random, times: int, end: int) -> bytes:
    flipped = bytearray(content)
    for _ in range(times):
        flipped[rng.randrange(min(end, len(content)))] ^= rng.randrange(1, 256)
    return bytes(flipped)


# --- files and folders ---


def replace_path(path: Path, how: str, outside: Path) -> None:
    """Put something else where a file or folder was, which may be moved to the folder `outside`."""
    if how in PLACED:
        PLACED[how](path, Path(shutil.move(path, outside / path.name)))
    elif how == "a pickle":
        (path if path.is_file() else path / "extra.pkl").write_bytes(make_bomb())
    else:
        files = [path] if path.is_file() else [file for file in path.rglob("*") if file.is_file()]
        for file in files if how in RESIZED else [path]:
            (RESIZED | BESIDE)[how](file)


def bind_socket(path: Path) -> None:
    here = Path.cwd()
    os.chdir(path.parent)  # a socket's path must be short
    try:
        socket.socket(socket.AF_UNIX).bind(path.name)
    finally:
        os.chdir(here)


OTHER_KIND = "a folder for a file, or a file for a folder"
# What stands in the place of a file or folder that was moved out.
PLACED: dict[str, Callable[[Path, Path], object]] = {
    "gone": lambda path, moved: None,
    "empty": lambda path, moved: path.mkdir() if moved.is_dir() else path.touch(),
    OTHER_KIND: lambda path, moved: path.touch() if moved.is_dir() else path.mkdir(),
    "a pipe": lambda path, moved: os.mkfifo(path),
    "a socket": lambda path, moved: bind_socket(path),
    "a link that leads out": lambda path, moved: path.symlink_to(moved),
    "a link to itself": lambda path, moved: path.symlink_to(path.name),
    "a link to nothing": lambda path, moved: path.symlink_to(moved.with_name("nowhere")),
    "a link to a device": lambda path, moved: path.symlink_to("/dev/zero"),
}
BESIDE: dict[str, Callable[[Path], object]] = {
    "a link inside the store": lambda path: path.symlink_to(path.rename(f"{path}-2").name),
    "a link beside it": lambda path: path.with_name("stray").symlink_to("/etc"),
    "a pipe beside it": lambda path: os.mkfifo(path.with_name("stray")),
}
# What becomes of every file; a terabyte of nothing takes no room on a disk.
RESIZED: dict[str, Callable[[Path], object]] = {
    "zeros": lambda file: file.write_bytes(bytes(file.stat().st_size)),
    "a terabyte": lambda file: os.truncate(file, 2**40),
}
REPLACED = (*PLACED, "a pickle", *BESIDE, *RESIZED)
