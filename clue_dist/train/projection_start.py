"""How the projection of each modality starts: as the config asks, with what the store has."""

from __future__ import annotations

from dataclasses import dataclass

from clue_dist.config import Config
from clue_dist.errors import ConfigError
from clue_dist.model.modality_spec import ModalitySpec
from clue_dist.store import svd
from clue_dist.store.reader import Store
from clue_dist.store.svd import StoredSvd

_COMPUTE_COMMAND = "python -m data_prep svd STORE --modality {name} --components {components}"
_FROM_SAMPLE = "projected by an SVD of a sample"


@dataclass(frozen=True)
class ProjectionStart:
    """How the projection of one modality starts."""

    description: str  # for people
    stored_svd: StoredSvd | None = None  # the SVD of the store, if it is used


def choose_projection_starts(
    config: Config, store: Store, specs: dict[str, ModalitySpec]
) -> dict[str, ProjectionStart]:
    """Choose how the projection of each modality starts.

    Args:
        config: what a person set.
        store: the store, in which there may be SVDs of all its cells.
        specs: the modalities, by name.

    Raises:
        ConfigError: `svd_of_store` is asked for, and a modality has no SVD in the store that fits.
        StoreError: an SVD of the store is damaged, or of other cells.
    """
    return {name: _choose_start(config, store, name, spec) for name, spec in specs.items()}


def _choose_start(config: Config, store: Store, name: str, spec: ModalitySpec) -> ProjectionStart:
    """For one modality."""
    init = config.model.trunk.projection_init
    if init == "random":
        return ProjectionStart("projected by random weights")
    if init == "svd_of_sample":
        return ProjectionStart(_FROM_SAMPLE)
    stored_svd = svd.read_svd(store.root, store.manifest, name)
    components = min(config.model.trunk.projection, spec.n_features)
    problem = _find_misfit(stored_svd, spec, components)
    if stored_svd is not None and problem is None:
        n_cells = stored_svd.note.n_cells
        return ProjectionStart(f"projected by the stored SVD of {n_cells:,} cells", stored_svd)
    if init == "svd":  # one of the store is welcome, but not asked for
        remark = "" if stored_svd is None else f" (the stored one has {problem})"
        return ProjectionStart(f"{_FROM_SAMPLE}{remark}")
    if stored_svd is None or stored_svd.note.normalise == spec.normalise:
        remedy = f"`{_COMPUTE_COMMAND.format(name=name, components=components)}`"
    else:
        remedy = f"leave modalities.{name}.normalise at auto"
    raise ConfigError(
        "the store has no SVD that fits",
        where=f"{config.store}: {name}, model.trunk.projection_init=svd_of_store",
        got=problem,
        expected=f"{components} components of {spec.normalise}",
        fix=f"{remedy}, or --set model.trunk.projection_init=svd_of_sample",
    )


def _find_misfit(stored_svd: StoredSvd | None, spec: ModalitySpec, components: int) -> str | None:
    """Why a stored SVD cannot be used; None if it can."""
    if stored_svd is None:
        return "none"
    note = stored_svd.note
    if note.normalise != spec.normalise:
        return f"{note.normalise} values, not {spec.normalise}"
    if note.components < components:
        return f"{note.components} components, not {components}"
    return None
