"""A trained model over all cells that it is asked about: slice by slice, this rank's share of them.

Cells are cut into the same slices however many ranks there are, so that the result is the same to
the last bit.
"""

from __future__ import annotations

from collections.abc import Collection, Container, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from clue_dist.allocator import keep_freed_memory
from clue_dist.data.batch import Batch, compute_library_size
from clue_dist.errors import ResumeError
from clue_dist.inference.array_folder import ArrayFolder, arrange_rows
from clue_dist.inference.cells import Cells, CellSlice
from clue_dist.inference.load_model import OTHER_CHECKPOINT, TrainedModel
from clue_dist.kinds import KINDS
from clue_dist.model.clue import CLUE
from clue_dist.model.imputation import keep_sources
from clue_dist.progress import show_progress
from clue_dist.ranks import Ranks

# Names of arrays; "alone-" and "depth-" stand before a modality.
JOINT, VARIANCE, ALONE, DEPTH = "joint", "variance", "alone-", "depth-"


@dataclass(frozen=True)
class Embedding:
    """Latents of cells, in the rows that their slices name. The arrays may lie on the disk."""

    slices: Sequence[CellSlice]  # all cells that were embedded; other rows hold NaN
    joint: np.ndarray  # (N, K * d) float32, from everything observed
    alone: dict[str, np.ndarray]  # by modality (N, K * d), from it alone; NaN where not measured
    # By modality of counts (N,), ln of the sum of its counts; NaN where not measured. Empty unless
    # it was asked for.
    log_depth: dict[str, np.ndarray]
    # (N, K * d), of the joint z, see `CLUE.embed_batch_with_variance`; None unless asked for.
    variance: np.ndarray | None = None

    @classmethod
    def from_arrays(
        cls, slices: Sequence[CellSlice], arrays: Mapping[str, np.ndarray]
    ) -> Embedding:
        """Sort arrays (N, width) by what their names say of them."""
        alone, depth = (
            {
                name.removeprefix(kind): rows
                for name, rows in arrays.items()
                if name.startswith(kind)
            }
            for kind in (ALONE, DEPTH)
        )
        log_depth = {name: rows[:, 0] for name, rows in depth.items()}
        return cls(slices, arrays[JOINT], alone, log_depth, arrays.get(VARIANCE))

    def mark_measured(self, modality: str) -> np.ndarray:
        """Which cells carry a modality, (N,) bool."""
        measured = np.zeros(len(self.joint), bool)
        for cells in self.slices:
            measured[cells.rows] = modality in cells.modalities
        return measured

    def name_patterns(self) -> np.ndarray:
        """What was observed of each cell, (N,) names such as "rna+adt"; "" of those left out."""
        names = np.full(len(self.joint), "", object)
        for cells in self.slices:
            names[cells.rows] = "+".join(cells.modalities)
        return names


def embed_in_memory(
    trained_model: TrainedModel,
    cells: Cells,
    batch_size: int = 4096,
    *,
    per_modality: bool = True,
    with_variance: bool = True,
    sources: Collection[str] | None = None,
) -> Embedding:
    """Embed all cells into arrays in memory, on this rank alone.

    Args:
        trained_model: the model.
        cells: the cells.
        batch_size: cells embedded at once.
        per_modality: whether z from each modality alone is wanted, too.
        with_variance: whether the variance of the joint z is wanted, too.
        sources: modalities to infer z from, whatever else a cell has; cells that lack one of them
            are left out. By default every cell is inferred from all that it has.

    Raises:
        ClueError: what `compute_embedding` raises.
    """
    slices = cells.slice_cells(batch_size)
    if sources is not None:
        slices = [s for s in slices if set(sources) <= set(s.modalities)]
    widths = _list_widths(trained_model, cells, per_modality, with_variance=with_variance)
    arrays = {
        name: np.full((cells.n_cells, width), np.nan, np.float32) for name, width in widths.items()
    }
    embedded = _embed_slices(trained_model, cells, slices, widths, Ranks(), sources)
    for cell_slice, found in embedded:
        for name, rows in found.items():
            arrays[name][cell_slice.rows] = rows
    return Embedding.from_arrays(slices, arrays)


def compute_embedding(
    trained_model: TrainedModel,
    cells: Cells,
    scratch: Path,
    slices: Sequence[CellSlice],
    *,
    per_modality: bool,
    with_depth: bool = False,
    with_variance: bool = False,
    ranks: Ranks,
) -> Embedding:
    """Embed all slices, each rank its share. All ranks call this; it returns when all are done.

    Args:
        trained_model: the model.
        cells: the cells.
        scratch: a folder that all ranks see, for the arrays.
        slices: slices of the cells, as `Cells.slice_cells` cuts them.
        per_modality: whether z from each modality alone is wanted, too.
        with_depth: whether sequencing depths are wanted, too.
        with_variance: whether the variance of the joint z is wanted, too.
        ranks: this process among the others.

    Raises:
        StoreError: a damaged chunk, a full disk.
        DataError: values in memory that are no counts.
        ResumeError: the model gives NaN or Inf.
    """
    widths = _list_widths(trained_model, cells, per_modality, with_depth, with_variance)
    folder = ArrayFolder(scratch, dict.fromkeys(widths, np.float32))
    share = slices[ranks.slice_for_rank(len(slices))]
    embedded = _embed_slices(trained_model, cells, share, widths, ranks)
    pieces = (_complete_arrays(found, widths, each.n_cells) for each, found in embedded)
    ranks.run_on_all(lambda: folder.write_share(pieces, ranks.rank))
    rows = np.concatenate([cell_slice.rows for cell_slice in slices])

    def join_rows() -> None:
        folder.join_shares(ranks.world)
        for name, width in widths.items():
            folder.require_size(name, len(rows) * width)

    ranks.run_on_first(join_rows)
    arrays = {
        name: arrange_rows([folder.map_array(name).reshape(-1, width)], rows, cells.n_cells)
        for name, width in widths.items()
    }
    return Embedding.from_arrays(slices, arrays)


