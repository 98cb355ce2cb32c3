"""A model over a whole store: pieces of strata, this rank's share of them, and the latents of all."""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Protocol

import numpy as np
import torch
from torch import Tensor

from clue_dist.data.batch import Batch, read_batch
from clue_dist.errors import ConfigError, ResumeError, StoreError, list_names
from clue_dist.files import translate_disk_errors
from clue_dist.ranks import Ranks
from clue_dist.store.manifest import Modality
from clue_dist.store.reader import Store

DISK_FIX = "free some space or mend the permissions, then run it again"


class Embedder(Protocol):
    """What is asked of a model."""

    def to(self, device: Any) -> Any: ...

    def embed_batch(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """Posterior mean of the full z from everything observed, (B, K * d), and per modality present from it
        alone, (B_k, K * d), rows as in the batch's `modalities[m].rows`; private dimensions shrunk."""
        ...


class LoadedModel(Protocol):
    """A trained model as `train.trained.load_model` gives it. modalities: in model order; latent: d; private: so
    many of each modality's d dimensions, the last, follow from it alone, and are shown times private_scale."""

    @property
    def model(self) -> Embedder: ...
    @property
    def modalities(self) -> dict[str, Modality]: ...
    @property
    def name(self) -> str: ...
    @property
    def latent(self) -> int: ...
    @property
    def private(self) -> int: ...
    @property
    def private_scale(self) -> float: ...


@dataclass(frozen=True)
class StratumSlice:
    """Cells [start, stop) of a stratum, whose rows in the embedding begin at `row`."""

    stratum: str
    start: int
    stop: int
    row: int

    @property
    def rows(self) -> slice:
        return slice(self.row, self.row + self.stop - self.start)

    @property
    def positions(self) -> np.ndarray:
        return np.arange(self.start, self.stop)


@dataclass(frozen=True)
class Embedding:
    """Cells in store order, stratum after stratum. joint, alone[m]: (N, K * d) float32, on disk; alone[m] is the full
    z inferred from modality m alone, NaN where m was not observed; pieces: which cells the rows are."""

    pieces: list[StratumSlice]
    joint: np.ndarray
    alone: dict[str, np.ndarray]


def check_output_folder(out: Path) -> None:
    """The folder that `out` goes into is there.

    Raises:
        ConfigError: it is not, or is a file.
    """
    if not out.parent.is_dir():
        got = f"{out.parent} {'is a file' if out.parent.exists() else 'does not exist'}"
        raise ConfigError(
            "no such folder", where=f"--out {out}", got=got, fix="mend the path, or make the folder"
        )


def require_known_features(store: Store, modalities: dict[str, Modality]) -> None:
    """The store's modalities are among the model's, with the same kind and the same features in the same order.

    Raises:
        StoreError: missing, extra or reordered features, the first 10 of each.
    """
    fix = "`python -m data_prep convert ... --features-from TRAINING_STORE` lays the features out as the model's"
    for name, got in store.manifest.modalities.items():
        where = f"{store.root}: modality {name}"
        if name not in modalities:
            raise StoreError(
                "the model does not know a modality",
                where=where,
                got=name,
                expected=list_names(modalities),
            )
        known = modalities[name]
        if (got.kind, got.storage) != (known.kind, known.storage):
            raise StoreError(
                "a modality is of another kind than the model's",
                where=where,
                got=got.kind,
                expected=known.kind,
            )
        if got.features == known.features:
            continue
        have, want = set(got.features), set(known.features)
        missing, extra = (
            [f for f in known.features if f not in have],
            [f for f in got.features if f not in want],
        )
        moved = [
            f
            for f, g in zip(known.features, got.features, strict=False)
            if f != g and f in have and g in want
        ]
        lists = {"missing": missing, "extra": extra, "reordered": moved}
        told = "; ".join(
            f"{len(names)} {what}: {list_names(names)}" for what, names in lists.items() if names
        )
        raise StoreError(
            "the store's features are not the model's",
            where=where,
            got=told,
            expected=f"the model's {len(want)} features in their order",
            fix=fix,
        )


def slice_strata(
    store: Store, batch_size: int, cells: dict[str, int] | None = None
) -> list[StratumSlice]:
    """The store cut into batches of whole blocks. cells: how many of each stratum, all of every stratum by default."""
    size = store.manifest.block_cells
    step = max(1, batch_size // size) * size
    pieces, row = [], 0
    for name, stratum in store.manifest.strata.items():
        n = stratum.n_cells if cells is None else cells.get(name, 0)
        pieces += [StratumSlice(name, at, min(at + step, n), row + at) for at in range(0, n, step)]
        row += n
    if not pieces:
        raise StoreError("the store has no cells to embed", where=store.root)
    return pieces


def compute_embedding(
    loaded: LoadedModel,
    store: Store,
    scratch: Path,
    pieces: list[StratumSlice],
    *,
    per_modality: bool,
    ranks: Ranks,
) -> Embedding:
    """Embed `pieces`, this rank its share; returns when every rank is done. `scratch`: a folder all ranks see."""
    shape = pieces[-1].rows.stop, loaded.latent * len(loaded.modalities)
    names = ["joint", *(f"alone-{m}" for m in store.modalities if per_modality)]
    mine = pieces[ranks.slice_for_rank(len(pieces))]
    ranks.run_on_all(lambda: _embed_share(loaded, store, scratch, mine, names, ranks))
    ranks.run_on_first(lambda: _join(scratch, names, shape, ranks.world))
    arrays = {
        name: np.memmap(_part(scratch, name, 0), np.float32, mode="r", shape=shape)
        for name in names
    }
    return Embedding(
        pieces,
        arrays["joint"],
        {n.removeprefix("alone-"): a for n, a in arrays.items() if n != "joint"},
    )


@contextlib.contextmanager
def make_scratch_folder(out: Path, ranks: Ranks) -> Iterator[Path]:
    """A folder beside `out` that all ranks share; gone at the end, also after an error.

    What a killed process leaves of it is removed by the next one with the same `out`.
    """
    scratch = out.with_name(f".{out.name}.partial")

    def make() -> None:
        shutil.rmtree(scratch, ignore_errors=True)
        with translate_disk_errors(scratch, DISK_FIX, every=True):
            scratch.mkdir()

    ranks.run_on_first(make)
    try:
        ranks.run_on_all(lambda: _require_shared(scratch))
        yield scratch
        ranks.barrier()  # the others may still have the arrays open
    finally:
        if ranks.is_first:
            shutil.rmtree(scratch, ignore_errors=True)


def _require_shared(scratch: Path) -> None:
    if not scratch.is_dir():
        fix = "put --out on a file system that every machine of the job mounts"
        raise ConfigError(
            "not all machines see the folder of the output", where=scratch.parent, fix=fix
        )


def _part(scratch: Path, name: str, rank: int) -> Path:
    """A rank's rows of an array. Never one file for all: machines that write into the same page of a file over a
    network lose each other's rows."""
    return scratch / f"{name}-{rank:05d}.f32"


def _embed_share(
    loaded: LoadedModel,
    store: Store,
    scratch: Path,
    pieces: list[StratumSlice],
    names: list[str],
    ranks: Ranks,
) -> None:
    """Embed this rank's pieces into its own files, safe on the disk when this returns."""
    device = ranks.choose_device()
    model = loaded.model.to(device)
    with contextlib.ExitStack() as stack:
        paths = {name: _part(scratch, name, ranks.rank) for name in names}
        with translate_disk_errors(scratch, DISK_FIX, every=True):
            files = {
                name: stack.enter_context(path.open("wb", buffering=0))
                for name, path in paths.items()
            }
        for piece, batch in _read_ahead(store, pieces, list(loaded.modalities)):
            with torch.inference_mode():
                joint, alone = model.embed_batch(batch.to(device))
            z = {"joint": joint} | {f"alone-{m}": z for m, z in alone.items()}
            for name, file in files.items():
                # All cells of a stratum carry the same modalities: a piece has every row of one, or none.
                rows = (
                    _finite(z[name], piece, name)
                    if name in z
                    else np.full(joint.shape, np.nan, np.float32)
                )
                with translate_disk_errors(scratch, DISK_FIX, every=True):
                    _write_all(file, rows)
        with translate_disk_errors(scratch, DISK_FIX, every=True):
            for file in files.values():
                os.fsync(file.fileno())


def _write_all(file: IO[bytes], rows: np.ndarray) -> None:
    """NumPy's own tofile() hides errors of the last few kilobytes; a plain write may stop half-way."""
    left = np.ascontiguousarray(rows).data.cast("B")
    while left:
        left = left[file.write(left) :]


def _join(scratch: Path, names: list[str], shape: tuple[int, int], world: int) -> None:
    """Append the rows of the other ranks to those of rank 0, whose file so becomes the whole."""
    for name in names:
        parts = [_part(scratch, name, rank) for rank in range(world)]
        size, expected = sum(p.stat().st_size for p in parts if p.exists()), 4 * shape[0] * shape[1]
        if size != expected:
            where, got = scratch, f"{size} bytes of {name} by {world} ranks"
            raise StoreError(
                "rows of some rank are missing", where=where, got=got, expected=f"{expected} bytes"
            )
        with (
            translate_disk_errors(scratch, DISK_FIX, every=True),
            parts[0].open("ab") as whole,
        ):
            for part in parts[1:]:
                with part.open("rb") as rows:
                    shutil.copyfileobj(rows, whole, 2**24)
                part.unlink()
            whole.flush()
            os.fsync(whole.fileno())


def _read_ahead(
    store: Store, pieces: list[StratumSlice], modalities: list[str]
) -> Iterator[tuple[StratumSlice, Batch]]:
    """Batches in the model's order of modalities; the next is read while the model works on this one."""
    if not pieces:
        return

    def read(piece: StratumSlice) -> Batch:
        return read_batch(store, piece.stratum, piece.positions, modalities)

    with ThreadPoolExecutor(1) as pool:
        ahead = pool.submit(read, pieces[0])
        for piece, following in zip(pieces, [*pieces[1:], None], strict=True):
            batch = ahead.result()
            if following is not None:
                ahead = pool.submit(read, following)
            yield piece, batch


def _finite(z: Tensor, piece: StratumSlice, name: str) -> np.ndarray:
    values = z.float().cpu().numpy()
    if not np.isfinite(values).all():
        source = "everything observed" if name == "joint" else name.removeprefix("alone-")
        where = f"stratum {piece.stratum}, cells {piece.start} to {piece.stop - 1}, z from {source}"
        raise ResumeError(
            "the model gives NaN or Inf", where=where, fix="use another checkpoint (--checkpoint)"
        )
    return np.asarray(values)
