"""Stores that were changed, signed again or not, and what is tried with them.

A change that was not signed must be refused, or alter no value. Who signs again says what the
values are: then columns, codes and numbers must be within the bounds of the manifest.
"""

import hashlib
import io
import json
import shutil
import zipfile
from collections.abc import Callable
from contextlib import suppress
from functools import lru_cache, partial
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import tensorstore as ts
from pydantic import ValidationError

from clue_dist.config import Config
from clue_dist.errors import ClueError, StoreError
from clue_dist.store import layout, svd
from clue_dist.store.manifest import Manifest
from clue_dist.store.reader import SegmentReader, Store
from clue_dist.store.rows import CsrRows
from clue_dist.store.writer import hash_file
from clue_dist.train.setup import prepare_setup
from tests import served_values
from tests.benchmarks.hostile import spoil
from tests.benchmarks.hostile.changes import REPLACED, evaluate, list_edits, replace_path
from tests.benchmarks.hostile.trial import Trial, WrongValues, run_data_prep
from tests.benchmarks.hostile.watch import make_bomb
from tests.unit.prep_helpers import make_counts, write_h5ad

Attempts = dict[str, Callable[[], object]]
MANIFEST, METADATA, SVD = (list(list_edits(g)) for g in ("manifest", "metadata", "svd"))
ARRAYS = list_edits("arrays")  # refused by `check`; other codes may be those of a sound row


def make_sound(base: Path) -> None:
    """A store of two strata and several shards, with an SVD; and more cells for it."""
    cells = {"rna": slice(0, 120), "adt": slice(0, 70), "other": slice(0, 70)}
    store = served_values.make_small_store(base, cells, 20)
    run_data_prep("svd", store, "--modality", "rna", "--components", 5, "--workers", 1)
    write_h5ad(base / "more.h5ad", make_counts(10, 20, 7, prefix="rna", cells="new"))


@lru_cache
def read_sound(base: Path) -> served_values.Values:
    return served_values.read_everything(Store(base / "s.zarr"))


def copy_store(base: Path, folder: Path) -> Path:
    return Path(shutil.copytree(base / "s.zarr", folder / "s.zarr"))


# --- what is tried ---


def list_attempts(root: Path, sound: served_values.Values | None) -> Attempts:
    """What is tried with a store: what it serves must be `sound`, or within bounds where None."""
    config = {"store": str(root), "run": str(root.parent / "run")}
    serving = partial(serve_bounded, root) if sound is None else partial(serve_sound, root, sound)
    return {
        "serve": serving,
        "check": partial(run_data_prep, "check", root),
        "inspect": partial(run_data_prep, "inspect", root),
        "train": lambda: prepare_setup(Config(**config), 1).load_held_out_batch(),
    }


def serve_sound(root: Path, sound: served_values.Values) -> None:
    values, refused = served_values.count_wrong_values(root, sound)
    if values:
        raise WrongValues(f"{values} values that are not the store's")
    if refused:
        raise StoreError("some of it was refused", where=root)


def serve_bounded(root: Path) -> None:
    """Read everything, to its end even where a part is refused."""
    store, errors = Store(root), []
    reads = [partial(_read_tables, store.manifest, part) for part in store.segments.values()]
    for read in [*reads, partial(_read_batches, store)]:
        try:
            read()
        except ClueError as error:
            errors.append(error)
    if errors:
        raise errors[0]


def _read_tables(manifest: Manifest, reader: SegmentReader) -> None:
    cells = np.arange(reader.n_cells)
    obs = reader.read_metadata(cells)
    _require_bounds("batch", obs.batch, -1, len(manifest.batches))
    _require_bounds("label", obs.label, -1, len(manifest.labels))
    for modality in reader.modalities:
        features, rows = manifest.modalities[modality].n_features, reader.read_rows(modality, cells)
        if isinstance(rows, CsrRows):
            _require_bounds(f"{modality} columns", rows.indices, 0, features)
            _require_bounds(f"{modality} counts", rows.values, 1, 2**33)
        elif rows.shape != (reader.n_cells, features):
            raise WrongValues(f"{modality} {rows.shape}")


def _read_batches(store: Store) -> None:
    manifest = store.manifest
    for name, values in served_values.read_batches(store):
        if name.endswith("indices"):
            _require_bounds(name, values, 0, manifest.modalities[name.split()[-2]].n_features)
        if name.endswith("code"):
            _require_bounds(name, values, -1, len(manifest.batches))


def _require_bounds(what: str, values: np.ndarray, low: int, end: int) -> None:
    if len(values) and not (low <= values.min() and values.max() < end):
        raise WrongValues(f"{what} from {values.min()} to {values.max()}, not {low} to {end - 1}")


# --- signed again ---


def sign_store(root: Path) -> None:
    """Write a manifest whose hashes, fingerprint and seal fit whatever lies there."""
    manifest = Manifest.read(root)
    files = {
        name: {key: hash_file(root / key) for key in getattr(manifest, name)}
        for name in ("shards", "metadata")
    }
    manifest.model_copy(update=files).write(root)


