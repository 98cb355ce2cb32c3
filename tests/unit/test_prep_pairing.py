"""Which cells of several files are one cell, and what is said where they are not."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp

from clue_dist.errors import DataError, StoreError
from clue_dist.process import run_main
from clue_dist.store.manifest import Manifest
from clue_dist.store.reader import Store
from data_prep import convert
from data_prep.cli.commands import main
from data_prep.conversion import join_cells, pairing, row_lists
from data_prep.conversion.pairing import format_pairing, survey_pairing
from data_prep.readers.barcode_cores import extract_cores, find_alike_cells
from tests.unit.prep_helpers import (
    assert_same_counts,
    convert_files,
    make_anndata,
    make_counts,
    read_counts,
    read_field,
    write_10x,
    write_h5ad,
    write_h5mu,
    write_mtx,
)

BASES = "ACGTACGTTGCA"


def name_cells(counts: pd.DataFrame, prefix: str = "", suffix: str = "", seed: int = 0) -> None:
    """Call cells by sequences of bases, the same in every table."""
    letters = np.random.default_rng(seed).choice(list("ACGT"), (len(counts), 14))
    counts.index = [f"{prefix}{''.join(row)}{suffix}" for row in letters]


def count_strata(store: Store) -> dict[str, int]:
    return {name: stratum.n_cells for name, stratum in store.manifest.strata.items()}


@pytest.mark.parametrize(
    ("barcode", "core"),
    [
        (BASES, BASES),
        (f"{BASES}-1", BASES),
        (f"{BASES}-1-0", BASES),
        (f"{BASES}.1", BASES),
        (f"lane1_{BASES}-1", BASES),
        (f"CAT_{BASES}_2", BASES),  # too few bases for a barcode
        (f"lane1#{BASES}-1", BASES),
        (f"lane1:{BASES}-1", f"lane1:{BASES}"),
        (f"lane1:d2:x_{BASES}-1", f"lane1:d2:{BASES}"),
        ("AACCGGTT_CCGGTTAA_TTAACCGG__s1", "AACCGGTT_CCGGTTAA_TTAACCGG"),
        ("c12-1", "c12"),
        ("lane1:c12-1-0", "lane1:c12"),
        ("plate-20231", "plate-20231"),
        ("01_92_33", "01_92_33"),
        ("-1", "-1"),
        ("", ""),
        ("né-1", "né"),
    ],
)
def test_core_of_a_barcode(barcode: str, core: str) -> None:
    given = np.array([barcode.encode()], "S40")
    assert extract_cores(given).tolist() == [core.encode()]


def test_alike_cells_have_one_core_and_no_modality_twice() -> None:
    cells = {
        f"{BASES}-1": 1,  # pairs with the next
        BASES: 2,
        f"{BASES}A-1": 1,  # two cells of the first modality: nobody knows which is meant
        f"{BASES}A-2": 1,
        f"{BASES}A": 2,
        f"{BASES}C-1": 3,  # has both already
        f"lane:{BASES}": 2,  # of another data set
    }
    barcodes = np.array([name.encode() for name in cells])
    masks = np.array(list(cells.values()))
    assert find_alike_cells(barcodes, masks).tolist() == [0, 0, 2, 3, 4, 5, 6]
    # The first modality gives the name, wherever it stands.
    assert find_alike_cells(barcodes[:2][::-1], masks[:2][::-1]).tolist() == [1, 1]
    assert find_alike_cells(np.empty(0, "S1"), np.empty(0, np.int64)).tolist() == []


@pytest.fixture
def lanes(tmp_path: Path) -> list[str]:
    """RNA and proteins of two lanes; the proteins of the second came without -1."""
    rna, adt = make_counts(80, 12), make_counts(80, 4, 1, "p")
    name_cells(rna, suffix="-1")
    name_cells(adt, suffix="-1")
    adt.index = [*adt.index[:40], *(name.removesuffix("-1") for name in adt.index[40:])]
    tables = {"rna1": rna[:40], "rna2": rna[40:], "adt1": adt[:40], "adt2": adt[40:]}
    return [
        f"{name[:3]}={write_h5ad(tmp_path / f'{name}.h5ad', table)}"
        for name, table in tables.items()
    ]


def test_a_modality_without_a_cell_is_refused(tmp_path: Path) -> None:
    tables = {"rna": make_counts(8, 12), "adt": make_counts(8, 4, 1, "p").iloc[:0]}
    typed = [f"{n}={write_h5ad(tmp_path / f'{n}.h5ad', table)}" for n, table in tables.items()]
    with pytest.raises(DataError, match="no cell has any counts in modality 'adt'"):
        convert_files(tmp_path / "s.zarr", *typed)


def test_pairs_are_told_before_anything_is_written(
    tmp_path: Path, lanes: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    store = convert_files(tmp_path / "s.zarr", *lanes)
    assert count_strata(store) == {"rna": 40, "adt": 40, "rna+adt": 40}
    said = capsys.readouterr().err
    rna, adt = (
        store.segments[name].read_metadata(np.arange(1)).barcodes[0] for name in ("rna", "adt")
    )
    assert "pairing of 120 cells:" in said
    assert "  rna+adt: 40 cells\n" in said
    assert f"  rna alone: 40 cells, such as {rna}\n" in said
    assert f"  adt alone: 40 cells, such as {adt}\n" in said
    assert "  40 more cells would pair, 100% of those that could, without what stands" in said
    assert "`--pair-barcodes core`" in said
    assert said.index("pairing of") < said.index("write:")
    convert_files(tmp_path / "t.zarr", lanes[0])
    assert "pairing" not in capsys.readouterr().err


def test_barcodes_pair_by_their_core(
    tmp_path: Path,
    lanes: list[str],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    store = convert_files(tmp_path / "s.zarr", *lanes, pairing="core")
    assert count_strata(store) == {"rna+adt": 80}
    assert "  paired by their core: 40 barcodes" in capsys.readouterr().err
    assert store.manifest.provenance["cells"]["paired_by_core"] == 40
    rna, adt = make_counts(80, 12), make_counts(80, 4, 1, "p")
    for table in (rna, adt):  # the first modality names the cells
        name_cells(table, suffix="-1")
    assert_same_counts(read_counts(store, "rna"), rna)
    assert_same_counts(read_counts(store, "adt"), adt)
    monkeypatch.setattr(row_lists, "TASK_ROWS", 13)
    monkeypatch.setattr(join_cells, "RANGE_ROWS", 20)
    pieces = convert_files(tmp_path / "t.zarr", *lanes, pairing="core")
    assert pieces.fingerprint == store.fingerprint


def test_a_sample_of_many_barcodes_estimates_what_would_pair(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    rna, adt = make_counts(400, 2), make_counts(400, 2)
    name_cells(rna, suffix="-1")
    name_cells(adt, prefix="lane1_")
    barcodes = np.array([*rna.index, *adt.index]).astype("S")
    masks = np.repeat([1, 2], 400)
    parts = [(barcodes[i::3], masks[i::3]) for i in range(3)]
    exact = survey_pairing(parts, 800)
    assert (exact.n_cells, exact.n_alike, exact.is_estimate) == ({1: 400, 2: 400}, 400, False)
    monkeypatch.setattr(pairing, "SAMPLE_BARCODES", 200)
    survey = survey_pairing(parts, 800)
    assert 300 < survey.n_alike < 500
    assert survey.is_estimate
    assert "  about " in "\n".join(format_pairing(survey, ["rna", "adt"], {}))


@pytest.mark.parametrize(
    ("n_shared", "n_droplets", "hints"), [(5, 0, False), (30, 0, True), (30, 5000, True)]
)
def test_few_cores_agree_by_accident(n_shared: int, n_droplets: int, hints: bool) -> None:
    """Of many droplets few pair, but all of the few cells of the other modality may."""
    rna, adt = make_counts(100 + n_droplets, 1), make_counts(100, 1)
    name_cells(rna, suffix="-1")
    name_cells(adt, seed=1)
    adt.index = [*(name.removesuffix("-1") for name in rna.index[:n_shared]), *adt.index[n_shared:]]
    barcodes = np.array([*rna.index, *adt.index]).astype("S")
    masks = np.repeat([1, 2], [len(rna), len(adt)])
    survey = survey_pairing([(barcodes, masks)], len(masks))
    assert survey.n_alike == n_shared
    said = "\n".join(format_pairing(survey, ["rna", "adt"], {"rna": "r", "adt": "a"}))
    assert (f"{n_shared} more cells would pair, 30% of those that could," in said) == hints
    assert ("`--pair-barcodes core`" in said) == hints


def test_row_numbers_are_no_barcodes(tmp_path: Path) -> None:
    rna, adt = make_counts(20, 10), make_counts(18, 4, 1, "p")
    rna.index, adt.index = [[str(i) for i in range(len(table))] for table in (rna, adt)]
    files = {
        "rna": write_h5ad(tmp_path / "r.h5ad", rna),
        "adt": write_h5ad(tmp_path / "a.h5ad", adt),
    }
    given = [f"{name}={file}" for name, file in files.items()]
    with pytest.raises(DataError, match="cells are called by numbers of rows"):
        convert_files(tmp_path / "x.zarr", *given, pairing="core")
    with pytest.raises(DataError, match="cells are called by numbers of rows") as caught:
        convert_files(tmp_path / "x.zarr", *given)
    assert "r.h5ad: 0, 1, 2 ...; a.h5ad: 0, 1, 2 ..." in str(caught.value)
    asked = convert_files(tmp_path / "a.zarr", *given, pairing="exact")
    assert count_strata(asked) == {"rna": 2, "rna+adt": 18}
    apart = convert_files(tmp_path / "b.zarr", f"a:{given[0]}", f"b:{given[1]}")
    assert count_strata(apart) == {"rna": 20, "adt": 18}
    # One file says by itself that its modalities have the same cells.
    whole = write_h5mu(tmp_path / "m.h5mu", rna=make_anndata(rna), adt=make_anndata(adt))
    assert count_strata(convert_files(tmp_path / "m.zarr", str(whole))) == {"rna": 2, "rna+adt": 18}


@pytest.mark.filterwarnings("ignore:Observation names are not unique")
def test_a_column_tells_the_data_sets_of_one_file_apart(tmp_path: Path) -> None:
    rna, adt = make_counts(40, 10), make_counts(40, 4, 1, "p")
    donors = ["d1"] * 20 + ["d2"] * 20
    for name, table in (("r", rna), ("a", adt)):
        table.index = [f"c{i % 20}" for i in range(40)]
        write_h5ad(tmp_path / f"{name}.h5ad", table, donor=donors)
    given = [f"rna={tmp_path / 'r.h5ad'}", f"adt={tmp_path / 'a.h5ad'}"]
    with pytest.raises(DataError, match="20 barcodes more than once") as caught:
        convert_files(tmp_path / "x.zarr", *given)
    assert "r.h5ad repeats barcodes" in str(caught.value)
    assert "`--dataset-key COLUMN` (donor)" in str(caught.value)
    store = convert_files(tmp_path / "s.zarr", *given, columns={"dataset": "donor"})
    assert count_strata(store) == {"rna+adt": 40}
    for name, table in (("rna", rna), ("adt", adt)):
        table.index = [f"{d}:{c}" for d, c in zip(donors, table.index, strict=True)]
        assert_same_counts(read_counts(store, name), table)
    with pytest.raises(DataError, match="no input has the dataset column"):
        convert_files(tmp_path / "y.zarr", *given, columns={"dataset": "lane"})


def run_command(monkeypatch: pytest.MonkeyPatch, *words: str) -> int:
    """Exit code of `python -m data_prep`."""
    monkeypatch.setattr(sys, "argv", ["data_prep", *words])
    with pytest.raises(SystemExit) as ended:
        run_main(main)
    return int(ended.value.code)  # type: ignore[arg-type]


def test_no_batches_where_none_are_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A column called batch may be left from something else."""
    monkeypatch.chdir(tmp_path)
    numbers = ["0", "1"] * 10
    write_h5ad(tmp_path / "r.h5ad", make_counts(20, 10), batch=numbers, cell_type="T")
    write_h5ad(tmp_path / "a.h5ad", make_counts(20, 4, 1, "p"), batch=numbers[::-1])
    files = ("rna=r.h5ad", "adt=a.h5ad")
    assert run_command(monkeypatch, "convert", *files, "--out", "x.zarr") == 2
    assert "`--batch-key none`" in capsys.readouterr().err
    flags = ("--out", "s.zarr", "--batch-key", "none")
    assert run_command(monkeypatch, "convert", *files, *flags) == 0
    manifest = Manifest.read(tmp_path / "s.zarr")
    assert (manifest.batches, manifest.labels) == ([], ["T"])
    # Cells that are added later are read as the first ones were.
    write_h5ad(tmp_path / "more.h5ad", make_counts(20, 10, 5, cells="n"), batch=numbers)
    assert run_command(monkeypatch, "append", "rna=more.h5ad", "--to", "s.zarr") == 0
    assert Manifest.read(tmp_path / "s.zarr").batches == []
    assert set(read_field(Store(tmp_path / "s.zarr"), "label").values()) == {"T", None}


