"""Stored SVDs that hold what no command writes, with hashes that fit: pickles, absurd shapes, other types."""

from __future__ import annotations

import hashlib
import io
import json
import zipfile
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import ValidationError

from clue_dist.config import Config
from clue_dist.store import svd
from clue_dist.store.manifest import Manifest
from clue_dist.train.setup import prepare_setup
from tests.benchmarks.hostile import spoil
from tests.benchmarks.hostile.stores import Attempts, copied
from tests.benchmarks.hostile.trial import Trial, command, wrong
from tests.benchmarks.hostile.watch import bomb


def stored_svd(base: Path, folder: Path, number: int, rng: np.random.Generator) -> Trial:
    """Notes and arrays of an SVD that no conversion writes."""
    root = copied(base, folder)
    path = root / svd.FOLDER / "rna.json"
    note = json.loads(path.read_text())
    arrays_path = root / svd.FOLDER / f"rna-{note['arrays']['sha256'][:16]}.npz"
    if number % 2:
        how = list(ARRAYS)[number // 2 % len(ARRAYS)]
        content = ARRAYS[how](arrays_path, outside=folder / "canary")
        note["arrays"] = {"bytes": len(content), "sha256": _sha256(content)}
        arrays_path.unlink()
        (root / svd.FOLDER / f"rna-{note['arrays']['sha256'][:16]}.npz").write_bytes(content)
        again = True
    elif number % 20 == 0:
        content, how = spoil.broken_text(path.read_bytes(), rng)
        path.write_bytes(content)
        return Trial(f"note of an SVD: {how}", _of_svd(root))
    else:
        note, how = spoil.spoiled(note, rng)
        again = bool(rng.integers(4))
    if again and isinstance(note, dict):
        with suppress(ValidationError):
            note["digest"] = svd.SvdNote.model_validate_json(json.dumps(note)).compute_digest()
    path.write_bytes(spoil.text_of(note))
    return Trial(f"SVD{', signed again' if again else ''}: {how}", _of_svd(root))


def _of_svd(root: Path) -> Attempts:
    def read() -> None:
        found = svd.read_svd(root, Manifest.read(root), "rna")
        if found is not None and (
            found.loadings.shape[0] != 20 or not np.isfinite(found.loadings).all()
        ):
            wrong(f"loadings {found.loadings.shape}")

    def train() -> None:
        trunk = {"projection_init": "svd_of_store", "projection": 5}
        prepare_setup(
            Config(
                store=str(root), run=str(root.parent / "run"), modalities={}, model={"trunk": trunk}
            ),
            1,
        )  # type: ignore[arg-type]

    again = ("svd", root, "--modality", "rna", "--components", 5, "--workers", 1)
    commands = {name: lambda name=name: command(name, root) for name in ("check", "inspect")}
    return {"read": read, "train": train, **commands, "svd": lambda: command(*again)}


def _sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def _npz(path: Path, compressed: bool = False, **changes: Any) -> bytes:
    """The arrays as they are but for `changes`; None: left out."""
    with np.load(path) as file:
        arrays = dict(file) | changes
    buffer = io.BytesIO()
    (np.savez_compressed if compressed else np.savez)(
        buffer, **{k: v for k, v in arrays.items() if v is not None}
    )
    return buffer.getvalue()


def _member(path: Path, name: str, content: bytes) -> bytes:
    """The arrays as they are but for the raw bytes of one."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(path) as old, zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as new:
        for member in old.namelist():
            new.writestr(member, content if member == f"{name}.npy" else old.read(member))
    return buffer.getvalue()


def _header(shape: str, descr: str = "'<f4'", version: bytes = b"\x01\x00") -> bytes:
    text = f"{{'descr': {descr}, 'fortran_order': False, 'shape': {shape}, }}".encode()
    text += b" " * (63 - (len(text) + 10) % 64) + b"\n"
    return b"\x93NUMPY" + version + len(text).to_bytes(2, "little") + text


def _code(name: str) -> Any:
    def make(path: Path, outside: Path) -> bytes:
        objects = np.empty(1, object)
        objects[0] = None
        content = _npy(objects)
        return _member(path, name, content[: content.index(b"\n") + 1] + bomb(outside))

    return make


def _npy(array: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, array, allow_pickle=True)
    return buffer.getvalue()


ARRAYS: dict[str, Any] = {
    "pickled loadings": _code("loadings"),
    "pickled idf": _code("idf"),
    "a pickle for the file": lambda path, outside: bomb(outside),
    "an absurd shape": lambda path, outside: _member(
        path, "loadings", _header("(1000000000000, 5)")
    ),
    "a shape beyond 64 bits": lambda path, outside: _member(
        path, "loadings", _header("(10000000000000000000000, 5)")
    ),
    "a negative shape": lambda path, outside: _member(path, "loadings", _header("(-1, 5)")),
    "a shape of text": lambda path, outside: _member(path, "loadings", _header("'x'")),
    "a header that is code": lambda path, outside: _member(
        path, "loadings", _header(f"__import__('{spoil.CANARY}')")
    ),
    "a header nested deep": lambda path, outside: _member(
        path, "loadings", _header("(" * 3000 + ")" * 3000)
    ),
    "a type that is none": lambda path, outside: _member(
        path, "loadings", _header("(20, 5)", "'|V0'")
    ),
    "a header cut short": lambda path, outside: _member(
        path, "loadings", b"\x93NUMPY\x01\x00\xff\xff{"
    ),
    "a version that is none": lambda path, outside: _member(
        path, "loadings", _header("(20, 5)", version=b"\x09\x00")
    ),
    "an empty member": lambda path, outside: _member(path, "loadings", b""),
    "gigabytes of zeros": lambda path, outside: _member(
        path, "loadings", _header("(20, 5)") + bytes(2**28)
    ),
    "texts": lambda path, outside: _npz(path, loadings=np.full((20, 5), "x")),
    "complex numbers": lambda path, outside: _npz(path, loadings=np.zeros((20, 5), complex)),
    "records": lambda path, outside: _npz(path, loadings=np.zeros((20, 5), [("a", "f4")])),
    "times": lambda path, outside: _npz(path, idf=np.zeros(20, "M8[s]")),
    "float64": lambda path, outside: _npz(path, loadings=np.zeros((20, 5))),
    "NaN": lambda path, outside: _npz(path, scale=np.full(20, np.nan)),
    "zeros for scales": lambda path, outside: _npz(path, scale=np.zeros(20)),
    "an array less": lambda path, outside: _npz(path, mean=None),
    "an array more": lambda path, outside: _npz(path, more=np.zeros(3)),
    "other axes": lambda path, outside: _npz(path, loadings=np.zeros((5, 20), "f4")),
    "no axes": lambda path, outside: _npz(path, mean=np.float64(1)),
    "compressed": lambda path, outside: _npz(path, compressed=True),
    "nothing": lambda path, outside: b"",
    "cut short": lambda path, outside: path.read_bytes()[:-40],
    "no zip": lambda path, outside: b"x" * 1000,
}