def _complete_arrays(
    found: Mapping[str, np.ndarray], widths: Mapping[str, int], n_cells: int
) -> dict[str, np.ndarray]:
    """The arrays of a slice, with NaN for those that it lacks.

    All its cells carry the same modalities, so that it has every row of a modality or none.
    """
    return {
        name: found[name] if name in found else np.full((n_cells, width), np.nan, np.float32)
        for name, width in widths.items()
    }


def _list_widths(
    trained_model: TrainedModel,
    cells: Cells,
    per_modality: bool,
    with_depth: bool = False,
    with_variance: bool = False,
) -> dict[str, int]:
    """The columns of each array that is wanted."""
    width = trained_model.latent * len(trained_model.modalities)
    widths = {JOINT: width} | ({VARIANCE: width} if with_variance else {})
    if per_modality:
        widths |= {f"{ALONE}{name}": width for name in cells.modalities}
    if with_depth:
        widths |= {
            f"{DEPTH}{name}": 1
            for name in cells.modalities
            if not KINDS[trained_model.modalities[name].kind].real_values
        }
    return widths


def _embed_slices(
    trained_model: TrainedModel,
    cells: Cells,
    slices: Sequence[CellSlice],
    wanted: Container[str],
    ranks: Ranks,
    sources: Collection[str] | None = None,
) -> Iterator[tuple[CellSlice, dict[str, np.ndarray]]]:
    """Each slice with the rows (n, width) of its arrays, which are finite, by their names."""
    keep_freed_memory()
    device = ranks.choose_device()
    model = trained_model.model.to(device)
    for cell_slice, batch in read_slices_ahead(cells, slices, "embedding", ranks):
        if sources is not None:
            batch = keep_sources(batch, list(trained_model.modalities), sources)
        found = _embed_cells(model, batch, device, wanted)
        yield (
            cell_slice,
            {
                name: _require_finite(rows, cell_slice, name)
                for name, rows in found.items()
                if name in wanted
            },
        )


def _embed_cells(
    model: CLUE, batch: Batch, device: torch.device, wanted: Container[str]
) -> dict[str, Tensor]:
    """z of a batch, variance and depth where they are wanted, by the names of their arrays."""
    depth = {
        f"{DEPTH}{name}": compute_library_size(part.counts).log()[:, None]
        for name, part in batch.modalities.items()
        if f"{DEPTH}{name}" in wanted
    }
    variance = {}
    per_modality = any(f"{ALONE}{name}" in wanted for name in batch.modalities)
    batch = batch.to(device)
    with torch.inference_mode():
        if VARIANCE in wanted:
            joint, alone, variance[VARIANCE] = model.embed_batch_with_variance(batch, per_modality)
        else:
            joint, alone = model.embed_batch(batch, per_modality)
    latents = {f"{ALONE}{name}": latent for name, latent in alone.items()}
    return {JOINT: joint, **variance, **latents, **depth}


def read_slices_ahead(
    cells: Cells, slices: Sequence[CellSlice], title: str, ranks: Ranks
) -> Iterator[tuple[CellSlice, Batch]]:
    """Read slices of cells; while the caller works on one, the next is read.

    Rank 0 shows the progress of its own slices under a title.
    """
    if not slices:
        return
    n_cells = sum(cell_slice.n_cells for cell_slice in slices)
    progress = show_progress(title, n_cells, is_shown=ranks.is_first)
    with ThreadPoolExecutor(1) as pool, progress:
        reading = pool.submit(cells.read_slice, slices[0])
        for cell_slice, following in zip(slices, [*slices[1:], None], strict=True):
            batch = reading.result()
            if following is not None:
                reading = pool.submit(cells.read_slice, following)
            yield cell_slice, batch
            progress.mark_done(cell_slice.n_cells)


def _require_finite(latent: Tensor, cells: CellSlice, name: str) -> np.ndarray:
    values = latent.float().cpu().numpy()
    if not np.isfinite(values).all():
        source = "everything observed" if name in (JOINT, VARIANCE) else name.removeprefix(ALONE)
        raise ResumeError(
            "the model gives NaN or Inf",
            where=f"{cells.place}, z from {source}",
            fix=OTHER_CHECKPOINT,
        )
    return np.asarray(values)