def test_cells_of_a_store_are_known_where_barcodes_pair_by_their_core(
    tmp_path: Path,
    lanes: list[str],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    to = str(tmp_path / "s.zarr")
    words = ("--pair-barcodes", "core")
    assert run_command(monkeypatch, "convert", lanes[0], lanes[2], "--out", to, *words) == 0
    assert run_command(monkeypatch, "append", lanes[1], lanes[3], "--to", to, *words) == 0
    assert count_strata(Store(tmp_path / "s.zarr")) == {"rna+adt": 40, "rna+adt.2": 40}
    assert run_command(monkeypatch, "append", lanes[1], "--to", to, *words) == 2
    assert "already has 40 cells of these" in capsys.readouterr().err


@pytest.mark.parametrize("form", ["csr", "csc", "dense", "10x", "mtx"])
def test_cells_of_another_modality_are_kept_of_every_droplet(
    tmp_path: Path, form: str, capsys: pytest.CaptureFixture[str]
) -> None:
    rna, atac = make_counts(10, 12), make_counts(600, 8, 1, "p")
    atac = atac.sample(frac=1, random_state=2)
    if form == "10x":
        path = write_10x(tmp_path / "raw.h5", atac, ["Peaks"] * 8)
    elif form == "mtx":
        path = write_mtx(tmp_path / "raw", atac, ["Peaks"] * 8)
    else:
        kind = {"csr": sp.csr_matrix, "csc": sp.csc_matrix, "dense": np.asarray}[form]
        path = write_h5ad(tmp_path / "raw.h5ad", atac, kind)
    given = [f"atac={path}", f"rna={write_h5ad(tmp_path / 'r.h5ad', rna)}"]
    convert_files(tmp_path / "x.zarr", *given)
    assert "warning: atac has 60 times the cells of rna" in capsys.readouterr().err
    store = convert_files(tmp_path / "s.zarr", *given, barcodes=["atac=rna"])
    assert count_strata(store) == {"atac+rna": 10}
    assert_same_counts(read_counts(store, "atac"), atac.loc[rna.index])
    assert_same_counts(read_counts(store, "rna"), rna)
    assert "warning" not in capsys.readouterr().err


def test_cells_of_a_list_are_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rna, adt = make_counts(40, 12), make_counts(40, 4, 1, "p")
    donors = ["a", "b"] * 20
    given = [
        f"lane1:rna={write_h5ad(tmp_path / 'r.h5ad', rna, donor=donors)}",
        f"lane1:adt={write_h5ad(tmp_path / 'a.h5ad', adt)}",
    ]
    listed = tmp_path / "cells.txt"
    listed.write_text("lane1:c3\nc30\nc39\nc99\n")
    flags = {"barcodes": [str(listed)], "columns": {"batch": "donor"}}
    store = convert_files(tmp_path / "s.zarr", *given, **flags)
    assert count_strata(store) == {"rna+adt": 3}
    assert read_field(store, "batch") == {"lane1:c3": "b", "lane1:c30": "a", "lane1:c39": "b"}
    # Another list is another job.
    monkeypatch.setattr(convert, "commit_store", fail_once)
    with pytest.raises(KeyboardInterrupt):
        convert_files(tmp_path / "t.zarr", *given, **flags)
    listed.write_text("c3\n")
    with pytest.raises(StoreError, match="an interrupted conversion of other inputs or options"):
        convert_files(tmp_path / "t.zarr", *given, **flags)


def fail_once(*arguments: object) -> None:
    raise KeyboardInterrupt


@pytest.mark.parametrize("form", ["fragments", "matrix"])
def test_lists_are_compared_by_core(tmp_path: Path, form: str) -> None:
    rna = make_counts(12, 6)
    name_cells(rna)
    names = [f"S1#{name}-1" for name in rna.index] + [f"S1#{BASES}-1"]
    flags: dict[str, object] = {"barcodes": ["atac=rna"]}
    if form == "fragments":
        lines = [f"chr1\t{100 * i}\t{100 * i + 50}\t{name}\t1\n" for i, name in enumerate(names)]
        path = tmp_path / "f.tsv"
        path.write_text("".join(lines))
        flags["bins"] = ["atac=1000"]
    else:
        atac = make_counts(13, 5, 1, "k")
        atac.index = names
        path = write_h5ad(tmp_path / "a.h5ad", atac)
    given = [f"rna={write_h5ad(tmp_path / 'r.h5ad', rna)}", f"atac={path}"]
    with pytest.raises(DataError, match="no barcode of the file is among those") as caught:
        convert_files(tmp_path / "x.zarr", *given, **flags)
    assert "`--pair-barcodes core`: without prefix and suffix 12 of them agree" in str(caught.value)
    store = convert_files(tmp_path / "s.zarr", *given, **flags, pairing="core")
    assert count_strata(store) == {"rna+atac": 12}
    assert set(read_counts(store, "atac").index) == set(rna.index)


def test_files_whose_data_sets_are_named_differently(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rna, adt = make_counts(30, 6), make_counts(30, 4, 1, "p")
    given = [
        f"lane1:rna={write_h5ad(tmp_path / 'r.h5ad', rna)}",
        f"adt={write_h5ad(tmp_path / 'a.h5ad', adt)}",
    ]
    convert_files(tmp_path / "s.zarr", *given)
    said = capsys.readouterr().err
    assert "  30 more cells would pair if they were of one data set (lane1:c" in said
    # Lanes that reuse few barcodes are apart because a person wants them to be.
    adt.index = [*adt.index[:5], *(f"d{i}" for i in range(25))]
    given[1] = f"lane2:adt={write_h5ad(tmp_path / 'b.h5ad', adt)}"
    convert_files(tmp_path / "t.zarr", *given)
    assert "would pair" not in capsys.readouterr().err


def test_cores_that_leave_a_doubt_are_counted(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rna, adt = make_counts(4, 6), make_counts(3, 4, 1, "p")
    rna.index = [f"{BASES}-1", f"{BASES}-2", f"{BASES}A-1", f"{BASES}C-1"]
    adt.index = [BASES, f"{BASES}A", f"{BASES}G"]  # the first is of either lane
    given = [
        f"{name}={write_h5ad(tmp_path / f'{name}.h5ad', table)}"
        for name, table in (("rna", rna), ("adt", adt))
    ]
    store = convert_files(tmp_path / "s.zarr", *given, pairing="core")
    assert count_strata(store) == {"rna": 3, "adt": 2, "rna+adt": 1}
    said = capsys.readouterr().err
    assert "  paired by their core: 1 barcode\n" in said
    assert "  left apart: 3 cells whose core" in said
