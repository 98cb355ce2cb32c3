"""Some random damages of each kind: all found and named by `check`, none served."""

import shutil
from pathlib import Path

import numpy as np
import pytest

from clue_dist.store.reader import Store
from tests import damages, served_values
from tests.benchmarks.damage import __main__ as damage
from tests.benchmarks.damage.__main__ import DamageBenchmark
from tests.damages import KINDS, PLACES

CELLS = {"rna": slice(0, 60), "adt": slice(0, 40), "other": slice(0, 20), "atac": slice(40, 84)}
SIZES = {"rna+adt+other": 20, "rna+adt": 20, "rna+atac": 20, "atac": 24}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return served_values.make_small_store(tmp_path_factory.mktemp("damage"), CELLS, 10)


@pytest.fixture(scope="module")
def sound(root: Path) -> served_values.Values:
    return served_values.read_everything(Store(root))


def test_the_store_has_strata_shards_and_both_storages(root: Path) -> None:
    store = Store(root)
    assert {name: reader.n_cells for name, reader in store.segments.items()} == SIZES
    assert {m.storage for m in store.manifest.modalities.values()} == {"sparse", "dense"}
    shards = store.manifest.shards
    assert all(f"strata/{name}/obs/batch/c/0/0" in shards for name in store.segments)


@pytest.mark.parametrize("kind", KINDS)
def test_damages_are_found_and_never_served(
    root: Path, sound: served_values.Values, kind: str
) -> None:
    found = damage.try_damages(root, sound, kind, 4, seed=1)
    assert found["missed"] == []
    assert (found["found"], found["wrong"]) == (4, 0)
    assert found["places"] == dict.fromkeys(PLACES, 1)
    assert found["refused"] >= 2  # every chunk and shard
    assert damage.list_problems(root) == []  # and all was put right again


def test_every_value_of_every_cell_is_compared(root: Path, sound: served_values.Values) -> None:
    store = Store(root)
    for name, reader in store.segments.items():
        for what in (*reader.modalities, "batch", "label", "barcodes"):
            firsts = range(0, reader.n_cells, store.manifest.block_cells)
            assert sum(len(sound[f"{name} {first} {what}"]) for first in firsts) == reader.n_cells
    assert sum(key.endswith("rna indices") for key in sound) >= 20 // 8
    assert sum(key.endswith("adt values") for key in sound) >= 20 // 8


def test_wrong_values_are_counted(root: Path, sound: served_values.Values, tmp_path: Path) -> None:
    """Two shards of equal size and sound checksums, exchanged: what only hashes tell."""
    copy = shutil.copytree(root, tmp_path / "s.zarr")
    first, second = (copy / f"strata/{name}/obs/batch/c/0/0" for name in ("rna+adt", "rna+atac"))
    one, other = first.read_bytes(), second.read_bytes()
    first.write_bytes(other)
    second.write_bytes(one)
    wrong, refused = served_values.count_wrong_values(copy, sound)
    assert wrong > 0
    assert not refused
    assert len(damage.list_problems(copy)) == 2


def test_a_damaged_chunk_is_damaged_behind_a_sound_index(root: Path) -> None:
    file = "strata/rna+adt/rna/codes/c/0/0"
    sound, n = (root / file).read_bytes(), damages.count_chunks(root, file)
    for kind in KINDS:
        content, _ = damages.harm_chunk(sound, n, kind, np.random.default_rng(0))
        index = content[-(damages.ENTRY * n + damages.CRC) : -damages.CRC]
        assert content[-len(index) - damages.CRC :] == damages.sign_index(index)
        assert len(content) == len(sound)
        assert content != sound


def test_bars_ask_for_all() -> None:
    plan = DamageBenchmark(["--json", "x.json"])
    counts = {"found": 100, "wrong": 0, "damages": 100, "refused": 90, "missed": []}
    records = [counts | {"method": kind, "data_set": "mosaic"} for kind in KINDS]
    assert [bar["holds"] for bar in plan.judge(records)] == [True, True]
    assert plan.bars["found"].bar == len(KINDS) * damage.DAMAGES
    assert [bar["holds"] for bar in plan.judge(records[1:])] == [None, None]
    bad = [records[0] | {"found": 99, "wrong": 1, "missed": ["flipped shard: x"]}, *records[1:]]
    assert [bar["holds"] for bar in plan.judge(bad)] == [False, False]
    assert "flipped shard: x" in plan.tabulate(bad)
