"""Arrays of a store that hold what no conversion writes, with checksums, hashes and a fingerprint that fit."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import tensorstore as ts

from clue_dist.store import svd
from tests.benchmarks.hostile.stores import attempts, copied, sign
from tests.benchmarks.hostile.trial import Trial


def arrays(base: Path, folder: Path, number: int, rng: np.random.Generator) -> Trial:
    """Values that no conversion writes, with checksums and hashes that fit."""
    root = copied(base, folder)
    how = list(FORGED)[number % len(FORGED)]
    forge, listed = FORGED[how]
    forge(root, rng)
    sign(root)
    shutil.rmtree(root / svd.FOLDER)  # of cells that were others
    return Trial(
        f"arrays, signed again: {how}", attempts(root, None), frozenset({"check"} if listed else ())
    )


def _every(root: Path, name: str) -> Iterator[tuple[Any, np.ndarray]]:
    """Arrays of this name in all strata, open for writing, and what they hold."""
    for path in sorted(root.glob(f"strata/*/{name}")):
        request = {"driver": "zarr3", "kvstore": {"driver": "file", "path": f"{path}/"}}
        array = ts.open(
            request | {"store_data_equal_to_fill_value": True}, open=True, write=True, read=True
        ).result()
        yield array, np.asarray(array.read().result())


def _forged(name: str, change: Callable[[np.ndarray, np.random.Generator], np.ndarray]) -> Any:
    def forge(root: Path, rng: np.random.Generator) -> None:
        for array, values in _every(root, name):
            array.write(change(values.copy(), rng).astype(values.dtype)).result()

    return forge


def _all(value: Any) -> Any:
    return lambda values, rng: np.full_like(values, value)


def _some(value: Any) -> Any:
    def change(values: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        values.reshape(-1)[rng.integers(values.size, size=max(1, values.size // 50))] = value
        return values

    return change


def _drawn(values: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    high = min(int(np.iinfo(values.dtype).max), 2**62)
    return rng.integers(0, high, values.shape, endpoint=True)


def _turned(values: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    return values[..., ::-1].copy()


# What is forged, how, and whether `check` must list it (other codes may by chance be those of a sound row).
FORGED: dict[str, tuple[Any, bool]] = {
    "rows of 4 billion non-zeros": (_forged("rna/lengths", _all(2**32 - 1)), True),
    "some rows of 4 billion non-zeros": (_forged("rna/lengths", _some(2**32 - 1)), True),
    "rows of 2 billion non-zeros": (_forged("rna/lengths", _all(2**31)), True),
    "lengths at random": (_forged("rna/lengths", _drawn), True),
    "lengths turned round": (_forged("rna/lengths", _turned), True),
    "a non-zero more in some rows": (_forged("rna/lengths", _some(1000)), True),
    "rows of nothing": (_forged("rna/lengths", _all(0)), False),
    "all gaps far, all counts high": (_forged("rna/codes", _all(255)), True),
    "some gaps far": (_forged("rna/codes", _some(252)), False),
    "codes at random": (_forged("rna/codes", _drawn), True),
    "codes turned round": (_forged("rna/codes", _turned), False),
    "rests at random": (_forged("rna/rest", _drawn), False),
    "rests as large as can be": (_forged("rna/rest", _all(255)), False),
    "batches beyond the last": (_forged("obs/batch", _some(10**6)), True),
    "batches far below none": (_forged("obs/batch", _all(-(2**31))), True),
    "labels beyond the last": (_forged("obs/label", _all(2**31 - 1)), True),
    "barcodes that are no UTF-8": (_forged("obs/barcode", _all(255)), True),
    "barcodes at random": (_forged("obs/barcode", _drawn), True),
    "barcodes of nothing": (_forged("obs/barcode", _all(0)), False),
    "values that are not finite": (_forged("other/values", _some(np.nan)), True),
    "infinite values": (_forged("other/values", _all(np.inf)), True),
    "counts as large as can be": (_forged("adt/values", _all(255)), False),
}
