"""Simulated mosaics with known truth, of any size; a cell is the same however it is asked for.

A cell has a type, a batch, shared factors that every modality sees and private factors of each
modality. All are drawn for a chunk of cells at a time, from a generator that is keyed by the seed,
the purpose and the number of the chunk, so that a range of rows needs no others.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import scipy.sparse as sp

from clue_dist.errors import DataError
from clue_dist.files import TEMPORARY_ENDING, replace_file
from clue_dist.kinds import KINDS, infer_kind
from clue_dist.number_checks import require_number
from clue_dist.process import silence_mudata
from data_prep.jobs.whole_folders import make_folder
from data_prep.options import FIELDS, require_known_modalities
from data_prep.readers.source import CategoryCodes, DirectSource, Source, SourceHead, SourceRows

CHUNK_CELLS = 1024  # cells whose truth is drawn together
CHUNK_VALUES = 2**20  # values of a modality drawn together: bounds memory, however many features
TYPES = 8  # types of cells
_TRUTH, _FACTORS, _COUNTS, _WEIGHTS = range(4)  # purposes of a generator


@dataclass(frozen=True)
class SimulationSpec:
    """A mosaic: some cells carry every modality, the others one each, in equal parts."""

    modalities: tuple[tuple[str, str, int], ...]  # name, kind, features
    cells: int = 2000
    paired: float = 0.5  # the share of cells that carry every modality; they come first
    batches: int = 2
    shared: int = 8  # factors that every modality sees
    private: int = 4  # factors of each modality alone
    seed: int = 0

    @classmethod
    def from_features(
        cls, features: dict[str, int], kinds: dict[str, str], **sizes: Any
    ) -> SimulationSpec:
        """Make a spec of named modalities.

        Args:
            features: how many each modality has.
            kinds: kinds of modalities whose name does not say what they measure.
            sizes: the other fields.

        Raises:
            ConfigError: a size makes no sense.
            DataError: a modality is of unknown kind, or a kind is given of no modality.
        """
        require_known_modalities("--kind", kinds, features)
        modalities = tuple((name, infer_kind(name, kinds), n) for name, n in features.items())
        spec = cls(modalities, **sizes)
        for name, n_features in features.items():
            require_number(f"--modality {name}:{n_features}", n_features, 1, whole=True)
        for name in ("cells", "batches", "shared"):
            require_number(f"--{name}", getattr(spec, name), 1, whole=True)
        for name in ("private", "seed"):
            require_number(f"--{name}", getattr(spec, name), whole=True)
        require_number("--paired", spec.paired, 0, 1)
        return spec

    def build_sources(self) -> list[Source]:
        """Build the inputs of a conversion, one for each modality."""
        return [SimulatedSource(self, number) for number in range(len(self.modalities))]

    def list_cells(self, modality: int) -> np.ndarray:
        """List the cells that carry a modality, by its number; (n,) int64, ascending."""
        n_paired = round(self.cells * self.paired) if len(self.modalities) > 1 else self.cells
        bounds = np.linspace(n_paired, self.cells, len(self.modalities) + 1).astype(np.int64)
        unpaired = np.arange(bounds[modality], bounds[modality + 1])
        return np.concatenate([np.arange(n_paired), unpaired])

    def make_generator(self, *key: int) -> np.random.Generator:
        """Make a generator whose numbers depend on the seed and on a key: purpose, chunk ..."""
        return np.random.default_rng([self.seed, *key])


@dataclass(frozen=True)
class TrueFactors:
    """What is true of some cells, whatever is measured."""

    batch: np.ndarray  # (n,) int
    cell_type: np.ndarray  # (n,) int
    shared: np.ndarray  # (n, shared) float64


def draw_true_factors(spec: SimulationSpec, cells: np.ndarray) -> TrueFactors:
    """Draw what is true of cells, (n,) ascending."""
    centres = spec.make_generator(_WEIGHTS).normal(0, 1.5, (TYPES, spec.shared))

    def draw_chunk(chunk: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        rng = spec.make_generator(_TRUTH, chunk)
        cell_type = rng.integers(TYPES, size=CHUNK_CELLS)
        noise = rng.normal(0, 0.5, (CHUNK_CELLS, spec.shared))
        return rng.integers(spec.batches, size=CHUNK_CELLS), cell_type, centres[cell_type] + noise

    return TrueFactors(*_pick_cells(draw_chunk, cells, CHUNK_CELLS))


def draw_private_factors(spec: SimulationSpec, modality: int, cells: np.ndarray) -> np.ndarray:
    """Draw the private factors of a modality, by its number; (n, private) float64."""

    def draw_chunk(chunk: int) -> tuple[np.ndarray]:
        rng = spec.make_generator(_FACTORS, modality, chunk)
        return (rng.normal(0, 1, (CHUNK_CELLS, spec.private)),)

    return _pick_cells(draw_chunk, cells, CHUNK_CELLS)[0]


def draw_measurements(spec: SimulationSpec, modality: int, cells: np.ndarray) -> np.ndarray:
    """Draw what a modality measures in cells, (n,) ascending.

    Returns:
        (n, features): counts as int32, real values as float32.
    """
    chunk_cells = max(1, CHUNK_VALUES // spec.modalities[modality][2])

    def draw_chunk(chunk: int) -> tuple[np.ndarray]:
        all_cells = np.arange(chunk * chunk_cells, (chunk + 1) * chunk_cells)
        factors = draw_true_factors(spec, all_cells)
        private = draw_private_factors(spec, modality, all_cells)
        rng = spec.make_generator(_COUNTS, modality, chunk)
        return (_measure_cells(spec, modality, factors, private, rng),)

    return _pick_cells(draw_chunk, cells, chunk_cells)[0]


def _pick_cells(
    draw_chunk: Callable[[int], tuple[np.ndarray, ...]], cells: np.ndarray, chunk_cells: int
) -> tuple[np.ndarray, ...]:
    """Draw the chunks in which cells lie, and pick the rows of these cells."""
    if not len(cells):
        return tuple(array[:0] for array in draw_chunk(0))
    chunk_of_cell = cells // chunk_cells
    picked = []
    for chunk in np.unique(chunk_of_cell).tolist():
        rows = cells[chunk_of_cell == chunk] - chunk * chunk_cells
        picked.append(tuple(array[rows] for array in draw_chunk(chunk)))
    return tuple(np.concatenate(arrays) for arrays in zip(*picked, strict=True))


@dataclass(frozen=True)
class _Weights:
    """What the features of a modality make of the factors."""

    base: np.ndarray  # (features,)
    shared: np.ndarray  # (shared, features)
    private: np.ndarray  # (private, features)
    batch: np.ndarray  # (batches, features)
    dispersion: np.ndarray  # (features,)


@lru_cache(maxsize=16)
def _draw_weights(spec: SimulationSpec, modality: int) -> _Weights:
    """Draw the weights of a modality, by its number."""
    rng, n_features = spec.make_generator(_WEIGHTS, modality), spec.modalities[modality][2]
    scale = 0.5 / np.sqrt(spec.shared + spec.private)
    return _Weights(
        base=rng.normal(0, 1.0, n_features),
        shared=rng.normal(0, 2 * scale, (spec.shared, n_features)),
        private=rng.normal(0, scale, (spec.private, n_features)),
        batch=rng.normal(0, 0.2, (spec.batches, n_features)),
        dispersion=rng.gamma(4.0, 1.0, n_features) + 0.5,
    )


def _measure_cells(
    spec: SimulationSpec,
    modality: int,
    factors: TrueFactors,
    private: np.ndarray,
    rng: np.random.Generator,
) -> np.ndarray:
    """Draw noise and depth on top of the truth, by the likelihood of the kind."""
    _, kind_name, n_features = spec.modalities[modality]
    kind = KINDS[kind_name]
    weights = _draw_weights(spec, modality)
    signal = (  # (cells, features)
        weights.base
        + factors.shared @ weights.shared
        + private @ weights.private
        + weights.batch[factors.batch]
    )
    if kind.real_values:
        return np.asarray(rng.normal(signal, 0.5), np.float32)
    depth = rng.lognormal(0.1 * factors.batch, 0.3)[:, None]  # deeper in later batches
    if kind.storage == "dense":
        # foreground and background
        mean = depth * (20 * np.exp(signal - 1) + 3 * np.exp(weights.base))
    else:
        share = np.exp(signal - signal.max(axis=1, keepdims=True))
        share /= share.sum(axis=1, keepdims=True)
        mean = share * depth * n_features * kind.simulated_mean
    if kind.likelihood != "poisson":
        # gamma and Poisson make a negative binomial
        mean = rng.gamma(weights.dispersion, mean / weights.dispersion)
    return np.asarray(rng.poisson(mean), np.int32)


@dataclass(frozen=True)
class SimulatedSource(DirectSource):
    """A simulated modality as an input of the conversion."""

    spec: SimulationSpec
    number: int  # number of the modality

    @property
    def modality(self) -> str:
        return self.spec.modalities[self.number][0]

    @property
    def dataset(self) -> str:
        return ""

    @property
    def display_name(self) -> str:
        return f"simulated {self.modality}"

    def describe_identity(self) -> dict[str, Any]:
        return {"simulated": asdict(self.spec), "modality": self.modality}

    def read_head(self) -> SourceHead:
        cells = self.spec.list_cells(self.number)
        _, kind, n_features = self.spec.modalities[self.number]
        row_entries: float = n_features
        if KINDS[kind].storage == "sparse":
            sample = draw_measurements(self.spec, self.number, cells[:16])
            row_entries = np.count_nonzero(sample) / max(len(sample), 1)
        fields = {
            field: CategoryCodes(codes.astype(np.int32), names)
            for field, (codes, names) in draw_obs(self.spec, cells).items()
        }
        return SourceHead(
            name_barcodes(cells),
            name_features(self.modality, n_features),
            int(len(cells) * row_entries),
            fields,
            list(FIELDS.values()),
        )

    def read_rows(self, start: int, stop: int, scratch: Path) -> SourceRows:
        cells = self.spec.list_cells(self.number)[start:stop]
        values = draw_measurements(self.spec, self.number, cells)
        kind = KINDS[self.spec.modalities[self.number][1]]
        return values if kind.real_values else sp.csr_matrix(values)


def name_barcodes(cells: np.ndarray) -> np.ndarray:
    """Name cells by their numbers, (n,) bytes."""
    return np.array([b"cell%09d" % cell for cell in cells.tolist()], "S13")


def name_features(modality: str, n_features: int) -> list[str]:
    """Name the features of a modality by their numbers."""
    return [f"{modality}_{i:06d}" for i in range(n_features)]


def draw_obs(spec: SimulationSpec, cells: np.ndarray) -> dict[str, tuple[np.ndarray, list[str]]]:
    """Draw batch and label of cells: the codes, (n,), and what they stand for."""
    factors = draw_true_factors(spec, cells)
    width = len(str(spec.batches - 1))  # padded, so that sorting the names keeps their order
    return {
        "batch": (factors.batch, [f"batch{i:0{width}d}" for i in range(spec.batches)]),
        "label": (factors.cell_type, [f"type{i}" for i in range(TYPES)]),
    }


def build_mudata(spec: SimulationSpec) -> Any:
    """Build the mosaic in memory, as a MuData.

    Its truth is in obsm["shared"], and in obsm["private"] of each modality.
    """
    import mudata as md
    from anndata import AnnData

    parts = {}
    for number, (name, kind, n_features) in enumerate(spec.modalities):
        cells = spec.list_cells(number)
        values = draw_measurements(spec, number, cells)
        part = AnnData(values if KINDS[kind].real_values else sp.csr_matrix(values))
        part.obs_names = name_barcodes(cells).astype(str)
        part.var_names = name_features(name, n_features)
        for field, (codes, names) in draw_obs(spec, cells).items():
            part.obs[FIELDS[field]] = np.array(names)[codes]
        part.obsm["private"] = draw_private_factors(spec, number, cells)
        parts[name] = part
    with silence_mudata():
        whole = md.MuData(parts)
    cells = np.array([int(barcode[4:]) for barcode in whole.obs_names])
    whole.obsm["shared"] = draw_true_factors(spec, cells).shared
    return whole


def write_h5mu(spec: SimulationSpec, out: Path) -> None:
    """Write a mosaic and its truth as a whole file.

    Raises:
        DataError: something is at `out` already, or its folder cannot be made.
    """
    if out.exists():
        raise DataError(
            "something is already there", where=out, fix="choose another --out, or remove it"
        )
    make_folder(out.parent)
    # mudata chooses the format by the ending
    with replace_file(out, ending=f"{TEMPORARY_ENDING}.h5mu") as temporary, silence_mudata():
        build_mudata(spec).write(temporary)


def parse_features(texts: list[str]) -> dict[str, int]:
    """Parse `["rna:2000", "adt:50"]` into the number of features of each modality.

    Raises:
        DataError: a text is not NAME:NUMBER, or a name is given twice.
    """
    features: dict[str, int] = {}
    for text in texts:
        name, _, number = text.rpartition(":")
        if not name or not number.isdecimal():
            raise DataError(
                "not NAME:FEATURES", where="--modality", got=text, expected="rna:2000, say"
            )
        if name in features:
            raise DataError("a modality is named twice", where="--modality", got=" ".join(texts))
        features[name] = int(number)
    return features
