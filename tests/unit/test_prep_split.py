"""A store is cut in two: every cell is in one part, as it was; the parts know what they are of."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from clue_dist.errors import DataError, StoreError
from clue_dist.store.manifest import Manifest
from clue_dist.store.reader import Store
from clue_dist.store.rows import CsrRows
from clue_dist.store.seen_cells import identify_cells, share_cells
from data_prep.check import check_store
from data_prep.cli.commands import main
from data_prep.split import SplitRule, split_store
from tests.stores import make_store

CELLS = {"rna": 40, "rna+adt": 1200, "rna+atac": 90, "rna+adt.2": 70}
FEATURES = {"rna": 30, "adt": 8, "atac": 50}


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Store:
    path = tmp_path_factory.mktemp("split") / "whole.zarr"
    return make_store(path, CELLS, FEATURES, block_cells=8, batches=4)


@pytest.fixture
def cut(whole: Store, tmp_path: Path) -> Callable[..., tuple[Store, Store]]:
    """Cuts the whole, or another store, by a rule."""
    number = iter(range(9))

    def cut_store(store: Store = whole, **rule: Any) -> tuple[Store, Store]:
        outs = [tmp_path / f"{side}-{next(number)}.zarr" for side in ("train", "test")]
        split_store(str(store.root), SplitRule(**rule), *outs)
        return Store(outs[0]), Store(outs[1])

    return cut_store


def read_cells(store: Store) -> dict[str, dict[str, Any]]:
    """All that a store holds of each cell, by barcode."""
    cells: dict[str, dict[str, Any]] = {}
    for reader in store.segments.values():
        positions = np.arange(reader.n_cells)
        known = reader.read_metadata(positions)
        batches, labels = [*store.manifest.batches, None], [*store.manifest.labels, None]
        rows = {name: reader.read_rows(name, positions) for name in reader.modalities}
        dense = {
            n: r.to_scipy().toarray() if isinstance(r, CsrRows) else r for n, r in rows.items()
        }
        for i, barcode in enumerate(known.barcodes):
            assert barcode not in cells
            cells[barcode] = {"batch": batches[known.batch[i]], "label": labels[known.label[i]]}
            cells[barcode] |= {name: values[i].tolist() for name, values in dense.items()}
    return cells


@pytest.mark.parametrize("rule", [{"share": 0.3}, {"by": "batch", "test_names": ("batch-1",)}])
def test_each_cell_is_in_one_part_as_it_was(whole: Store, cut: Any, rule: dict[str, Any]) -> None:
    train, test = (read_cells(part) for part in cut(**rule))
    assert not train.keys() & test.keys()
    assert train | test == read_cells(whole)


def test_both_parts_are_sound_and_in_blocks_of_the_same_size(cut: Any) -> None:
    for part in cut(share=0.3):
        assert check_store(part.root) == []
        assert part.manifest.block_cells == 8
        assert part.manifest.n_cells == sum(part.manifest.strata[name].n_cells for name in CELLS)
        assert len({spec.n_shards for spec in part.manifest.specify_arrays("rna+adt")}) == 1
    assert part.manifest.n_cells == pytest.approx(0.3 * sum(CELLS.values()), abs=60)


def test_a_cut_by_batch_leaves_its_name_to_the_tests(cut: Any) -> None:
    train, test = cut(by="batch", test_names=("batch-1", "batch-3"))
    assert train.manifest.batches == ["batch-0", "batch-2"]
    # Codes of batches that both know would be equal, as after `--features-from`.
    assert test.manifest.batches == ["batch-0", "batch-2", "batch-1", "batch-3"]
    assert {cell["batch"] for cell in read_cells(test).values()} == {"batch-1", "batch-3"}


def test_a_segment_without_cells_leaves_its_number_to_the_next(tmp_path: Path) -> None:
    store = make_store(tmp_path / "s.zarr", {"rna": 3, "rna.2": 40}, {"rna": 9}, batches=3)
    codes = {
        name: reader.read_codes("batch", np.arange(3)) for name, reader in store.segments.items()
    }
    absent = set(codes["rna"].tolist())
    names = tuple(f"batch-{code}" for code in range(3) if code not in absent)
    if not names:
        pytest.skip("the first three cells are of three batches")
    outs = (tmp_path / "train.zarr", tmp_path / "test.zarr")
    split_store(store.root, SplitRule("batch", test_names=names), *outs)
    assert list(Manifest.read(outs[0]).strata) == ["rna", "rna.2"]
    assert list(Manifest.read(outs[1]).strata) == ["rna"]


def test_the_barcode_decides_on_which_side_a_cell_falls(whole: Store, cut: Any) -> None:
    first, again, other = (read_cells(cut(share=0.3, seed=seed)[1]) for seed in (0, 0, 1))
    assert first == again != other
    smaller = read_cells(cut(share=0.1)[1])
    assert smaller.keys() < first.keys()


def test_parts_of_a_store_that_grew_share_no_cells(whole: Store) -> None:
    """The whole notes what it was before cells were appended, and both parts keep its notes."""
    manifest = whole.manifest
    before = "b" * 64
    grown = manifest.model_copy(
        update={"provenance": manifest.provenance | {"appended": [{"before": before}]}}
    )
    names = identify_cells(grown)
    assert before in names
    train, test = (
        identify_cells(
            grown.model_copy(
                update={
                    "fingerprint": side * 16,
                    "shards": {},
                    "provenance": grown.provenance
                    | {"parts": [{"whole": names, "rule": "r", "side": side}]},
                }
            )
        )
        for side in ("train", "test")
    )
    assert not share_cells(train, test)
    assert share_cells(train, names)
    assert share_cells(test, [before])


def test_a_part_is_unseen_only_where_the_other_part_of_the_same_cut_was_trained_on(
    whole: Store, cut: Any
) -> None:
    train, test = cut(share=0.3)
    nested_train, nested_test = cut(train, share=0.5)
    other_test = cut(share=0.3, seed=1)[1]
    stores = [whole, train, test, nested_train, nested_test, other_test]
    names = [identify_cells(store.manifest) for store in stores]
    share = [[share_cells(a, b) for b in names] for a in names]
    assert share == [
        [True] * 6,
        [True, True, False, True, True, True],
        [True, False, True, False, False, True],
        [True, True, False, True, False, True],
        [True, True, False, False, True, True],
        [True] * 6,
    ]


def test_a_model_of_both_parts_has_seen_every_cell(cut: Any) -> None:
    train, test = cut(share=0.3)
    seen = [name for part in (train, test) for name in identify_cells(part.manifest)]
    inner = cut(test, share=0.5)[1]
    assert share_cells(identify_cells(inner.manifest), seen)


def test_the_column_that_gave_the_batches_stands_for_them(cut: Any, tmp_path: Path) -> None:
    store = make_store(tmp_path / "named.zarr", {"rna+adt": 60}, batches=2)
    manifest = store.manifest.model_copy(update={"provenance": {"columns": {"batch": "donor"}}})
    manifest.write(store.root)
    by_column, by_word = (
        cut(Store(store.root), by=name, test_names=("batch-1",))[1] for name in ("donor", "batch")
    )
    assert {cell["batch"] for cell in read_cells(by_column).values()} == {"batch-1"}
    # Both are one cut, of which a model that was trained on the other part has seen no cell.
    assert by_column.manifest.provenance["parts"] == by_word.manifest.provenance["parts"]


def test_a_store_that_was_cut_for_nothing_is_refused(
    whole: Store, cut: Any, tmp_path: Path
) -> None:
    for rule, what in (
        ({"by": "batch", "test_names": ("batch-9",)}, "no such batch"),
        ({"by": "kit", "test_names": ("a",)}, "cannot be cut by this"),
        ({"by": "batch", "test_names": tuple(whole.manifest.batches)}, "would have no cells"),
        ({"share": 1e-9}, "would have no cells"),
    ):
        with pytest.raises(DataError, match=what):
            cut(**rule)
    assert not list(tmp_path.iterdir())
    with pytest.raises(StoreError, match="already there"):
        split_store(whole.root, SplitRule(), tmp_path / "train.zarr", whole.root)


def test_the_command_says_what_both_parts_hold(
    whole: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    outs = ["--out-train", str(tmp_path / "train.zarr"), "--out-test", str(tmp_path / "test.zarr")]
    words = ["split", str(whole.root), "--by", "batch", "--test", "batch-0", *outs]
    monkeypatch.setattr("sys.argv", ["data_prep", *words])
    main()
    train, test = (Manifest.read(tmp_path / f"{side}.zarr") for side in ("train", "test"))
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith(f"{tmp_path}/train.zarr: {train.n_cells:,} cells")
    assert lines[1].startswith(f"{tmp_path}/test.zarr: {test.n_cells:,} cells")
    monkeypatch.setattr("sys.argv", ["data_prep", "split", str(whole.root), "--by", "batch", *outs])
    with pytest.raises(DataError, match="which cells"):
        main()
