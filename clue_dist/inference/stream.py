"""A trained model over a whole store: slices of segments, this rank's share of them, all latents.

Each rank writes its rows into files of its own beside the output, and rank 0 puts them together.
The store is cut into the same slices however many ranks there are, so that the result is the same
to the last bit.
"""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Container, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Protocol

import numpy as np
import torch
from torch import Tensor

from clue_dist.data.batch import Batch, compute_library_size, read_batch
from clue_dist.errors import ResumeError, StoreError
from clue_dist.inference.output_files import translate_output_errors
from clue_dist.kinds import KINDS
from clue_dist.ranks import Ranks
from clue_dist.store.manifest import Modality
from clue_dist.store.reader import Store

# Names of arrays, and of their files; "alone-" and "depth-" stand before a modality.
JOINT, ALONE, DEPTH = "joint", "alone-", "depth-"


class Embedder(Protocol):
    """What streaming asks of a model."""

    def to(self, device: Any) -> Any: ...

    def embed_batch(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """Embed the cells of a batch.

        Returns:
            Where cells lie by everything observed, (B, K * d); and by modality where they lie by
            that modality alone, (B_k, K * d), with rows as in the batch's `modalities[m].rows`.
            Private dimensions are shrunk by `private_scale`.
        """
        ...


class LoadedModel(Protocol):
    """A trained model as `load_model` gives it."""

    @property
    def model(self) -> Embedder: ...
    @property
    def modalities(self) -> dict[str, Modality]:
        """What the model knows, in its order."""
        ...

    @property
    def name(self) -> str:
        """The checkpoint that holds the weights."""
        ...

    @property
    def seen_cells(self) -> frozenset[str]:
        """What identifies the cells that the model was trained on; see `identify_cells`."""
        ...

    @property
    def latent(self) -> int:
        """d, dimensions of each modality's part of z."""
        ...

    @property
    def private(self) -> int:
        """How many of the d, the last ones, follow from their modality alone."""
        ...

    @property
    def private_scale(self) -> float:
        """The factor by which private dimensions are shown smaller."""
        ...

    @property
    def has_common_space(self) -> bool:
        """Whether training could fit a common space."""
        ...


@dataclass(frozen=True)
class SegmentSlice:
    """Cells `start` to `stop` of a segment, whose rows in the embedding begin at `row`."""

    segment: str
    start: int
    stop: int
    row: int

    @property
    def n_cells(self) -> int:
        return self.stop - self.start

    @property
    def rows(self) -> slice:
        """Rows of the embedding."""
        return slice(self.row, self.row + self.n_cells)

    @property
    def positions(self) -> np.ndarray:
        """Positions in the segment, (n_cells,)."""
        return np.arange(self.start, self.stop)


@dataclass(frozen=True)
class Embedding:
    """Latents of cells in store order, segment after segment. The arrays lie on the disk."""

    slices: list[SegmentSlice]  # which cells the rows are
    joint: np.ndarray  # (N, K * d) float32, from everything observed
    alone: dict[str, np.ndarray]  # by modality (N, K * d), from it alone; NaN where not measured
    # By modality of counts (N,), ln of the sum of its counts; NaN where not measured. Empty unless
    # it was asked for.
    log_depth: dict[str, np.ndarray]


def slice_segments(
    store: Store, batch_size: int, n_cells: dict[str, int] | None = None
) -> list[SegmentSlice]:
    """Cut a store into slices of whole blocks.

    Args:
        store: the cells.
        batch_size: cells of a slice, rounded down to whole blocks, at least one.
        n_cells: how many cells of each segment; by default all.

    Raises:
        StoreError: no cells.
    """
    block_cells = store.manifest.block_cells
    step = max(1, batch_size // block_cells) * block_cells
    slices: list[SegmentSlice] = []
    row = 0
    for name, segment in store.manifest.strata.items():
        n = segment.n_cells if n_cells is None else n_cells.get(name, 0)
        slices += [
            SegmentSlice(name, start, min(start + step, n), row + start)
            for start in range(0, n, step)
        ]
        row += n
    if not slices:
        raise StoreError("the store has no cells to embed", where=store.root)
    return slices


def compute_embedding(
    trained_model: LoadedModel,
    store: Store,
    scratch: Path,
    slices: list[SegmentSlice],
    *,
    per_modality: bool,
    with_depth: bool = False,
    ranks: Ranks,
) -> Embedding:
    """Embed all slices, each rank its share. All ranks call this; it returns when all are done.

    Args:
        trained_model: the model.
        store: the cells.
        scratch: a folder that all ranks see, for the arrays.
        slices: slices of the store, as `slice_segments` cuts it.
        per_modality: whether z from each modality alone is wanted, too.
        with_depth: whether sequencing depths are wanted, too.
        ranks: this process among the others.

    Raises:
        StoreError: a damaged chunk, a full disk.
        ResumeError: the model gives NaN or Inf.
    """
    n_cells = slices[-1].rows.stop
    widths = _list_widths(trained_model, store, per_modality, with_depth)
    share = slices[ranks.slice_for_rank(len(slices))]
    ranks.run_on_all(lambda: _embed_share(trained_model, store, scratch, share, widths, ranks))
    ranks.run_on_first(lambda: _join_files(scratch, widths, n_cells, ranks.world))
    arrays: dict[str, np.ndarray] = {
        name: np.memmap(_array_path(scratch, name, 0), np.float32, mode="r", shape=(n_cells, width))
        for name, width in widths.items()
    }
    alone, depth = (
        {name.removeprefix(kind): rows for name, rows in arrays.items() if name.startswith(kind)}
        for kind in (ALONE, DEPTH)
    )
    log_depth = {name: rows[:, 0] for name, rows in depth.items()}
    return Embedding(slices, arrays[JOINT], alone, log_depth)


def _list_widths(
    trained_model: LoadedModel, store: Store, per_modality: bool, with_depth: bool
) -> dict[str, int]:
    """The columns of each array that is wanted."""
    width = trained_model.latent * len(trained_model.modalities)
    widths = {JOINT: width}
    if per_modality:
        widths |= {f"{ALONE}{name}": width for name in store.modalities}
    if with_depth:
        widths |= {
            f"{DEPTH}{name}": 1
            for name, modality in store.manifest.modalities.items()
            if not KINDS[modality.kind].real_values
        }
    return widths


def _array_path(scratch: Path, name: str, rank: int) -> Path:
    """The file with a rank's rows of an array.

    Ranks never share a file: machines that write into the same page of a file over a network lose
    each other's rows.
    """
    return scratch / f"{name}-{rank:05d}.f32"


def _embed_share(
    trained_model: LoadedModel,
    store: Store,
    scratch: Path,
    slices: list[SegmentSlice],
    widths: dict[str, int],
    ranks: Ranks,
) -> None:
    """Embed this rank's slices into its own files, which are on the disk when this returns."""
    device = ranks.choose_device()
    model = trained_model.model.to(device)
    with contextlib.ExitStack() as stack:
        with translate_output_errors(scratch):
            files = {
                name: stack.enter_context(
                    _array_path(scratch, name, ranks.rank).open("wb", buffering=0)
                )
                for name in widths
            }
        for cells, batch in _read_ahead(store, slices, list(trained_model.modalities)):
            found = _embed_cells(model, batch, device, widths)
            for name, file in files.items():
                # All cells of a segment carry the same modalities, so that a slice has every row
                # of a modality or none.
                if name in found:
                    rows = _require_finite(found[name], cells, name)
                else:
                    rows = np.full((cells.n_cells, widths[name]), np.nan, np.float32)
                with translate_output_errors(scratch):
                    _write_rows(file, rows)
        with translate_output_errors(scratch):
            for file in files.values():
                os.fsync(file.fileno())


def _embed_cells(
    model: Embedder, batch: Batch, device: torch.device, wanted: Container[str]
) -> dict[str, Tensor]:
    """z of a batch, and depth where it is wanted, by the name of the array that they go into."""
    depth = {
        f"{DEPTH}{name}": compute_library_size(part.counts).log()[:, None]
        for name, part in batch.modalities.items()
        if f"{DEPTH}{name}" in wanted
    }
    with torch.inference_mode():
        joint, alone = model.embed_batch(batch.to(device))
    return {JOINT: joint, **{f"{ALONE}{name}": latent for name, latent in alone.items()}, **depth}


def _write_rows(file: IO[bytes], rows: np.ndarray) -> None:
    """Write all bytes of an array.

    NumPy's own tofile() hides errors of the last few kilobytes, and a plain write may stop halfway.
    """
    left = np.ascontiguousarray(rows).data.cast("B")
    while left:
        left = left[file.write(left) :]


def _join_files(scratch: Path, widths: dict[str, int], n_cells: int, world: int) -> None:
    """Append the rows of the other ranks to those of rank 0, whose file so becomes the whole."""
    for name, width in widths.items():
        expected = 4 * n_cells * width
        paths = [_array_path(scratch, name, rank) for rank in range(world)]
        size = sum(path.stat().st_size for path in paths if path.exists())
        if size != expected:
            raise StoreError(
                "rows of some rank are missing",
                where=scratch,
                got=f"{size} bytes in {paths[0].name} and its like, by {world} ranks",
                expected=f"{expected} bytes",
            )
        with translate_output_errors(scratch), paths[0].open("ab") as whole:
            for path in paths[1:]:
                with path.open("rb") as rows:
                    shutil.copyfileobj(rows, whole, 2**24)
                path.unlink()
            whole.flush()
            os.fsync(whole.fileno())


def _read_ahead(
    store: Store, slices: list[SegmentSlice], modalities: list[str]
) -> Iterator[tuple[SegmentSlice, Batch]]:
    """Batches with the model's order of modalities; while one is embedded the next is read."""
    if not slices:
        return

    def read_slice(cells: SegmentSlice) -> Batch:
        return read_batch(store, cells.segment, cells.positions, modalities)

    with ThreadPoolExecutor(1) as pool:
        reading = pool.submit(read_slice, slices[0])
        for cells, following in zip(slices, [*slices[1:], None], strict=True):
            batch = reading.result()
            if following is not None:
                reading = pool.submit(read_slice, following)
            yield cells, batch


def _require_finite(latent: Tensor, cells: SegmentSlice, name: str) -> np.ndarray:
    values = latent.float().cpu().numpy()
    if not np.isfinite(values).all():
        source = "everything observed" if name == JOINT else name.removeprefix(ALONE)
        place = f"segment {cells.segment}, cells {cells.start} to {cells.stop - 1}"
        raise ResumeError(
            "the model gives NaN or Inf",
            where=f"{place}, z from {source}",
            fix="use another checkpoint (--checkpoint)",
        )
    return np.asarray(values)