def seal_manifest(root: Path, tree: Any) -> None:
    """Write a manifest of JSON with the seal of its content, but the fingerprint it had."""
    manifest = Manifest.model_validate_json(json.dumps(tree | {"seal": ""}))
    seal = hashlib.sha256(manifest._encode()).hexdigest()
    (root / layout.MANIFEST).write_bytes(manifest.model_copy(update={"seal": seal})._encode())


# --- JSON ---

SHORT = {"inner": "codecs.0.configuration", "grid": "chunk_grid.configuration"}


def make_codec(name: str, **configuration: Any) -> Any:
    return {"name": name, "configuration": configuration}


def rename_modality(tree: Any, new: str) -> Any:
    """A manifest in which "rna" is called otherwise, everywhere."""
    text = json.dumps(tree)
    for before in ('"rna"', '"rna+', "/rna/", "/rna+"):
        text = text.replace(before, before.replace("rna", json.dumps(new)[1:-1]))
    return json.loads(text)


WORDS: dict[str, Any] = {
    "BYTES": make_codec("bytes", endian="little"),
    "TWINS": {"uint8": "int8", "int32": "uint32", "uint32": "float32", "float32": "int32"},
    "codec": make_codec,
    "renamed": rename_modality,
    "times": lambda numbers, factor: [number * factor for number in numbers],
}


def edit_json(content: bytes, edit: str) -> bytes:
    """Carry out an edit; the steps of a path are apart by dots."""
    tree = json.loads(content)
    for part in edit.split(" & "):
        path, _, expression = part.partition(" = ")
        if path == "tree":
            return spoil.format_tree(evaluate(expression, tree, **WORDS))
        first, _, rest = path.partition(".")
        *steps, last = f"{SHORT.get(first, first)}.{rest}".strip(".").split(".")
        node = tree
        for step in steps:
            node = node[int(step) if isinstance(node, list) else step]
        node[last] = evaluate(expression, node.get(last), tree=tree, **WORDS)
    return spoil.format_tree(tree)


