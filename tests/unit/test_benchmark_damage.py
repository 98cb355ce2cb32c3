"""A dozen random damages of each kind: all found and named by `check`, none served; and what was missed is told."""

from __future__ import annotations

import argparse
import shutil
from pathlib import Path

import numpy as np
import pytest

from clue_dist.store.reader import Store
from tests.benchmarks.damage import __main__ as damage
from tests.benchmarks.damage import harm, serve
from tests.benchmarks.damage.harm import KINDS, PLACES, Kind


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return damage.store_in(tmp_path_factory.mktemp("damage"))


@pytest.fixture(scope="module")
def sound(root: Path) -> serve.Values:
    return serve.everything(Store(root))


def test_the_store_has_strata_shards_and_both_storages(root: Path) -> None:
    store = Store(root)
    assert set(store.segments) == {"rna+adt+other", "rna+adt", "rna+atac", "atac"}
    assert {m.storage for m in store.manifest.modalities.values()} == {"sparse", "dense"}
    assert all(f"strata/{name}/obs/batch/c/1/0" in store.manifest.shards for name in store.segments)


@pytest.mark.parametrize("kind", KINDS)
def test_damages_are_found_and_never_served(root: Path, sound: serve.Values, kind: Kind) -> None:
    got = damage.damaged(root, sound, kind, 12, seed=1)
    assert got["missed"] == []
    assert (got["found"], got["wrong"], got["places"]) == (12, 0, dict.fromkeys(PLACES, 3))
    assert got["refused"] >= 6  # every chunk and shard
    assert damage.checked(root) == []  # and all was put right again


def test_every_value_of_every_cell_is_compared(root: Path, sound: serve.Values) -> None:
    store = Store(root)
    for name, reader in store.segments.items():
        for what in (*reader.modalities, "batch", "label", "barcodes"):
            firsts = range(0, reader.n_cells, store.manifest.block_cells)
            assert sum(len(sound[f"{name} {first} {what}"]) for first in firsts) == reader.n_cells
    assert sum(key.endswith("rna indices") for key in sound) >= 100 // 8
    assert sum(key.endswith("adt values") for key in sound) >= 100 // 8


def test_wrong_values_are_counted(root: Path, sound: serve.Values, tmp_path: Path) -> None:
    """Two shards of equal size and sound checksums, exchanged: what only hashes tell."""
    copy = shutil.copytree(root, tmp_path / "s.zarr")
    first, second = (copy / "strata/rna+atac/obs/batch/c" / f"{i}/0" for i in (0, 1))
    one, other = first.read_bytes(), second.read_bytes()
    first.write_bytes(other)
    second.write_bytes(one)
    wrong, refused = serve.wrong_values(copy, sound)
    assert wrong > 0
    assert not refused
    assert len(damage.checked(copy)) == 2


def test_a_damaged_chunk_is_damaged_behind_a_sound_index(root: Path) -> None:
    file = "strata/rna+adt/rna/codes/c/0/0"
    n = harm.chunks_in(root, file)
    for kind in KINDS:
        content, _ = harm.in_chunk(root, file, kind, np.random.default_rng(0))
        index = content[-(harm.ENTRY * n + harm.CRC) : -harm.CRC]
        assert content[-len(index) - harm.CRC :] == harm.signed(index)
        assert len(content) == len((root / file).read_bytes())
        assert content != (root / file).read_bytes()


def test_bars_ask_for_all() -> None:
    args = argparse.Namespace(quick=False)
    record = {
        "found": 100,
        "wrong": 0,
        "damages": 100,
        "refused": 90,
        "places": dict.fromkeys(PLACES, 25),
    }
    records = [record | {"method": kind, "missed": []} for kind in KINDS]
    assert [bar["holds"] for bar in damage.bars_of(records, args)] == [True, True]
    assert [bar["holds"] for bar in damage.bars_of(records[1:], args)] == [None, None]
    bad = [records[0] | {"found": 99, "wrong": 1, "missed": ["flipped shard: x"]}, *records[1:]]
    assert [bar["holds"] for bar in damage.bars_of(bad, args)] == [False, False]
    assert "flipped shard: x" in damage.table(bad)
