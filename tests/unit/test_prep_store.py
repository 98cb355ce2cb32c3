"""What the writer writes, TensorStore and zarr-python read alike, for any rows in any order."""

from __future__ import annotations

import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp
import zarr
from hypothesis import given, settings
from hypothesis import strategies as st

from clue_dist.kinds import KINDS
from clue_dist.store import layout
from clue_dist.store.manifest import Manifest
from clue_dist.store.manifest_parts import Modality, Segment
from clue_dist.store.reader import Store
from clue_dist.store.rows import COUNT_BITS, CsrRows, code_rows
from clue_dist.store.writer import ShardCells, commit_store, create_store, write_shard
from tests.processes import ROOT
from tests.stores import describe_packing, slice_rows
from tests.unit.prep_helpers import make_counts, write_h5ad


def write(
    root: Path, sparse: np.ndarray, dense: np.ndarray, block: int, codec: layout.Codec
) -> Manifest:
    """Write a store of one segment, in shards of 16 blocks, from counts (n, features)."""
    n, matrix = len(sparse), sp.csr_matrix(sparse)
    csr = CsrRows(matrix.indptr.astype(np.int64), matrix.indices, matrix.data, sparse.shape[1])
    rows = {
        "rna": code_rows(csr, COUNT_BITS if sparse.max(initial=0) > 1 else 0),
        "adt": dense.astype(layout.choose_unsigned(int(dense.max(initial=0)))),
    }
    packed = {name: describe_packing(coded, block) for name, coded in rows.items()}
    features = {
        name: [f"{name}{i}" for i in range(values.shape[1])]
        for name, values in (("rna", sparse), ("adt", dense))
    }
    manifest = Manifest(
        block_cells=block,
        codec=codec,
        modalities={
            n: Modality(kind=n, storage=KINDS[n].storage, features=features[n]) for n in features
        },
        batches=["b0", "b1"],
        labels=[],
        strata={
            "rna+adt": Segment(
                modalities=["rna", "adt"],
                n_cells=n,
                shard_blocks=16,
                barcode_width=8,
                packed=packed,
                batch_counts={},
                label_counts={},
            )
        },
        shards={},
    )
    create_store(root / "new", manifest)
    shards = {}
    for shard in range(-(-n // (16 * block))):
        part = slice(shard * 16 * block, (shard + 1) * 16 * block)
        names = np.array([f"é{i}".encode() for i in range(n)])[part]
        cells = ShardCells(
            {name: slice_rows(coded, part) for name, coded in rows.items()},
            (np.arange(n) % 3 - 1).astype(np.int32)[part],
            np.full(n, -1, np.int32)[part],
            names,
        )
        shards |= write_shard(root / "new", manifest, "rna+adt", shard, cells)
    return commit_store(
        root / "new", root / "s.zarr", manifest.model_copy(update={"shards": shards})
    )


def oracle(root: Path, manifest: Manifest, n_features: int) -> np.ndarray:
    """Decode the sparse modality with zarr-python and plain NumPy alone, (n, features)."""
    group = zarr.open_group(root / "strata/rna+adt", mode="r")
    lengths, codes, rest = (group[f"rna/{name}"][:] for name in ("lengths", "codes", "rest"))
    bits = manifest.strata["rna+adt"].packed["rna"].bits
    out = np.zeros((len(lengths) * manifest.block_cells, n_features), np.int64)
    for block in range(len(lengths)):
        left, more = codes[block].tolist(), rest[block].tolist()
        for row, (n, far, high) in enumerate(lengths[block].tolist()):
            row_codes, left, far_gaps, more = left[:n], left[n:], more[:far], more[far:]
            between, high_counts, more = more[:high], more[high : 2 * high], more[2 * high :]
            gaps = [code >> bits for code in row_codes]
            counts = [code % 2**bits for code in row_codes]
            columns = np.cumsum(
                [far_gaps.pop(0) if gap == 2 ** (8 - bits) - 1 else gap for gap in gaps]
            )
            high_places = np.cumsum(between).tolist()
            marked = [i for i, count in enumerate(counts) if count == 2**bits - 1]
            assert bits == 0 or marked == high_places
            for i, count in zip(high_places, high_counts, strict=True):
                counts[i] = count
            out[block * manifest.block_cells + row, columns.astype(int)] = np.array(counts, int) + 1
    return out[: manifest.n_cells]


@settings(max_examples=25, deadline=None)
@given(
    n=st.integers(1, 90),
    features=st.sampled_from([1, 7, 300, 70_000]),
    block=st.sampled_from([1, 2, 3, 8, 64]),
    largest=st.sampled_from([1, 2, 256, 257, 70_000]),
    density=st.sampled_from([0.0, 0.01, 0.5, 1.0]),
    codec=st.sampled_from(["balanced", "fast", "small"]),
    seed=st.integers(0, 2**32 - 1),
)
def test_rows_at_any_positions(
    n: int, features: int, block: int, largest: int, density: float, codec: layout.Codec, seed: int
) -> None:
    rng = np.random.default_rng(seed)
    density = min(density, 2000 / features)  # keeps an example small
    sparse = rng.integers(1, largest + 1, (n, features)) * (rng.random((n, features)) < density)
    dense = rng.integers(0, largest + 1, (n, 5))
    with tempfile.TemporaryDirectory() as folder:
        manifest = write(Path(folder), sparse, dense, block, codec)
        store = Store(Path(folder) / "s.zarr")
        reader = store.segments["rna+adt"]
        positions = rng.integers(n, size=rng.integers(1, 2 * n + 1))
        rows = reader.read_rows("rna", positions)
        assert isinstance(rows, CsrRows)
        np.testing.assert_array_equal(rows.to_scipy().toarray(), sparse[positions])
        assert rows.to_scipy().has_sorted_indices
        np.testing.assert_array_equal(reader.read_rows("adt", positions), dense[positions])
        obs = reader.read_metadata(positions)
        assert obs.barcodes.tolist() == [f"é{p}" for p in positions]
        np.testing.assert_array_equal(obs.batch, positions % 3 - 1)
        np.testing.assert_array_equal(oracle(store.root, manifest, features), sparse)
        np.testing.assert_array_equal(
            zarr.open_array(store.root / "strata/rna+adt/adt/values")[:].reshape(-1, 5)[:n], dense
        )


@pytest.mark.parametrize(
    ("codec", "counts", "binary"),
    [("balanced", "lz4", "zstd"), ("fast", "lz4", "lz4"), ("small", "zstd", "zstd")],
)
def test_codec_of_gaps(tmp_path: Path, codec: layout.Codec, counts: str, binary: str) -> None:
    x, adt = np.array([[0, 3, 0, 1], [1, 0, 0, 2]]), np.ones((2, 3), int)
    for name, matrix, expected in (("counts", x, counts), ("binary", x.clip(max=1), binary)):
        write(tmp_path / name, matrix, adt, 2, codec)
        on_disk = zarr.open_array(tmp_path / name / "s.zarr/strata/rna+adt/rna/codes")
        assert on_disk.compressors[0].cname.value == expected


def test_writing_a_shard_again_gives_the_same_bytes(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    sparse, dense = rng.poisson(0.5, (50, 30)), rng.poisson(5, (50, 4))
    one, two = (write(tmp_path / name, sparse, dense, 4, "fast") for name in "ab")
    assert one.fingerprint == two.fingerprint
    assert len(one.shards) == 7


def test_all_zero_chunks_are_on_disk(tmp_path: Path) -> None:
    """A chunk that is left out would look like one that was lost."""
    manifest = write(tmp_path, np.zeros((40, 5), int), np.zeros((40, 3), int), 2, "fast")
    for key in manifest.shards:
        assert (tmp_path / "s.zarr" / key).stat().st_size > 0
    np.testing.assert_array_equal(
        Store(tmp_path / "s.zarr").segments["rna+adt"].read_rows("adt", np.arange(40)),
        np.zeros((40, 3)),
    )


def test_zarr_python_would_write_the_same_metadata(tmp_path: Path) -> None:
    manifest = write(tmp_path, np.eye(40, 5, dtype=int), np.ones((40, 3), int), 2, "balanced")
    for spec in manifest.specify_arrays("rna+adt"):
        item_bytes = np.dtype(spec.dtype).itemsize
        blosc = zarr.codecs.BloscCodec(
            cname=spec.compressor,
            clevel=5,
            shuffle="shuffle" if item_bytes > 1 else "noshuffle",
            typesize=item_bytes,
            blocksize=0,
        )
        zarr.create_array(
            store=str(tmp_path / "by-zarr"),
            name=spec.path,
            shape=spec.shape,
            chunks=spec.chunk,
            shards=spec.shard,
            dtype=spec.dtype,
            compressors=[blosc, zarr.codecs.Crc32cCodec()],
            fill_value=0,
        )
    written = {path: (tmp_path / "s.zarr" / path).read_text() for path in manifest.metadata}
    assert written.keys() > {"zarr.json", "strata/rna+adt/rna/codes/zarr.json"}
    assert written == {path: (tmp_path / "by-zarr" / path).read_text() for path in written}


@pytest.mark.slow
def test_an_h5ad_is_converted_without_packages_that_take_long_to_start(tmp_path: Path) -> None:
    batches = pd.Categorical(["a", "b"] * 10)
    given = write_h5ad(tmp_path / "rna.h5ad", make_counts(20, 8), batch=batches)
    words = ["convert", f"rna={given}", "--out", str(tmp_path / "out.zarr"), "--batch-key", "batch"]
    code = f"""
import sys
from data_prep.cli.commands import run_command
run_command({words})
print(sorted({{"anndata", "dask", "zarr"}} & sys.modules.keys()))"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.splitlines()[-1] == "[]", done.stderr
