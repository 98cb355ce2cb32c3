"""Features chosen from the cells: as the published formula says, on any workers, killed or not."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp

from clue_dist.errors import DataError, StoreError
from data_prep import inspect
from data_prep.conversion import scatter
from data_prep.convert import format_conversion
from data_prep.features import selection, seurat_v3
from tests.distributed.command import KILLED
from tests.unit.prep_helpers import (
    assert_same_counts,
    convert_files,
    make_anndata,
    make_counts,
    read_counts,
    write_h5ad,
    write_h5mu,
)
from tests.unit.prep_victims import run_victim

REPO = Path(__file__).parents[2]


def cells(
    n: int = 600, genes: int = 400, seed: int = 0, batches: int = 3
) -> tuple[pd.DataFrame, np.ndarray]:
    """Counts of two cell states in batches of other depths, and the batch of each cell."""
    rng = np.random.default_rng(seed)
    batch = rng.integers(batches, size=n)
    mean = rng.lognormal(-0.5, 1.5, genes)
    fold = np.where(rng.random(genes) < 0.15, rng.lognormal(0, 1.5, genes), 1.0)
    rate = (
        mean
        * np.where(rng.random((n, 1)) < 0.3, fold, 1)
        * rng.lognormal(0.3 * batch, 0.3)[:, None]
    )
    counts = rng.poisson(rng.gamma(2, rate / 2))
    counts[np.arange(n), rng.integers(genes, size=n)] += 1
    counts[:10, ::25] += 40  # a rare state: its counts are clipped
    return pd.DataFrame(counts, [f"c{i}" for i in range(n)], [f"g{j}" for j in range(genes)]), batch


def published(counts: np.ndarray) -> np.ndarray:
    """Standardised, clipped variance of each gene in a batch: Stuart et al. 2019, step by step."""
    n, scores = len(counts), np.zeros(counts.shape[1])
    mean, variance = counts.mean(axis=0), counts.var(axis=0, ddof=1)
    varies = np.flatnonzero(variance > 0)
    x, y = np.log10(mean[varies]), np.log10(variance[varies])
    for i, gene in enumerate(varies):
        distance = np.abs(x - x[i])
        near = np.argsort(distance, kind="stable")[: int(0.3 * len(x))]
        tricube = np.clip(1 - (distance[near] / distance[near].max()) ** 3, 0, None) ** 3
        expected = np.polyval(np.polyfit(x[near] - x[i], y[near], 2, w=np.sqrt(tricube)), 0)
        deviation = np.sqrt(10**expected)
        z = np.minimum((counts[:, gene] - mean[gene]) / deviation, np.sqrt(n))
        scores[gene] = (z**2).sum() / (n - 1)
    return scores


def published_best(counts: np.ndarray, batch: np.ndarray, top: int) -> set[int]:
    """Genes among the best of most batches, then by their median rank there."""
    ranks = []
    for b in np.unique(batch):
        rank = np.empty(counts.shape[1])
        rank[np.argsort(-published(counts[batch == b]), kind="stable")] = np.arange(counts.shape[1])
        ranks.append(np.where(rank < top, rank, np.nan))
    table = pd.DataFrame(
        {"times": np.isfinite(ranks).sum(axis=0), "rank": pd.DataFrame(ranks).median(axis=0)}
    )
    return set(
        table.sort_values(["times", "rank"], ascending=[False, True], kind="stable").index[:top]
    )


def test_scores_are_those_of_the_published_formula() -> None:
    counts = cells()[0].to_numpy()
    trend = seurat_v3.fit_trend(len(counts), counts.sum(axis=0), (counts**2).sum(axis=0))
    assert trend is not None
    clipped = np.minimum(counts, trend.limits)
    assert (clipped < counts).any()
    scores = trend.score_genes(clipped.sum(axis=0), (clipped**2).sum(axis=0))
    # The regression is interpolated.
    np.testing.assert_allclose(scores, published(counts), rtol=0.03)
    assert np.median(np.abs(scores / published(counts) - 1)) < 0.001


def test_the_regression_keeps_quadratics_and_bears_ties() -> None:
    rng = np.random.default_rng(0)
    x = rng.normal(size=500)
    np.testing.assert_allclose(
        seurat_v3.smooth_by_loess(x, 3 - x + 2 * x**2), 3 - x + 2 * x**2, rtol=1e-6
    )
    y = rng.normal(size=500)
    np.testing.assert_allclose(
        seurat_v3.smooth_by_loess(np.full(500, -2.0), y), np.full(500, y.mean())
    )
    tied = np.where(np.arange(500) < 250, x.max() + 1, x)  # half of all genes have one mean
    np.testing.assert_allclose(
        seurat_v3.smooth_by_loess(tied, 5 + tied)[:250], 6 + x.max(), rtol=1e-3
    )


@pytest.mark.parametrize(
    ("form", "task"), [(sp.csr_matrix, 2000), (sp.csc_matrix, 5000), (np.asarray, 2**20)]
)
def test_the_most_variable_genes_within_batches(
    tmp_path: Path, form: object, task: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever the format and the sizes of tasks, and however the cells lie in files."""
    monkeypatch.setattr(scatter, "TASK_ENTRIES", task)
    monkeypatch.setattr(selection, "MANY_TASKS", 7)
    counts, batch = cells()
    names = np.array(["x", "y", None], object)[batch]  # no batch is a batch too
    parts = [slice(0, 250), slice(250, 600)]
    given = []
    for i, part in enumerate(parts):
        table = counts[part].iloc[:, :: 1 - 2 * i]  # the second file has its genes in reverse
        path = write_h5ad(tmp_path / f"{i}.h5ad", table, form, batch=names[part])
        given.append(f"rna={path}")
    store = convert_files(tmp_path / "s.zarr", *given, top=["rna=60"])
    kept = store.manifest.modalities["rna"].features
    wanted = published_best(counts.to_numpy(), batch, 60)
    assert len(wanted & {int(g[1:]) for g in kept}) >= 59
    assert kept == [g for g in counts.columns if g in set(kept)]
    assert_same_counts(read_counts(store, "rna"), counts[kept][counts[kept].sum(axis=1) > 0])
    assert "rna: 60 of 400 features, most variable within 3 batches" in format_conversion(
        store.manifest
    )
    assert "  rna: 60 of 400, most variable within 3 batches\n" in inspect.format_facts(
        inspect.collect_facts(tmp_path / "s.zarr")
    )
    if task == 2000:
        for workers in (1, 3):
            again = convert_files(
                tmp_path / f"{workers}.zarr", *given, top=["rna=60"], workers=workers
            )
            assert again.fingerprint == store.fingerprint


