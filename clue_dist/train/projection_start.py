"""How the projection of each modality starts: what the config asks for, and what the store has."""

from __future__ import annotations

from dataclasses import dataclass

from clue_dist.config import Config
from clue_dist.errors import ConfigError
from clue_dist.model.clue import ModalitySpec
from clue_dist.store import svd
from clue_dist.store.reader import Store
from clue_dist.store.svd import StoredSvd

_COMPUTE = "python -m data_prep svd STORE --modality {name} --components {components}"
_SAMPLE = "projected by an SVD of a sample"


@dataclass(frozen=True)
class ProjectionStart:
    """description: how, for people; stored_svd: the store's SVD, where it is used."""

    description: str
    stored_svd: StoredSvd | None = None


def choose_projection_starts(
    config: Config, store: Store, specs: dict[str, ModalitySpec]
) -> dict[str, ProjectionStart]:
    """Of every modality.

    Raises:
        ConfigError: `svd_of_store` is asked for, and a modality has no SVD in the store that fits.
        StoreError: an SVD of the store is damaged, or of other cells.
    """
    return {name: _start(config, store, name, spec) for name, spec in specs.items()}


def _start(config: Config, store: Store, name: str, spec: ModalitySpec) -> ProjectionStart:
    init = config.model.trunk.projection_init
    if init == "random":
        return ProjectionStart("projected by random weights")
    if init == "svd_of_sample":
        return ProjectionStart(_SAMPLE)
    stored, wanted = (
        svd.read_svd(store.root, store.manifest, name),
        min(config.model.trunk.projection, spec.n_features),
    )
    problem = _misfit(stored, spec, wanted)
    if stored is not None and problem is None:
        return ProjectionStart(
            f"projected by the stored SVD of {stored.note.n_cells:,} cells", stored
        )
    if init == "svd":
        return ProjectionStart(
            _SAMPLE if stored is None else f"{_SAMPLE} (the stored one has {problem})"
        )
    raise ConfigError(
        "the store has no SVD that fits",
        where=f"{config.store}: {name}, model.trunk.projection_init=svd_of_store",
        got=problem,
        expected=f"{wanted} components of {spec.normalise}",
        fix=f"`{_COMPUTE.format(name=name, components=wanted)}`, or --set model.trunk.projection_init=svd_of_sample"
        if stored is None or stored.note.normalise == spec.normalise
        else f"leave modalities.{name}.normalise at auto, or --set model.trunk.projection_init=svd_of_sample",
    )


def _misfit(stored: StoredSvd | None, spec: ModalitySpec, wanted: int) -> str | None:
    """Why a stored SVD cannot be used."""
    if stored is None:
        return "none"
    if stored.note.normalise != spec.normalise:
        return f"{stored.note.normalise} values, not {spec.normalise}"
    if stored.note.components < wanted:
        return f"{stored.note.components} components, not {wanted}"
    return None
