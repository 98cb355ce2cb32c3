"""The doctor says what files are, and its command converts them."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from clue_dist.errors import DataError
from clue_dist.process import run_main
from clue_dist.store.manifest import Manifest
from data_prep.cli.commands import main
from data_prep.conversion.cell_problems import RepeatedBarcodes
from data_prep.conversion.pairing import PairingSurvey
from data_prep.doctor import Rehearsal, find_command
from data_prep.readers.formats import describe_file
from data_prep.remedies import list_remedies
from data_prep.suggested_command import Command, CommandInput
from tests.unit.prep_helpers import (
    make_anndata,
    make_counts,
    write_10x,
    write_h5ad,
    write_h5mu,
    write_mtx,
)

pytestmark = pytest.mark.filterwarnings("ignore:Observation names are not unique")


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


class Shell:
    """Commands of data_prep, and what they print."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
        self.monkeypatch, self.capsys = monkeypatch, capsys

    def run_words(self, *words: str, code: int = 0) -> str:
        """Run `python -m data_prep` and return its stdout, or stderr where it fails."""
        self.monkeypatch.setattr(sys, "argv", ["data_prep", *words])
        with pytest.raises(SystemExit) as ended:
            run_main(main)
        printed = self.capsys.readouterr()
        assert ended.value.code == code, printed.err
        return printed.err if code else printed.out

    def consult_doctor(self, *files: str) -> str:
        """The command that the doctor proposes, from `convert` on and without the store."""
        command = self.run_words("doctor", *files).splitlines()[-1]
        prefix, suffix = "python -m data_prep convert ", " --out STORE.zarr"
        assert command.startswith(prefix)
        return command.removeprefix(prefix).removesuffix(suffix)

    def convert(self, words: str) -> dict[str, int]:
        """Follow the doctor's command; sizes of the strata that come of it."""
        self.run_words("convert", *shlex.split(words), "--out", "s.zarr")
        strata = Manifest.read(Path("s.zarr")).strata
        return {name: stratum.n_cells for name, stratum in strata.items()}