def test_batches_are_told_apart(tmp_path: Path) -> None:
    """A gene that differs between batches only is not variable within any."""
    rng, batch = np.random.default_rng(0), np.arange(300) % 2
    values = rng.poisson(rng.lognormal(0, 1.5, 200), (300, 200))
    counts = pd.DataFrame(values, [f"c{i}" for i in range(300)], [f"g{j}" for j in range(200)])
    counts["shifted"] = rng.poisson(np.where(batch, 6, 1))
    for named, is_kept in ((batch.astype(str), False), (None, True)):
        obs = {} if named is None else {"batch": named}
        path = write_h5ad(tmp_path / f"{is_kept}.h5ad", counts, **obs)
        store = convert_files(tmp_path / f"{is_kept}.zarr", f"rna={path}", top=["rna=20"])
        assert ("shifted" in store.manifest.modalities["rna"].features) == is_kept


def test_the_most_accessible_peaks(tmp_path: Path) -> None:
    """By the number of cells with any count, not by counts; ties by their order."""
    counts = make_counts(200, 50, prefix="chr1:10-")
    counts.iloc[:, 7] = 0
    counts.iloc[0, 7] = 1000
    counts["chr1:10-98"], counts["chr1:10-99"] = 1, 1
    paths = [write_h5ad(tmp_path / f"{i}.h5ad", counts[i * 120 : (i + 1) * 120]) for i in range(2)]
    store = convert_files(tmp_path / "s.zarr", *(f"atac={p}" for p in paths), top=["atac=20"])
    best = (counts > 0).sum().sort_values(ascending=False, kind="stable").index[:20]
    kept = store.manifest.modalities["atac"].features
    assert kept == [name for name in counts.columns if name in set(best)]
    assert "chr1:10-7" not in kept
    one = convert_files(tmp_path / "o.zarr", *(f"atac={p}" for p in paths), top=["atac=1"])
    assert one.manifest.modalities["atac"].features == ["chr1:10-98"]
    binned = convert_files(
        tmp_path / "b.zarr", *(f"atac={p}" for p in paths), bins=["atac=10"], top=["atac=3"]
    )
    middles = ((10 + counts.columns.str.split("-").str[1].astype(int)) // 2) // 10
    hits = (
        (counts.T.groupby(np.array(middles)).sum() > 0)
        .sum(axis=1)
        .sort_values(ascending=False, kind="stable")
    )
    expected = [f"chr1:{i * 10}-{i * 10 + 10}" for i in sorted(hits.index[:3])]
    assert binned.manifest.modalities["atac"].features == expected


def test_more_than_there_are_keeps_all(tmp_path: Path) -> None:
    rna, atac = make_counts(40, 10), make_counts(40, 10, 1, "chr1:5-")
    path = write_h5mu(tmp_path / "a.h5mu", rna=make_anndata(rna), atac=make_anndata(atac))
    plain = convert_files(tmp_path / "p.zarr", str(path))
    assert (
        convert_files(tmp_path / "s.zarr", str(path), top=["rna=99", "atac=99"]).fingerprint
        == plain.fingerprint
    )


def test_empty_cells_do_not_count(tmp_path: Path) -> None:
    """They lose the modality, so they are none of the cells that genes vary over."""
    counts, batch = cells()
    empty = pd.DataFrame(0, [f"e{i}" for i in range(900)], counts.columns)
    stores = []
    for name, more in (("without", empty[:0]), ("with", empty)):
        obs = {"batch": np.append(batch, np.zeros(len(more), int)).astype(str)}
        path = write_h5ad(tmp_path / f"{name}.h5ad", pd.concat([counts, more]), **obs)
        stores.append(convert_files(tmp_path / f"{name}.zarr", f"rna={path}", top=["rna=60"]))
    assert stores[0].manifest.modalities == stores[1].manifest.modalities


def test_few_cells_and_genes_alike(tmp_path: Path) -> None:
    """Batches of one cell and genes of one mean rank without noise; no variance is an error."""
    counts = pd.DataFrame(
        np.eye(5, 8, dtype=int) * 3, [f"c{i}" for i in range(5)], [f"g{j}" for j in range(8)]
    )
    path = write_h5ad(tmp_path / "a.h5ad", counts, batch=["b", "b", "b", "b", "alone"])
    store = convert_files(tmp_path / "s.zarr", f"rna={path}", top=["rna=3"])
    assert store.manifest.modalities["rna"].features == ["g0", "g1", "g2"]
    assert store.manifest.provenance["selected"]["rna"]["by"] == "most variable within 1 batch"
    path = write_h5ad(tmp_path / "b.h5ad", counts, batch=list("abcde"))
    with pytest.raises(DataError, match="no batch has enough cells"):
        convert_files(tmp_path / "x.zarr", f"rna={path}", top=["rna=3"])


def test_killed_while_selecting_and_run_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(scatter, "TASK_ENTRIES", 2000)
    counts, batch = cells(300, 200)
    given, out = (
        f"rna={write_h5ad(tmp_path / 'a.h5ad', counts, batch=batch.astype(str))}",
        tmp_path / "s.zarr",
    )
    options = ("--out", str(out), "--top", "rna=50")
    constants = {"data_prep.conversion.scatter.TASK_ENTRIES": 2000}
    words = ("convert", given, *options)
    ended = run_victim(*words, place="numpy.savez", n=20, constants=constants)  # of sums
    assert ended.returncode == KILLED, ended.stderr
    calls, real = [], selection._add_up_rows
    monkeypatch.setattr(
        selection, "_add_up_rows", lambda task: (calls.append(task.out.parent.name), real(task))[1]
    )
    with pytest.raises(StoreError, match="a change of features"):
        convert_files(out, given, top=["rna=51"])
    n = len(list((tmp_path / "s.zarr.partial").rglob("select/rna/sums/*.npz")))
    again = convert_files(out, given, top=["rna=50"])
    assert 5 < n < 20
    assert set(calls) == {"clip"}
    assert len(calls) < n
    assert (
        again.fingerprint == convert_files(tmp_path / "w.zarr", given, top=["rna=50"]).fingerprint
    )
