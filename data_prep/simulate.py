"""Simulated mosaics with known truth, made row by row: any size, and a cell is the same however it is asked for.

A cell has a type, a batch, shared factors that every modality sees and private factors of each modality. All are
drawn per fixed piece of cells from a generator keyed by (seed, what, piece), so a range of rows needs no others.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import scipy.sparse as sp

from clue_dist.errors import DataError
from clue_dist.files import replace_file
from clue_dist.kinds import KINDS, infer_kind
from data_prep.jobs.whole_files import make_folder
from data_prep.options import require_known_modalities
from data_prep.readers.source import CategoryCodes, DirectSource, Source, SourceHead, SourceRows

CHUNK_CELLS = 1024  # cells whose truth is drawn together
CHUNK_VALUES = 2**20  # values of a modality drawn together: bounds memory, however many features
TYPES = 8
_TRUTH, _FACTORS, _COUNTS, _WEIGHTS = range(4)  # what a generator is for


@dataclass(frozen=True)
class SimulationSpec:
    """A mosaic. The first `paired` share of cells carries every modality, the others one each, in equal parts."""

    modalities: tuple[tuple[str, str, int], ...]  # name, kind, features
    cells: int = 2000
    paired: float = 0.5
    batches: int = 2
    shared: int = 8
    private: int = 4
    seed: int = 0

    @classmethod
    def from_features(
        cls, features: dict[str, int], kinds: dict[str, str], **sizes: Any
    ) -> SimulationSpec:
        """A spec of named modalities; kinds from their names, or as given.

        Raises:
            DataError: a size that makes no sense, a modality of unknown kind, or a kind of no modality.
        """
        require_known_modalities("--kind", kinds, features)
        spec = cls(
            tuple((name, infer_kind(name, kinds), n) for name, n in features.items()), **sizes
        )
        counted = {"cells": spec.cells, "batches": spec.batches, "shared": spec.shared, **features}
        for name, value in counted.items():
            if value < 1:
                raise DataError(
                    "a size must be positive", where=name, got=value, expected="1 or more"
                )
        if not 0 <= spec.paired <= 1 or spec.private < 0 or spec.seed < 0:
            raise DataError(
                "a simulation that cannot be",
                got=f"paired {spec.paired}, private {spec.private}, seed {spec.seed}",
                expected="paired from 0 to 1, private and seed 0 or more",
            )
        return spec

    def build_sources(self) -> list[Source]:
        """One source per modality, for `convert`."""
        return [SimulatedSource(self, m) for m in range(len(self.modalities))]

    def list_cells(self, m: int) -> np.ndarray:
        """The cells that carry modality `m`, ascending. (n,) int64."""
        both = round(self.cells * self.paired) if len(self.modalities) > 1 else self.cells
        alone = np.linspace(both, self.cells, len(self.modalities) + 1).astype(np.int64)
        return np.concatenate([np.arange(both), np.arange(alone[m], alone[m + 1])])

    def make_generator(self, *what: int) -> np.random.Generator:
        return np.random.default_rng([self.seed, *what])


@dataclass(frozen=True)
class TrueFactors:
    """batch, cell_type: (n,) int; shared: (n, shared) float64."""

    batch: np.ndarray
    cell_type: np.ndarray
    shared: np.ndarray


def draw_true_factors(spec: SimulationSpec, cells: np.ndarray) -> TrueFactors:
    """What is true of `cells`, (n,) ascending."""
    centres = spec.make_generator(_WEIGHTS).normal(0, 1.5, (TYPES, spec.shared))

    def piece(p: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        rng = spec.make_generator(_TRUTH, p)
        cell_type = rng.integers(TYPES, size=CHUNK_CELLS)
        noise = rng.normal(0, 0.5, (CHUNK_CELLS, spec.shared))
        return rng.integers(spec.batches, size=CHUNK_CELLS), cell_type, centres[cell_type] + noise

    return TrueFactors(*_gather(piece, cells, CHUNK_CELLS))


def draw_private_factors(spec: SimulationSpec, m: int, cells: np.ndarray) -> np.ndarray:
    """Private factors of modality `m`, (n, private) float64."""
    return _gather(
        lambda p: (spec.make_generator(_FACTORS, m, p).normal(0, 1, (CHUNK_CELLS, spec.private)),),
        cells,
        CHUNK_CELLS,
    )[0]


def draw_measurements(spec: SimulationSpec, m: int, cells: np.ndarray) -> np.ndarray:
    """What modality `m` measures in `cells`: (n, features), counts as int32 or, for a dense kind, float32."""
    size = max(1, CHUNK_VALUES // spec.modalities[m][2])

    def piece(p: int) -> tuple[np.ndarray]:
        every = np.arange(p * size, (p + 1) * size)
        return (
            _draw(
                spec,
                m,
                draw_true_factors(spec, every),
                draw_private_factors(spec, m, every),
                spec.make_generator(_COUNTS, m, p),
            ),
        )

    return _gather(piece, cells, size)[0]


def _gather(
    piece: Callable[[int], tuple[np.ndarray, ...]], cells: np.ndarray, size: int
) -> tuple[np.ndarray, ...]:
    """Rows of pieces of `size` cells each, put together for `cells`; only the pieces they lie in are made."""
    if not len(cells):
        return tuple(part[:0] for part in piece(0))
    made = [
        tuple(part[cells[cells // size == p] - p * size] for part in piece(int(p)))
        for p in np.unique(cells // size)
    ]
    return tuple(np.concatenate(parts) for parts in zip(*made, strict=True))


@dataclass(frozen=True)
class _Weights:
    """base: (features,); shared, private: (factors, features); batch: (batches, features); dispersion: (features,)."""

    base: np.ndarray
    shared: np.ndarray
    private: np.ndarray
    batch: np.ndarray
    dispersion: np.ndarray


@lru_cache(maxsize=16)
def _weights(spec: SimulationSpec, m: int) -> _Weights:
    rng, n = spec.make_generator(_WEIGHTS, m), spec.modalities[m][2]
    scale = 0.5 / np.sqrt(spec.shared + spec.private)
    return _Weights(
        base=rng.normal(0, 1.0, n),
        shared=rng.normal(0, 2 * scale, (spec.shared, n)),
        private=rng.normal(0, scale, (spec.private, n)),
        batch=rng.normal(0, 0.2, (spec.batches, n)),
        dispersion=rng.gamma(4.0, 1.0, n) + 0.5,
    )


def _draw(
    spec: SimulationSpec, m: int, t: TrueFactors, own: np.ndarray, rng: np.random.Generator
) -> np.ndarray:
    """Noise and depth on top of the truth; one likelihood per kind."""
    kind, n = KINDS[spec.modalities[m][1]], spec.modalities[m][2]
    w = _weights(spec, m)
    signal = w.base + t.shared @ w.shared + own @ w.private + w.batch[t.batch]  # (cells, features)
    if kind.real_values:
        return np.asarray(rng.normal(signal, 0.5), np.float32)
    depth = rng.lognormal(0.1 * t.batch, 0.3)[:, None]  # deeper in later batches
    if kind.storage == "dense":
        mean = depth * (20 * np.exp(signal - 1) + 3 * np.exp(w.base))  # foreground and background
    else:
        share = np.exp(signal - signal.max(axis=1, keepdims=True))
        mean = share / share.sum(axis=1, keepdims=True) * depth * n * kind.simulated_mean
    if kind.likelihood != "poisson":
        mean = rng.gamma(
            w.dispersion, mean / w.dispersion
        )  # gamma and Poisson make a negative binomial
    return np.asarray(rng.poisson(mean), np.int32)


@dataclass(frozen=True)
class SimulatedSource(DirectSource):
    """A simulated modality as an input of the conversion."""

    spec: SimulationSpec
    m: int

    @property
    def modality(self) -> str:
        return self.spec.modalities[self.m][0]

    @property
    def dataset(self) -> str:
        return ""

    @property
    def display_name(self) -> str:
        return f"simulated {self.modality}"

    def describe_identity(self) -> dict[str, Any]:
        return {"simulated": asdict(self.spec), "modality": self.modality}

    def read_head(self) -> SourceHead:
        cells, (_, kind, n) = self.spec.list_cells(self.m), self.spec.modalities[self.m]
        sample = draw_measurements(self.spec, self.m, cells[:16])
        nnz = int(
            len(cells)
            * (
                n
                if KINDS[kind].storage == "dense"
                else np.count_nonzero(sample) / max(len(sample), 1)
            )
        )
        fields = {
            f: CategoryCodes(codes.astype(np.int32), names)
            for f, (codes, names) in draw_obs(self.spec, cells).items()
        }
        return SourceHead(
            name_barcodes(cells),
            name_features(self.modality, n),
            nnz,
            fields,
            ["batch", "cell_type"],
        )

    def read_rows(self, start: int, stop: int, scratch: Path) -> SourceRows:
        values = draw_measurements(self.spec, self.m, self.spec.list_cells(self.m)[start:stop])
        kind = KINDS[self.spec.modalities[self.m][1]]
        return values if kind.real_values else sp.csr_matrix(values)


def name_barcodes(cells: np.ndarray) -> np.ndarray:
    return np.array([b"cell%09d" % c for c in cells.tolist()], "S13")


def name_features(modality: str, n: int) -> list[str]:
    return [f"{modality}_{i:06d}" for i in range(n)]


def draw_obs(spec: SimulationSpec, cells: np.ndarray) -> dict[str, tuple[np.ndarray, list[str]]]:
    """Codes and names of batch and label."""
    t = draw_true_factors(spec, cells)
    width = len(str(spec.batches - 1))  # padded, so that sorting the names keeps their order
    return {
        "batch": (t.batch, [f"batch{i:0{width}d}" for i in range(spec.batches)]),
        "label": (t.cell_type, [f"type{i}" for i in range(TYPES)]),
    }


def build_mudata(spec: SimulationSpec) -> Any:
    """The whole mosaic in memory, with the truth: obsm["shared"], and obsm["private"] of each modality."""
    import mudata as md
    from anndata import AnnData

    parts = {}
    for m, (name, kind, n) in enumerate(spec.modalities):
        cells = spec.list_cells(m)
        values = draw_measurements(spec, m, cells)
        part = AnnData(values if KINDS[kind].real_values else sp.csr_matrix(values))
        part.obs_names, part.var_names = name_barcodes(cells).astype(str), name_features(name, n)
        for column, (codes, names) in zip(
            ("batch", "cell_type"), draw_obs(spec, cells).values(), strict=True
        ):
            part.obs[column] = np.array(names)[codes]
        part.obsm["private"] = draw_private_factors(spec, m, cells)
        parts[name] = part
    with warnings.catch_warnings():
        warnings.simplefilter(
            "ignore", FutureWarning
        )  # mudata announces its next defaults at every call
        whole = md.MuData(parts)
    whole.obsm["shared"] = draw_true_factors(
        spec, np.array([int(b[4:]) for b in whole.obs_names])
    ).shared
    return whole


def write_h5mu(spec: SimulationSpec, out: Path) -> None:
    """Write a mosaic and its truth; under a temporary name first."""
    if out.exists():
        raise DataError(
            "something is already there", where=out, fix="choose another --out, or remove it"
        )
    make_folder(out.parent)
    with replace_file(out, ending=".tmp.h5mu") as temporary, warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        build_mudata(spec).write(temporary)


def parse_features(texts: list[str]) -> dict[str, int]:
    """`["rna:2000", "adt:50"]` -> features of each modality.

    Raises:
        DataError: not NAME:NUMBER, or a name given twice.
    """
    pairs = [text.rpartition(":") for text in texts]
    for text, (name, _, n) in zip(texts, pairs, strict=True):
        if not name or not n.isdecimal():
            raise DataError(
                "not NAME:FEATURES", where="--modality", got=text, expected="rna:2000, say"
            )
    if len({name for name, _, _ in pairs}) < len(pairs):
        raise DataError("a modality is named twice", where="--modality", got=" ".join(texts))
    return {name: int(n) for name, _, n in pairs}