@pytest.fixture
def shell(here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Shell:
    return Shell(monkeypatch, capsys)


def name_cells(counts: pd.DataFrame, suffix: str = "", seed: int = 0) -> pd.DataFrame:
    letters = np.random.default_rng(seed).choice(list("ACGT"), (len(counts), 14))
    return counts.set_axis([f"{''.join(row)}{suffix}" for row in letters], axis=0)


def test_what_a_file_is_and_holds(here: Path, shell: Shell) -> None:
    write_h5ad(here / "rna.h5ad", make_counts(20, 30), donor="x")
    said = shell.run_words("doctor", "rna.h5ad")
    assert (
        "rna.h5ad: AnnData (.h5ad, .zarr)\n  matrix: 20 cells x 30, counts\n    barcodes: c0, c1"
        in said
    )
    assert "    obs columns: donor\n" in said
    assert "rna: 30 features, of kind rna" in said
    assert "batch: none; --batch-key names a column, one of donor\n" in said
    assert "label: none; --label-key names a column, one of donor\n" in said
    assert said.endswith("convert rna=rna.h5ad --out STORE.zarr\n")


def test_what_cannot_be_read_is_told_with_the_rest(here: Path, shell: Shell) -> None:
    write_h5ad(here / "rna.h5ad", make_counts(20, 30))
    (here / "text.h5ad").write_text("no HDF5")
    assert "1 of 2 files cannot be read" in shell.run_words(
        "doctor", "text.h5ad", "rna.h5ad", code=2
    )
    assert "no such input" in shell.run_words("doctor", "nothing.h5ad", code=2)


@pytest.mark.parametrize(
    ("features", "name"),
    [
        ([f"chr1_{i}00_{i}50" for i in range(8)], "atac"),
        ([f"CD{i}-ACGTACGTACGT" for i in range(8)], "adt"),
        ([f"ENSG0000000{i}" for i in range(8)], "rna"),
    ],
)
def test_modalities_are_guessed_from_features(
    here: Path, shell: Shell, features: list[str], name: str
) -> None:
    write_h5ad(here / "some.h5ad", make_counts(20, 8).set_axis(features, axis=1))
    assert shell.consult_doctor("some.h5ad") == f"{name}=some.h5ad"
    # A person may know better.
    assert shell.consult_doctor("adt=some.h5ad") == "adt=some.h5ad"
    # Counts are counts, even in a file that is called after a dense matrix.
    (here / "some.h5ad").rename("dense.h5ad")
    assert shell.consult_doctor("dense.h5ad") == f"{name}=dense.h5ad"


def test_files_that_name_their_modalities_need_no_name(here: Path, shell: Shell) -> None:
    rna, adt = make_counts(20, 8), make_counts(20, 4, 1, "p")
    write_h5mu(here / "m.h5mu", rna=make_anndata(rna), adt=make_anndata(adt))
    assert shell.consult_doctor("m.h5mu") == "m.h5mu"
    types = ["Gene Expression"] * 5 + ["Antibody Capture"] * 3
    write_10x(here / "a file.h5", rna, types)
    assert shell.consult_doctor("a file.h5") == "'a file.h5'"


def test_barcodes_without_suffix_pair(here: Path, shell: Shell) -> None:
    write_h5ad(here / "rna.h5ad", name_cells(make_counts(30, 12), "-1"))
    adt = name_cells(make_counts(30, 4, 1, "CD")).assign(unmapped=1)
    write_mtx(here / "umi_count", adt, ["Antibody Capture"] * 5)
    words = shell.consult_doctor("rna.h5ad", "umi_count")
    assert words == "rna=rna.h5ad umi_count --pair-barcodes core"
    assert shell.convert(words) == {"rna+adt": 30}


@pytest.mark.slow
def test_fragments_need_bins_and_cells(here: Path, shell: Shell) -> None:
    rna = name_cells(make_counts(10, 12))
    write_h5ad(here / "rna.h5ad", rna)
    lines = [f"chr1\t{100 * i}\t{100 * i + 50}\t{name}-1\t1\n" for i, name in enumerate(rna.index)]
    (here / "fragments.tsv").write_text("".join(lines))
    words = shell.consult_doctor("fragments.tsv", "rna.h5ad")
    assert words == (
        "rna=rna.h5ad atac=fragments.tsv --bins atac=5000 --barcodes atac=rna --pair-barcodes core"
    )
    assert shell.convert(words) == {"rna+atac": 10}


def test_every_droplet_beside_cells(here: Path, shell: Shell) -> None:
    write_h5ad(here / "rna.h5ad", make_counts(10, 12))
    write_10x(here / "raw.h5", make_counts(200, 8, 1, "chr1:5-"), ["Peaks"] * 8)
    words = shell.consult_doctor("rna.h5ad", "raw.h5")
    assert words == "rna=rna.h5ad raw.h5 --barcodes atac=rna"
    assert shell.convert(words) == {"rna+atac": 10}


def test_lanes_that_reuse_barcodes_are_kept_apart(here: Path, shell: Shell) -> None:
    """Each lane shares few barcodes with the other, and all with the proteins of its own."""
    for lane, first in (("one", 0), ("two", 25)):
        rna, adt = make_counts(60, 12, first), make_counts(60, 4, first + 1, "p")
        write_h5ad(here / f"rna_{lane}.h5ad", rna[first : first + 30])
        write_h5ad(here / f"adt_{lane}.h5ad", adt[first : first + 30])
    files = [f"{name}_{lane}.h5ad" for name in ("rna", "adt") for lane in ("two", "one")]
    words = shell.consult_doctor(*files)
    assert words == (
        "rna_two:rna=rna_two.h5ad rna_one:rna=rna_one.h5ad "
        "rna_two:adt=adt_two.h5ad rna_one:adt=adt_one.h5ad"
    )
    assert shell.convert(words) == {"rna+adt": 60}


def test_the_same_cells_twice_are_not_made_two_data_sets(here: Path, shell: Shell) -> None:
    for name in ("one", "again"):
        write_h5ad(here / f"{name}.h5ad", make_counts(60, 12))
    told = shell.run_words("doctor", "one.h5ad", "again.h5ad")
    assert "convert would stop: 60 barcodes more than once" in told
    assert "before that is mended:\npython -m data_prep convert" in told


def test_data_sets_of_one_file_are_told_apart_by_a_column(here: Path, shell: Shell) -> None:
    counts = make_counts(40, 12).set_axis([f"c{i % 20}" for i in range(40)], axis=0)
    write_h5ad(here / "rna.h5ad", counts, sex=["f", "m"] * 20, lane=["1"] * 20 + ["2"] * 20)
    assert shell.consult_doctor("rna.h5ad") == "rna=rna.h5ad --dataset-key lane"


def test_a_column_that_is_no_batch_is_left_out(here: Path, shell: Shell) -> None:
    numbers = ["0", "1"] * 10
    write_h5ad(here / "rna.h5ad", make_counts(20, 12), batch=numbers)
    write_h5ad(here / "adt.h5ad", make_counts(20, 4, 1, "p"), batch=numbers[::-1])
    said = shell.run_words("doctor", "rna.h5ad", "adt.h5ad")
    assert "--batch-key none: the modalities of 20 cells disagree on their batch" in said


@pytest.mark.parametrize(
    ("first", "second", "said", "choice"),
    [
        (slice(10), slice(2, 12), "8 are in every file, 80% of those of each", "intersection"),
        (slice(12), slice(10, 22), "2 are in every file, only 17% of those of the largest; absent "
         "ones become zero", "union"),
    ],
    ids=["most in common", "few in common"],
)  # fmt: skip
def test_files_with_other_features(
    here: Path, shell: Shell, first: slice, second: slice, said: str, choice: str
) -> None:
    counts = make_counts(40, 22)
    write_h5ad(here / "rna1.h5ad", counts.iloc[:20, first])
    write_h5ad(here / "rna2.h5ad", counts.iloc[20:, second])
    assert said in shell.run_words("doctor", "rna1.h5ad", "rna2.h5ad")
    words = shell.consult_doctor("rna1.h5ad", "rna2.h5ad")
    assert words == f"rna=rna1.h5ad rna=rna2.h5ad --features rna={choice}"
    assert shell.convert(words) == {"rna": 40}


def test_an_intersection_is_of_the_modality_that_differs(here: Path, shell: Shell) -> None:
    rna, adt = make_counts(40, 12), make_counts(40, 6, 1, "CD")
    for lane, cells in (("1", slice(0, 20)), ("2", slice(20, 40))):
        write_h5ad(here / f"rna{lane}.h5ad", rna[cells].iloc[:, : 10 + int(lane)])
        write_h5ad(here / f"adt{lane}.h5ad", adt[cells].iloc[:, int(lane) * 2 - 2 : int(lane) * 3])
    words = shell.consult_doctor("rna1.h5ad", "rna2.h5ad", "adt1.h5ad", "adt2.h5ad")
    assert words.endswith("--features rna=intersection --features adt=union")


def test_names_of_features_are_taken_from_a_column(here: Path, shell: Shell) -> None:
    counts = make_counts(40, 12)
    ids = [f"ENSG{j:011d}" for j in range(12)]
    for lane, cells, names in (("1", slice(0, 20), counts.columns), ("2", slice(20, 40), ids)):
        data = make_anndata(counts[cells].set_axis(names, axis=1))
        if lane == "1":
            data.var["gene_name"], data.var["gene_id"] = list(counts.columns), ids
        data.write_h5ad(here / f"rna{lane}.h5ad")
    words = shell.consult_doctor("rna1.h5ad", "rna2.h5ad")
    assert words == "rna=rna1.h5ad rna=rna2.h5ad --feature-ids rna=gene_id"
    assert shell.convert(words) == {"rna": 40}
    assert Manifest.read(here / "s.zarr").modalities["rna"].features == ids


@pytest.mark.parametrize("offset", [40, 2])
def test_peaks_that_differ_are_counted_in_bins(here: Path, shell: Shell, offset: int) -> None:
    """The files share some peaks, or none."""
    peaks = [f"chr1:{1000 * i}-{1000 * i + 500}" for i in range(60)]
    counts = make_counts(40, 40).set_axis(peaks[:40], axis=1)
    write_h5ad(here / "one.h5ad", counts[:20])
    write_h5ad(
        here / "two.h5ad",
        counts[20:].set_axis(
            peaks[offset:][:20] + [f"chr1:{1000 * i + 7}-{1000 * i + 400}" for i in range(20)],
            axis=1,
        ),
    )
    words = shell.consult_doctor("one.h5ad", "two.h5ad")
    assert words == "atac=one.h5ad atac=two.h5ad --bins atac=5000"
    assert shell.convert(words) == {"atac": 40}


def test_features_that_repeat_are_no_cells_that_repeat(here: Path, shell: Shell) -> None:
    """The message speaks of what occurs more than once, too, but no data set would mend it."""
    counts = make_counts(20, 4).set_axis(["a", "b", "a", "c"], axis=1)
    write_h5ad(here / "rna.h5ad", counts, donor=["x", "y"] * 10)
    error = DataError("2 feature names occur more than once", where="rna.h5ad")
    files = {0: describe_file(here / "rna.h5ad")}
    command = Command((CommandInput(0, "rna.h5ad", "rna"),))
    assert list(list_remedies(command, files, error)) == []


def test_each_command_is_rehearsed_once(here: Path) -> None:
    counts = make_counts(20, 4)
    write_h5ad(here / "rna.h5ad", counts, donor=["x", "y"] * 10, lane=["1"] * 20)
    rehearsed = []

    def rehearse(command: Command) -> Rehearsal:
        rehearsed.append(tuple(command.words))
        if ("--dataset-key", "lane") in command.flags:
            return Rehearsal([], PairingSurvey({1: 20}, {}, 0, (), False), ["rna"])
        n_left = 4 if command.flags else 9
        what = f"{n_left} barcodes occur more than once"
        raise DataError(what, where="rna", mistake=RepeatedBarcodes())

    files = {0: describe_file(here / "rna.h5ad")}
    command = Command((CommandInput(0, "rna.h5ad", "rna"),))
    diagnosis = find_command(command, files, rehearse)
    assert diagnosis.best.command.flags == (("--dataset-key", "lane"),)
    assert [words[1:] for words in rehearsed] == [
        (),
        ("--dataset-key", "donor"),
        ("--dataset-key", "lane"),
    ]


def test_what_convert_leaves_out_is_told(here: Path, shell: Shell) -> None:
    types = ["Gene Expression"] * 5 + ["CRISPR Guide Capture"] * 3
    write_10x(here / "multi.h5", make_counts(20, 8), types)
    said = shell.run_words("doctor", "multi.h5")
    hint = (
        "multi.h5: 'CRISPR Guide Capture' (3 features) is left out; "
        '`guide="multi.h5:CRISPR Guide Capture" --kind guide=adt` takes it, too\n'
    )
    assert hint in said


@pytest.mark.parametrize(("change", "holds"), [(1e-4, True), (0.01, False)])
def test_counts_that_convert_rounds_are_counts(
    here: Path, shell: Shell, change: float, holds: bool
) -> None:
    data = make_anndata(make_counts(20, 12))
    data.X.data -= np.float32(change)
    data.write_h5ad(here / "rna.h5ad")
    said = shell.run_words("doctor", "rna.h5ad")
    assert ("20 cells x 12, counts\n" in said) == holds
    assert ("convert would write" in said) == holds


def test_what_a_person_must_decide(here: Path, shell: Shell) -> None:
    for name, features in (("rna", 12), ("adt", 4)):
        counts = make_counts(20, features)
        write_h5ad(here / f"{name}.h5ad", counts.set_axis([str(i) for i in range(20)], axis=0))
    said = shell.run_words("doctor", "rna.h5ad", "adt.h5ad")
    assert "convert would stop: cells are called by numbers of rows" in said


def test_values_that_are_no_counts(here: Path, shell: Shell) -> None:
    rna, adt = make_anndata(make_counts(20, 12)), make_anndata(make_counts(20, 4, 1, "p"))
    rna.layers["counts"] = rna.X.copy()
    rna.X = rna.X * 0.3
    adt.X = adt.X * 0.3
    rna.write_h5ad("rna.h5ad")
    adt.write_h5ad("adt.h5ad")
    words = shell.consult_doctor("rna.h5ad", "adt.h5ad")
    assert words == "rna=rna.h5ad adt=adt.h5ad --layer rna=counts --kind adt=dense"
    assert shell.convert(words) == {"rna+adt": 20}


def test_values_that_a_person_must_decide_on(here: Path, shell: Shell) -> None:
    corrected = make_anndata(make_counts(20, 12))
    corrected.X = corrected.X * 0.93
    corrected.write_h5ad("rna.h5ad")
    said = shell.run_words("doctor", "rna.h5ad")
    assert "20 cells x 12, values that are not whole numbers" in said
    assert "convert would stop: counts must be raw" in said
    assert "--round" in said


def test_proteins_beside_the_matrix_are_taken(here: Path, shell: Shell) -> None:
    cite = make_anndata(make_counts(20, 12))
    cite.obsm["protein_expression"] = make_counts(20, 4, 1, "CD")
    cite.write_h5ad("cite.h5ad")
    words = shell.consult_doctor("cite.h5ad")
    assert words == "rna=cite.h5ad adt=cite.h5ad:obsm/protein_expression"
    assert shell.convert(words) == {"rna+adt": 20}


def test_a_store_is_known(here: Path, shell: Shell) -> None:
    write_h5ad(here / "rna.h5ad", make_counts(20, 12))
    shell.convert("rna=rna.h5ad")
    assert shell.run_words("doctor", "s.zarr") == "s.zarr: a store; `inspect` says what is in it\n"


def test_fragments_beside_peaks_are_left_out(here: Path, shell: Shell) -> None:
    write_10x(here / "filtered.h5", make_counts(20, 8), ["Gene Expression"] * 5 + ["Peaks"] * 3)
    (here / "fragments.tsv").write_text("chr1\t5\t90\tc1\t1\n")
    said = shell.run_words("doctor", "filtered.h5", "fragments.tsv")
    assert "fragments.tsv is left out: peaks are counted already" in said
    assert said.endswith("convert filtered.h5 --out STORE.zarr\n")


def test_kinds_of_modalities_whose_name_says_none(here: Path, shell: Shell) -> None:
    rna, adt = make_counts(20, 12), make_counts(20, 4, 1, "CD")
    write_h5mu(here / "m.h5mu", genes=make_anndata(rna), tags=make_anndata(adt))
    words = shell.consult_doctor("m.h5mu")
    assert words == "m.h5mu --kind genes=rna --kind tags=adt"
    assert shell.convert(words) == {"genes+tags": 20}
