"""The front door: train a model, load one, and ask it, from a notebook, a script or `deepspeed`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import anndata as ad
import mudata as md
import numpy as np

from clue_dist.files import parse_path
from clue_dist.inference.cells import CellSource, MemoryCells, open_cells, open_source
from clue_dist.inference.embed import embed_anndata
from clue_dist.inference.load_model import TrainedModel, load_model


def load(folder: str | Path, checkpoint: str = "best") -> Run:
    """Load a trained model.

    Args:
        folder: folder of a run, or of a model that was shared.
        checkpoint: "best" (of validation), "last" (saved), or the name of a checkpoint.

    Raises:
        ResumeError: there is no trained model.
    """
    path = parse_path(str(folder))
    return Run(path, load_model(path, checkpoint))


class Run:
    """A trained model that can be asked about cells.

    Args:
        folder: its folder.
        trained_model: the model with its weights.
    """

    def __init__(self, folder: Path, trained_model: TrainedModel) -> None:
        self.folder, self.trained_model = folder, trained_model

    def embed(
        self,
        cells: CellSource,
        *,
        modality: str | None = None,
        modalities: Sequence[str] | None = None,
        layer: str | Mapping[str, str] | None = None,
        feature_ids: str | Mapping[str, str] | None = None,
        batch_key: str | None = None,
        min_known: float | None = None,
        batch_size: int = 4096,
    ) -> np.ndarray | ad.AnnData | md.MuData:
        """Embed cells: see docs/answers.md."""
        source = open_source(cells)
        opened = open_cells(
            source,
            self.trained_model,
            modality=modality,
            modalities=modalities,
            layer=layer,
            feature_ids=feature_ids,
            batch_key=batch_key,
            min_known=min_known,
        )
        assert isinstance(opened, MemoryCells)
        assert isinstance(source, (ad.AnnData, md.MuData))
        joint = embed_anndata(self.trained_model, source, opened, batch_size)
        return joint if source is cells else source