def spoil_manifest(base: Path, folder: Path, number: int, rng: Random) -> Trial:
    """A manifest that was changed, and signed again or not."""
    root = copy_store(base, folder)
    path = root / layout.MANIFEST
    content, again, kind = path.read_bytes(), number % 3 != 0, number % 10
    if kind == 7:
        tree, turn = json.loads(content), rng.randrange(1, 20)
        modality = rng.choice(list(tree["modalities"].values()))
        modality["features"] = modality["features"][turn:] + modality["features"][:turn]
        seal_manifest(root, tree)
        change = f"features turned by {turn}, sealed with the fingerprint of before"
        return Trial(f"manifest: {change}", list_attempts(root, None), ("check", "train"))
    if kind == 8:
        change, again = MANIFEST[number // 10 % len(MANIFEST)], True
        content = edit_json(content, change)
    else:
        again &= kind != 9
        content, change = spoil.spoil_json(content, rng, float(kind == 9), 1 + number % 2)
    path.write_bytes(content)
    if again:
        with suppress(ValidationError):  # where it can be read, with fingerprint and seal
            Manifest.model_validate_json(content).write(root)
        shutil.rmtree(root / svd.FOLDER)  # of cells that would be others
    sound, signed = (None, ", signed again") if again else (read_sound(base), "")
    return Trial(f"manifest{signed}: {change}", list_attempts(root, sound))


def spoil_metadata(base: Path, folder: Path, number: int, rng: Random) -> Trial:
    """A zarr.json that was changed, and signed again or not."""
    root, again = copy_store(base, folder), rng.random() < 0.5
    paths = sorted(root.rglob("zarr.json"))
    arrays = [path for path in paths if b'"array"' in path.read_bytes()]
    path = rng.choice(arrays if rng.random() < 0.85 else paths)
    content = path.read_bytes()
    if number % 2 and number % 12 != 11 and path in arrays:
        change = METADATA[number // 2 % len(METADATA)]
        content = edit_json(content, change)
    else:
        content, change = spoil.spoil_json(content, rng, float(number % 12 == 11))
    path.write_bytes(content)
    if again:
        sign_store(root)
    what = f"{path.relative_to(root)}{', signed again' if again else ''}: {change}"
    return Trial(what, list_attempts(root, read_sound(base)), () if again else ("check",))


# --- arrays and files ---


def forge_arrays(base: Path, folder: Path, number: int, rng: Random) -> Trial:
    """Values that no conversion writes, with checksums, hashes and a fingerprint that fit."""
    root, edit = copy_store(base, folder), list(ARRAYS)[number % len(ARRAYS)]
    name, _, expression = edit.partition(" = ")
    for path in sorted(root.glob(f"strata/*/{name}")):
        store = {"driver": "zarr3", "kvstore": {"driver": "file", "path": f"{path}/"}}
        spec = store | {"store_data_equal_to_fill_value": True}
        array = ts.open(spec, open=True, write=True, read=True).result()
        values = np.array(array.read().result())
        array.write(evaluate(expression, values).astype(values.dtype)).result()
    sign_store(root)
    shutil.rmtree(root / svd.FOLDER)  # of cells that were others
    must_refuse = ["check"] if ARRAYS[edit] else []
    return Trial(f"arrays, signed again: {edit}", list_attempts(root, None), must_refuse)


def replace_file(base: Path, folder: Path, number: int, rng: Random) -> Trial:
    """Something else where a file or a folder of the store was."""
    root, outside = copy_store(base, folder), folder / "outside"
    outside.mkdir()
    how, everything = REPLACED[number % len(REPLACED)], sorted(root.rglob("*"))
    files, folders = ([p for p in everything if p.is_file() == flag] for flag in (True, False))
    named = [root / layout.MANIFEST, root / "strata", root / svd.FOLDER]
    path = rng.choice(rng.choice([[*named, *named[-1].iterdir()], files, files, folders]))
    # Of an SVD nothing may be left, which is no damage.
    may_pass = how == "gone" or (how == "empty" and path.is_dir())
    replace_path(path, how, outside)
    before = _list_contents(outside)
    attempts = list_attempts(root, read_sound(base))
    append = ("append", f"rna={base / 'more.h5ad'}", "--to", root, "--workers", 1)
    attempts["append"] = partial(run_data_prep, *append)

    def look_outside() -> None:
        if _list_contents(outside) != before:
            raise WrongValues("files outside the store were changed")

    attempts["outside"] = look_outside
    every = ("serve", "inspect", "train", "check", "append")
    must_refuse = every if "link" in how else () if may_pass else ("check",)
    return Trial(f"{path.relative_to(root)}: {how}", attempts, must_refuse)


def _list_contents(folder: Path) -> list[tuple[str, bytes]]:
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return [(str(path.relative_to(folder)), path.read_bytes()) for path in files]


# --- SVDs ---


def spoil_svd(base: Path, folder: Path, number: int, rng: Random) -> Trial:
    """Notes and arrays of an SVD that no conversion writes."""
    root = copy_store(base, folder)
    path, again = root / svd.FOLDER / "rna.json", bool(number % 2)
    note = json.loads(path.read_text())
    if number % 2:
        change, arrays = SVD[number // 2 % len(SVD)], name_arrays(root, note)
        content = edit_arrays(arrays, change)
        arrays.unlink()
        note["arrays"] = {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
        name_arrays(root, note).write_bytes(content)
        content = spoil.format_tree(note)
    else:
        content, change = spoil.spoil_json(path.read_bytes(), rng, float(number % 20 == 0))
        again = number % 20 != 0 and rng.random() < 0.75
    if again and isinstance(note := json.loads(content), dict):
        with suppress(ValidationError):
            note["digest"] = svd.SvdNote.model_validate_json(content).compute_digest()
        content = spoil.format_tree(note)
    path.write_bytes(content)

    def read() -> None:
        found = svd.read_svd(root, Manifest.read(root), "rna")
        if found and (len(found.loadings) != 20 or not np.isfinite(found.loadings).all()):
            raise WrongValues(f"loadings {found.loadings.shape}")

    def train() -> None:
        trunk = {"projection_init": "svd_of_store", "projection": 5}
        paths = {"store": str(root), "run": str(root.parent / "run")}
        prepare_setup(Config(**paths, modalities={}, model={"trunk": trunk}), 1)

    words = (root, "--modality", "rna", "--components", 5, "--workers", 1)
    commands = {name: partial(run_data_prep, name, root) for name in ("check", "inspect")}
    commands["svd"] = partial(run_data_prep, "svd", *words)
    what = f"SVD{', signed again' if again else ''}: {change}"
    return Trial(what, {"read": read, "train": train, **commands})


def name_arrays(root: Path, note: dict) -> Path:
    return root / svd.FOLDER / f"rna-{note['arrays']['sha256'][:16]}.npz"


def edit_arrays(path: Path, edit: str) -> bytes:
    name, _, expression = edit.removeprefix("del ").partition(" = ")
    objects = format_array(np.array([None]))
    words = {
        "bomb": make_bomb(),
        "pickled": objects[: objects.index(b"\n") + 1] + make_bomb(),
        "header": format_header,
        "compressed": format_array,  # bytes are compressed, arrays are not
    }
    if name == "file":
        return evaluate(expression, path.read_bytes(), **words)
    with np.load(path) as file:
        members = {key: format_array(file[key]) for key in file}
        before = file.get(name)
    members.pop(name, None)
    after = evaluate(expression, before, **words) if expression else None
    raw = isinstance(after, bytes)
    if expression:
        members[name] = after if raw else format_array(after)
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED if raw else 0) as archive:
        for key, content in members.items():
            archive.writestr(f"{key}.npy", content)
    return buffer.getvalue()


def format_header(shape: str, descr: str = "'<f4'", version: bytes = b"\x01\x00") -> bytes:
    """The head of an .npy file, whatever it says."""
    text = f"{{'descr': {descr}, 'fortran_order': False, 'shape': {shape}, }}".encode()
    text += b" " * (63 - (len(text) + 10) % 64) + b"\n"
    return b"\x93NUMPY" + version + len(text).to_bytes(2, "little") + text


def format_array(array: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, array, allow_pickle=True)
    return buffer.getvalue()
