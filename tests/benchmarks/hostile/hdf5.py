"""HDF5 files that were changed: by name, at some object, in their bytes."""

from __future__ import annotations

import gzip
from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from tests.benchmarks.hostile.changes import Change, NotHere
from tests.benchmarks.hostile.spoil import CANARY
from tests.benchmarks.hostile.watch import bomb


def hdf5(
    path: Path,
    named: dict[str, tuple[Change, bool]],
    number: int,
    rng: np.random.Generator,
    folder: Path,
) -> tuple[str, frozenset[str]]:
    """A change by name, of any object, or of the file's bytes; what it was, and what must refuse it."""
    kind = number % 5
    if kind == 4:
        return in_bytes(path, rng, folder), frozenset()
    if kind == 3:
        with h5py.File(path, "r+") as file:
            return of_object(file, rng, folder), frozenset()
    how = list(named)[(number // 5 * 3 + kind) % len(named)]
    change, refuse = named[how]
    try:
        with h5py.File(path, "r+") as file:
            change(file, rng)
    except NotHere:
        return f"{how} (not of this form)", frozenset()
    return how, frozenset({"convert"} if refuse else ())


def in_bytes(path: Path, rng: np.random.Generator, folder: Path) -> str:
    content = path.read_bytes()
    at = int(rng.integers(len(content)))
    kinds: dict[str, Callable[[], bytes]] = {
        "cut short": lambda: content[:at],
        "cut in half": lambda: content[: len(content) // 2],
        "without its last byte": lambda: content[:-1],
        "a byte flipped": lambda: flipped(content, rng, 1, len(content)),
        "ten bytes flipped": lambda: flipped(content, rng, 10, len(content)),
        "ten bytes flipped near the start": lambda: flipped(content, rng, 10, 2000),
        "a stretch of zeros": lambda: (
            content[:at] + bytes(min(512, len(content) - at)) + content[at + 512 :]
        ),
        "a stretch of random bytes": lambda: content[:at] + rng.bytes(512) + content[at + 512 :],
        "empty": lambda: b"",
        "HDF5's first bytes alone": lambda: content[:8],
        "random bytes behind HDF5's first": lambda: content[:8] + rng.bytes(5000),
        "a pickle": lambda: bomb(folder),
        "a text": lambda: b"gene,count\nA,1\n",
        "a zip": lambda: b"PK\x03\x04" + rng.bytes(500),
        "gzipped": lambda: gzip.compress(content),
    }
    kind = list(kinds)[rng.integers(len(kinds))]
    path.write_bytes(kinds[kind]())
    return (
        f"{kind}, at {at} of {len(content)}"
        if kind in ("cut short", "a stretch of zeros")
        else kind
    )


def flipped(content: bytes, rng: np.random.Generator, times: int, end: int) -> bytes:
    out = bytearray(content)
    for at in rng.integers(0, min(end, len(content)), times).tolist():
        out[at] ^= int(rng.integers(1, 256))
    return bytes(out)


def of_object(file: h5py.File, rng: np.random.Generator, folder: Path) -> str:
    """One object of the file becomes another, or loses or changes an attribute."""
    names: list[str] = []
    file.visit(names.append)
    # What the conversion reads, most of all.
    names = [n for n in names if not n.startswith(("obsm", "uns", "varm", "obsp", "varp"))]
    name = names[rng.integers(len(names))]
    attributes = list(file[name].attrs)
    if attributes and rng.random() < 0.4:
        key = attributes[rng.integers(len(attributes))]
        if rng.random() < 0.4:
            del file[name].attrs[key]
            return f"{name} without its {key}"
        value = ATTRIBUTES[rng.integers(len(ATTRIBUTES))]
        file[name].attrs[key] = value
        return f"{name}: {key} = {value!r}"[:200]
    how = list(OBJECTS)[rng.integers(len(OBJECTS))]
    kept = dict(file[name].attrs)
    OBJECTS[how](file, name, folder)
    try:
        if rng.random() < 0.5 and name in file:
            file[name].attrs.update(kept)
    except (KeyError, OSError, RuntimeError):
        pass  # a link to nothing has none
    return f"{name}: {how}"


ATTRIBUTES: list[Any] = [
    0,
    -1,
    1.5,
    "",
    "csr_matrix",
    "csc_matrix",
    "array",
    "dataframe",
    "categorical",
    "pickle",
]
ATTRIBUTES += [
    CANARY,
    b"\xff\xfe",
    np.array([2, 2]),
    np.array([10**12, 10**12]),
    np.array([-1, -1]),
    np.array([1.5]),
]
ATTRIBUTES += [
    np.array(["a", "b"], "S"),
    np.array([[1]]),
    np.empty(0),
    h5py.Empty("f"),
    "_index",
    "../../X",
    True,
]


def _instead(make: Callable[[h5py.File, str], object]) -> Callable[[h5py.File, str, Path], None]:
    def change(file: h5py.File, name: str, folder: Path) -> None:
        del file[name]
        make(file, name)

    return change


def _value(value: Any, **options: Any) -> Callable[[h5py.File, str, Path], None]:
    return _instead(lambda file, name: file.create_dataset(name, data=value, **options))


def _linked(file: h5py.File, name: str, folder: Path) -> None:
    """The object itself, moved to another file."""
    outside = folder / "outside.h5"
    with h5py.File(outside, "w") as other:
        file.copy(name, other, "moved")
    del file[name]
    file[name] = h5py.ExternalLink(str(outside), "moved")


def _device(file: h5py.File, name: str) -> None:
    file.create_dataset(name, (1000,), "u1", external=[("/etc/passwd", 0, 1000)])


def _virtual(file: h5py.File, name: str) -> None:
    layout = h5py.VirtualLayout((100,), "f4")
    layout[:] = h5py.VirtualSource("/nowhere/else.h5", "x", (100,))
    file.create_virtual_dataset(name, layout)


def _shared(file: h5py.File, name: str) -> None:
    """Few groups, that are reached in 30^8 ways."""
    below = file.create_group(None)
    for _ in range(7):
        group = file.create_group(None)
        for number in range(30):
            group[f"g{number}"] = below
        below = group
    file[name] = below


OBJECTS: dict[str, Callable[[h5py.File, str, Path], None]] = {
    "gone": _instead(lambda file, name: None),
    "an empty group": _instead(lambda file, name: file.create_group(name)),
    "a number": _value(7),
    "a text": _value("text"),
    "no numbers": _value(np.empty(0)),
    "no value": _value(h5py.Empty("f4")),
    "other numbers": _value(np.arange(7.5)),
    "numbers below zero": _value(-np.arange(100)),
    "far too many": _instead(
        lambda file, name: file.create_dataset(name, (10**12,), "f8", chunks=(1000,))
    ),
    "far too many texts": _instead(
        lambda file, name: file.create_dataset(name, (10**11,), h5py.string_dtype(), chunks=(1000,))
    ),
    "two axes, far too long": _instead(
        lambda file, name: file.create_dataset(name, (10**7, 10**7), "f4", chunks=(10, 10))
    ),
    "compressed zeros, gigabytes of them": _instead(
        lambda file, name: file.create_dataset(
            name, (2**31,), "u1", chunks=(2**20,), compression="gzip"
        )
    ),
    "three axes": _value(np.ones((2, 2, 2))),
    "texts in chunks": _value(
        np.array([f"t{i}" for i in range(40)], object), dtype=h5py.string_dtype(), chunks=(16,)
    ),
    "references in chunks": _instead(
        lambda file, name: file.create_dataset(
            name, data=[file.ref] * 40, dtype=h5py.ref_dtype, chunks=(16,)
        )
    ),
    "references": _instead(
        lambda file, name: file.create_dataset(name, data=[file.ref], dtype=h5py.ref_dtype)
    ),
    "opaque bytes": _value(np.void(b"\x80\x04K\x01.")),
    "records": _value(np.zeros(40, [("a", "i4"), ("b", "f8")])),
    "complex numbers": _value(np.ones(40, complex)),
    "big-endian numbers": _value(np.arange(40, dtype=">f4")),
    "texts that are no UTF-8": _value(np.array([b"\xff\xfe%d" % i for i in range(40)])),
    "one endless text": _value(
        np.array(["x" * 3_000_000] + ["y"] * 39, object), dtype=h5py.string_dtype()
    ),
    "the same text": _value(np.array(["same"] * 40, object), dtype=h5py.string_dtype()),
    "texts with NUL": _value(np.array([b"a\0b%d" % i for i in range(40)])),
    "a link to itself": _instead(
        lambda file, name: file.__setitem__(name, h5py.SoftLink(f"/{name}"))
    ),
    "a link to the file": _instead(lambda file, name: file.__setitem__(name, h5py.SoftLink("/"))),
    "a link to nothing": _instead(
        lambda file, name: file.__setitem__(name, h5py.SoftLink("/nowhere"))
    ),
    "a link to another file": _linked,
    "a link to a file that is none": _instead(
        lambda file, name: file.__setitem__(name, h5py.ExternalLink("/etc/passwd", "x"))
    ),
    "groups that share groups": _instead(_shared),
    "bytes of another file": _instead(_device),
    "a view of another file": _instead(_virtual),
}
