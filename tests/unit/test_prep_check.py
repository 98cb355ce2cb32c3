"""`check` finds every kind of damage, and `inspect` describes a store, on the command line too."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest

from clue_dist.errors import StoreError
from clue_dist.store.manifest import Manifest
from clue_dist.store.writer import hash_file
from data_prep import inspect
from data_prep.check import check_store
from tests.distributed.command import alone
from tests.unit.prep_helpers import convert_files, make_anndata, make_counts, write_h5mu

REPO = Path(__file__).parents[2]


@pytest.fixture
def root(tmp_path: Path) -> Path:
    rna, adt = make_counts(100, 40), make_counts(100, 8, 1, "p", density=0.9)
    parts = {
        "rna": make_anndata(rna, batch="b"),
        "adt": make_anndata(adt[20:], cell_type=["T", "B"] * 40),
    }
    convert_files(
        tmp_path / "s.zarr", str(write_h5mu(tmp_path / "in.h5mu", **parts)), block_cells=2
    )
    return tmp_path / "s.zarr"


def resign(root: Path, **changes: object) -> None:
    """Sign a manifest anew that fits files which are wrong."""
    manifest = Manifest.read(root)
    shards = {key: hash_file(root / key) for key in manifest.shards}
    manifest.model_copy(update={"shards": shards, **changes}).write(root)


def test_a_sound_store(root: Path) -> None:
    assert check_store(root) == []


def test_one_flipped_bit_in_any_shard(root: Path) -> None:
    for key in Manifest.read(root).shards:
        path = root / key
        before = path.read_bytes()
        middle = len(before) // 2
        path.write_bytes(before[:middle] + bytes([before[middle] ^ 4]) + before[middle + 1 :])
        assert check_store(root) == [f"{key}: content changed (sha256 differs)"]
        path.write_bytes(before)


def test_all_problems_are_listed(root: Path) -> None:
    keys = sorted(Manifest.read(root).shards)
    first, second, third = keys[0], keys[5], keys[-1]
    (root / first).unlink()
    (root / second).write_bytes((root / second).read_bytes()[:-1])
    size = (root / second).stat().st_size
    data = (root / third).read_bytes()
    (root / third).unlink()
    (root.parent / "elsewhere").write_bytes(data)
    (root / third).symlink_to(root.parent / "elsewhere")
    (root / "strata" / "extra").write_text("x")
    expected = {
        f"{first}: missing",
        f"{second}: {size} bytes, expected {size + 1}",
        f"{third}: a link",
        "strata/extra: not part of the store",
    }
    assert set(check_store(root)) == expected


def test_damage_that_the_hashes_know(root: Path) -> None:
    """`check` decodes every block: it finds a chunk that was broken before it was hashed."""
    key = next(k for k in Manifest.read(root).shards if "codes" in k)
    data = bytearray((root / key).read_bytes())
    data[len(data) // 3] ^= 1
    (root / key).write_bytes(bytes(data))
    resign(root)
    (problem,) = check_store(root)
    assert "missing or damaged" in problem
    assert "codes" in problem


def test_columns_outside_the_features(root: Path) -> None:
    modalities = Manifest.read(root).modalities
    short = modalities["rna"].model_copy(update={"features": modalities["rna"].features[:30]})
    resign(root, modalities={**modalities, "rna": short})
    assert any("there are 30 features" in problem for problem in check_store(root))


def test_metadata_that_does_not_fit(root: Path) -> None:
    path = root / "strata/rna/rna/codes/zarr.json"
    meta = json.loads(path.read_text())
    meta["data_type"] = "int8"
    path.write_text(json.dumps(meta))
    assert any("does not fit the manifest" in problem for problem in check_store(root))
    path.write_text("{")
    assert any("cannot be opened" in problem for problem in check_store(root))
    path.write_text("[" * 200_000 + "]" * 200_000)
    assert any("larger than it can be" in problem for problem in check_store(root))


def test_what_inspect_tells(root: Path) -> None:
    found = inspect.collect_facts(root)
    assert found["cells"] == 100
    assert {n: (s["cells"], s["paired"]) for n, s in found["strata"].items()} == {
        "rna": (20, False),
        "rna+adt": (80, True),
    }
    assert found["modalities"]["rna"]["non_zeros"] == int((make_counts(100, 40) > 0).sum().sum())
    assert found["batches"] == {"b": 100}
    assert found["labels"] == {"B": 40, "T": 40, "(unknown)": 20}
    text = inspect.format_facts(found)
    for fact in (
        "100 cells",
        "bytes per non-zero",
        "in.h5mu/mod/adt -> adt: 80 cells",
        found["fingerprint"],
        "(unknown) 20",
    ):
        assert fact in text


def command(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    return alone("-m", "data_prep", *map(str, arguments), expect=None)


def test_the_command_line(root: Path) -> None:
    assert json.loads(command("inspect", root, "--json").stdout)["cells"] == 100
    (root / "strata" / "extra").write_text("x")
    broken = command("check", root)
    assert broken.returncode == 2
    assert "the store is not sound" in broken.stderr
    assert "strata/extra" in broken.stderr
    missing = command("inspect", root.parent / "nothing.zarr")
    assert (missing.returncode, missing.stdout) == (2, "")
    assert missing.stderr.startswith("error: no store here")
    assert "Traceback" not in missing.stderr
    assert (
        command(
            "convert", "x.h5mu", "--out", root.parent / "o.zarr", "--block-cells", "0"
        ).returncode
        == 2
    )


def test_nothing_to_check(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match="no store here"):
        check_store(tmp_path)


def test_rows_that_are_not_coded_as_the_manifest_says(root: Path) -> None:
    stratum = Manifest.read(root).strata["rna+adt"]
    packed = stratum.packed | {"rna": stratum.packed["rna"].model_copy(update={"bits": 0})}
    strata = {
        **Manifest.read(root).strata,
        "rna+adt": stratum.model_copy(update={"packed": packed}),
    }
    resign(root, strata=strata, codec="fast")  # which compresses binary codes as it does others
    expected = "lengths that do not fit the codes", "beyond the last"
    assert any(words in problem for problem in check_store(root) for words in expected)


def test_metadata_and_what_the_fingerprint_leaves_out(root: Path) -> None:
    """`check` lists changes that alter no count, too."""
    group, manifest = root / "strata/rna/zarr.json", root / "manifest.json"
    sound = manifest.read_text()
    group.write_text(group.read_text().replace("{}", '{"a": 1}'))
    manifest.write_text(sound.replace("in.h5mu", "ix.h5mu"))
    (root / "strata/zarr.json").unlink()
    (root / "strata/rna/rna/rest/c/zarr.json").write_text("{}")
    assert Manifest.read(root).fingerprint == Manifest.model_validate_json(sound).fingerprint
    assert check_store(root) == [
        "manifest.json: changed after it was written, where its fingerprint does not see it",
        "strata/rna/rna/rest/c/zarr.json: not part of the store",
        f"strata/rna/zarr.json: {group.stat().st_size} bytes, expected {group.stat().st_size - 6}",
        "strata/zarr.json: missing",
    ]
    manifest.write_text(sound.replace(" ", "\t", 1))
    assert check_store(root)[0].startswith("manifest.json: changed")
