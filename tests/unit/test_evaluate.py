"""scores.json: the right cells, both directions, the same on any number of ranks."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from clue_dist.data.assembly import read_batch
from clue_dist.errors import ConfigError
from clue_dist.inference import evaluate
from clue_dist.inference.evaluate import count_paired_cells, evaluate_store
from clue_dist.inference.score_tables import format_scores, list_warnings, select_pairs
from clue_dist.metrics import integration, matching, matching_controls
from clue_dist.neighbours.nearest import find_neighbours
from clue_dist.store.reader import Store
from tests.fakes import FakeTrainedModel
from tests.processes import run_ranks
from tests.stores import make_store

FEATURES = {"rna": 20, "adt": 6, "atac": 15}
CELLS = {"rna+adt+atac": 40, "rna+adt": 70, "rna+atac": 25, "rna": 30, "adt": 12}


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    return make_store(tmp_path_factory.mktemp("store") / "s.zarr", cells=CELLS, features=FEATURES)


def test_every_cell_that_carries_both_counts(store, tmp_path):
    loaded = FakeTrainedModel(store.manifest.modalities)
    evaluate_store(loaded, store, tmp_path / "scores.json", run="runs/a", batch_size=16)
    scores = json.loads((tmp_path / "scores.json").read_text())
    pairs = {
        "rna->adt": 110,
        "adt->rna": 110,
        "rna->atac": 65,
        "atac->rna": 65,
        "adt->atac": 40,
        "atac->adt": 40,
    }
    assert {name: entry["cells"] for name, entry in select_pairs(scores).items()} == pairs
    assert scores.keys() - pairs == {"joint", "about"}
    assert scores["about"]["fingerprint"] == store.fingerprint
    assert (scores["about"]["run"], scores["about"]["checkpoint"], scores["about"]["cells"]) == (
        "runs/a",
        "step-7",
        135,
    )

    z: dict[str, list[np.ndarray]] = {"rna": [], "adt": []}
    batch = []
    for name in ("rna+adt+atac", "rna+adt"):
        everyone = np.arange(CELLS[name])
        _, alone = loaded.model.embed_batch(read_batch(store, name, everyone))
        for m, parts in z.items():
            parts.append(alone[m].numpy())
        batch.append(store.segments[name].read_codes("batch", everyone))
    args = np.concatenate(z["rna"]), np.concatenate(z["adt"]), np.concatenate(batch)
    both, directed = matching.compute_scores(*args), matching.score_directions(*args)
    for scope in matching.SCOPES:
        assert scores["rna->adt"][scope] == pytest.approx(both[scope], abs=1e-6)
        assert scores["adt->rna"][scope] == scores["rna->adt"][scope]
        assert scores["rna->adt"]["directed"][scope] == pytest.approx(
            directed["forward"][scope], abs=1e-6
        )
        assert scores["adt->rna"]["directed"][scope] == pytest.approx(
            directed["backward"][scope], abs=1e-6
        )
    assert [p.name for p in tmp_path.iterdir()] == ["scores.json"]
    lines = format_scores(scores).splitlines()
    n_types = sum("within_type" in entry for entry in select_pairs(scores).values())
    # What is the same in both directions stands once, and each direction alone has a row.
    assert lines.index("") == 3 + 3 * len(pairs) // 2 + n_types // 2 + len(pairs)
    assert max(map(len, lines)) <= 100
    assert lines[2].split()[:3] == ["rna-adt", "global", "110"]
    assert lines[5].split()[:3] == ["rna-adt", "without_depth", "110"]
    assert lines[5].split()[4:] == ["0.5000"]
    for row, name in ((6, "rna->adt"), (7, "adt->rna")):
        foscttm = f"{scores[name]['directed']['global']['foscttm']:.4f}"
        assert lines[row].split()[:4] == [name, "global", "110", foscttm]


def sum_counts(store: Store, modality: str, *segments: str) -> np.ndarray:
    rows = [store.segments[name].read_rows(modality, np.arange(CELLS[name])) for name in segments]
    return np.concatenate(
        [
            part.sum(1)
            if isinstance(part, np.ndarray)
            else np.add.reduceat(part.values, part.indptr[:-1])
            for part in rows
        ]
    )


def test_matching_is_scored_within_types_and_without_depth(store, tmp_path):
    loaded = FakeTrainedModel(store.manifest.modalities)
    scores = evaluate_store(loaded, store, tmp_path / "s.json", run="r", batch_size=16)
    segments = ("rna+adt+atac", "rna+adt")
    parts = [embed_directly(store, name)[1] for name in segments]
    pair = [np.concatenate([part[m] for part in parts]) for m in ("rna", "adt")]
    labels = read_labels(store, *segments)
    expected = matching_controls.score_within_types(*pair, labels)
    assert expected["types"] > 1
    depths = [np.log(sum_counts(store, m, *segments)) for m in ("rna", "adt")]
    without = matching_controls.score_without_depth(*pair, np.stack(depths, axis=1))
    for name in ("rna->adt", "adt->rna"):
        assert scores[name]["within_type"] == pytest.approx(expected, abs=1e-6)
        assert scores[name]["without_depth"] == pytest.approx(without, abs=1e-6)


def test_real_values_have_no_sequencing_depth(tmp_path):
    store = make_store(
        tmp_path / "s.zarr", cells={"rna+image": 40}, features={"rna": 9, "image": 4}, labels=1
    )
    scores = evaluate_store(
        FakeTrainedModel(store.manifest.modalities), store, tmp_path / "s.json", run="r"
    )
    assert "without_depth" not in scores["rna->image"]
    assert scores["rna->image"]["within_type"]["types"] == 1


def embed_directly(store: Store, *segments: str) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """z of all cells of segments with the same modalities: joint, and by modality."""
    model = FakeTrainedModel(store.manifest.modalities).model
    parts = [
        model.embed_batch(read_batch(store, name, np.arange(CELLS[name]))) for name in segments
    ]
    names = parts[0][1].keys()
    return np.concatenate([joint.numpy() for joint, _ in parts]), {
        m: np.concatenate([alone[m].numpy() for _, alone in parts]) for m in names
    }


def read_labels(store: Store, *segments: str) -> np.ndarray:
    codes = [store.segments[name].read_codes("label", np.arange(CELLS[name])) for name in segments]
    return np.array([*store.manifest.labels, ""])[np.concatenate(codes)]


def test_every_cell_counts_for_the_joint_z_and_pairs_for_mixing(store, tmp_path, monkeypatch):
    monkeypatch.setattr(integration, "_import_scib", lambda: None)
    loaded = FakeTrainedModel(store.manifest.modalities)
    scores = evaluate_store(loaded, store, tmp_path / "s.json", run="r", batch_size=16)
    _, alone = embed_directly(store, "rna+atac")
    z, labels = {m: [alone[m]] for m in alone}, read_labels(store, "rna+adt+atac", "rna+atac")
    for m, latent in embed_directly(store, "rna+adt+atac")[1].items():
        if m in z:
            z[m].insert(0, latent)
    pair = [np.concatenate(z[m]) for m in ("rna", "atac")]
    for name in ("rna->atac", "atac->rna"):
        entry = scores[name]
        assert entry["mixing_cells"] == 65
        for measure, value in integration.score_mixing(*pair).items():
            assert entry[measure] == pytest.approx(value, abs=1e-4)
        transferred = integration.transfer_labels(*pair, labels)
        assert entry["transfer"] == pytest.approx(transferred, abs=0.01)
    joint = np.concatenate([embed_directly(store, name)[0] for name in CELLS])
    neighbours = find_neighbours(joint, 90)
    islands = integration.measure_islands(neighbours, np.repeat(list(CELLS), list(CELLS.values())))
    found = scores["joint"]
    assert (found["cells"], found["store_cells"], found["labelled_cells"]) == (177, 177, 177)
    assert found["islands"] == pytest.approx(islands, abs=1e-3)
    assert islands[found["worst_island"]] == max(islands.values())
    accuracy = integration.measure_label_accuracy(neighbours, read_labels(store, *CELLS))
    assert found["accuracy"] == pytest.approx(accuracy, abs=0.01)
    text = " ".join(format_scores(scores).split())
    assert f"rna and atac, 65 cells: mixing {scores['rna->atac']['mixing']:.4f} (0.5" in text
    assert text.count("label transfer") == 3
    assert f"{found['worst_island']} {max(islands.values()):.4f} (the worst)" in text
    assert "kBET of batches, and NMI and ARI of labels, need `pip install" in text


def test_a_store_of_one_pattern_has_no_islands(tmp_path):
    store = make_store(
        tmp_path / "s.zarr", cells={"rna+adt": 40}, features={"rna": 9, "adt": 4}, labels=1
    )
    scores = evaluate_store(
        FakeTrainedModel(store.manifest.modalities), store, tmp_path / "s.json", run="r"
    )
    assert not {"islands", "worst_island", "accuracy"} & scores["joint"].keys()
    assert "transfer" not in scores["rna->adt"]
    text = format_scores(scores)
    assert "islands" not in text
    assert "joint z, 40 of the store's 40 cells" in text


def test_cells_of_the_training_store_are_told(store, tmp_path, capsys):
    out, known = tmp_path / "s.json", store.manifest.modalities

    def score(fingerprint: str, cells: Store = store) -> dict[str, Any]:
        trained = FakeTrainedModel(known, seen_cells=frozenset({fingerprint}))
        return evaluate_store(trained, cells, out, run="r")

    for other in ("f" * 64, ""):
        scores = score(other)
        assert scores["about"]["seen_in_training"] is False
    assert capsys.readouterr().err == ""
    scores = score(store.fingerprint)
    told = capsys.readouterr().err
    assert told.startswith("warning: The model was trained on this store")
    assert "python -m data_prep split STORE" in told
    assert "trained" not in format_scores(scores)  # which stands beneath the warning
    assert json.loads(out.read_text())["about"]["seen_in_training"] is True
    grown = Store(store.root)
    notes = {"appended": [{"before": "a" * 64}, {"before": "b" * 64}]}
    grown.manifest = store.manifest.model_copy(update={"provenance": notes})
    assert score("a" * 64, grown)["about"]["seen_in_training"] is True
    assert score("c" * 64, grown)["about"]["seen_in_training"] is False


@pytest.mark.slow
def test_two_ranks_score_as_one(store, tmp_path):
    code = """
        from pathlib import Path
        from clue_dist.inference.evaluate import evaluate_store
        from clue_dist.ranks import Ranks
        from clue_dist.store.reader import Store
        from tests.fakes import FakeTrainedModel
        ranks, store = Ranks.from_environment().join_group(), Store(root)
        loaded = FakeTrainedModel(store.manifest.modalities)
        evaluate_store(loaded, store, Path(out), run="r", batch_size=16, ranks=ranks)
        ranks.leave_group()
    """
    for world in (1, 2):
        run_ranks(
            world, f"root, out = {str(store.root)!r}, {str(tmp_path / f'{world}.json')!r}", code
        )
    one, two = (
        dict(_leaves(json.loads((tmp_path / f"{world}.json").read_text()))) for world in (1, 2)
    )
    # The last bit of z depends on which cells are multiplied together, and may decide between two
    # neighbours of 110.
    numbers = {key for key, value in one.items() if isinstance(value, float)}
    assert {key: two[key] for key in numbers} == pytest.approx(
        {key: one[key] for key in numbers}, abs=0.01
    )
    assert {k: v for k, v in two.items() if k not in numbers} == {
        k: v for k, v in one.items() if k not in numbers
    }


def _leaves(tree: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(tree, dict):
        for key, value in tree.items():
            yield from _leaves(value, f"{path}/{key}")
    else:
        yield path, tree


def test_a_part_of_the_cells(store, tmp_path):
    taken = count_paired_cells(store, 50)
    assert sum(taken.values()) == 50
    assert all(0 < n <= CELLS[s] for s, n in taken.items())
    assert "rna" not in taken
    scores = evaluate_store(
        FakeTrainedModel(store.manifest.modalities),
        store,
        tmp_path / "s.json",
        run="r",
        max_cells=50,
    )
    assert scores["about"]["cells"] == 50
    assert scores["joint"]["cells"] == 50
    assert scores["joint"]["islands"].keys() == CELLS.keys()
    assert scores["rna->adt"]["mixing_cells"] == scores["rna->adt"]["cells"]
    assert scores["rna->adt"]["cells"] == taken["rna+adt"] + taken["rna+adt+atac"]
    assert sum(count_paired_cells(store, 10**9).values()) == 135


def test_neighbours_are_searched_among_an_even_part_of_a_large_store(store, tmp_path, monkeypatch):
    monkeypatch.setattr(evaluate, "MOST_SEARCHED_CELLS", 60)
    scores = evaluate_store(
        FakeTrainedModel(store.manifest.modalities), store, tmp_path / "s.json", run="r"
    )
    assert (scores["rna->adt"]["cells"], scores["rna->adt"]["mixing_cells"]) == (110, 60)
    assert (scores["joint"]["cells"], scores["joint"]["store_cells"]) == (60, 177)
    assert scores["about"]["cells"] == 135
    assert "joint z, 60 of the store's 177 cells" in format_scores(scores)


@pytest.mark.parametrize(
    ("cells", "known"),
    [({"rna": 60}, ["rna"]), ({"rna": 60, "adt": 60}, ["rna", "adt"])],
    ids=["a model of one modality", "unpaired cells"],
)
def test_without_paired_cells_the_joint_z_alone_is_scored(tmp_path, capsys, cells, known):
    features = {name: n for name, n in FEATURES.items() if name in known}
    store = make_store(tmp_path / "s.zarr", cells=cells, features=features)
    scores = evaluate_store(
        FakeTrainedModel(store.manifest.modalities), store, tmp_path / "s.json", run="r"
    )
    assert scores.keys() == {"joint", "about"}
    assert {"ilisi", "accuracy", "asw"} <= scores["joint"].keys()
    assert scores["joint"]["cells"] == sum(cells.values())
    assert ("islands" in scores["joint"]) == (len(known) > 1)
    assert json.loads((tmp_path / "s.json").read_text())["about"]["has_pairs"] is False
    assert capsys.readouterr().err.startswith("warning: matching is left out: no two modalities")
    text = format_scores(scores)
    assert text.startswith("joint z, ")
    assert "pair" not in text


def test_cells_of_an_unknown_batch_are_left_out_within_batches(store, tmp_path, monkeypatch):
    reader = type(store.segments["rna"])
    read_codes = reader.read_codes

    def hide_batches(segment, name, positions):
        codes = read_codes(segment, name, positions)
        return np.where(positions % 5 == 0, -1, codes) if name == "batch" else codes

    monkeypatch.setattr(reader, "read_codes", hide_batches)
    scores = evaluate_store(
        FakeTrainedModel(store.manifest.modalities), store, tmp_path / "s.json", run="r"
    )
    entry = scores["rna->atac"]
    assert (entry["cells"], entry["unknown_cells"], entry["within_batch"]["cells"]) == (65, 13, 52)
    lines = format_scores(scores).splitlines()
    assert sum(line.split()[:3] == ["rna-atac", "within_batch", "52"] for line in lines) == 1
    assert "matching within batches without 13 cells whose batch is unknown" in " ".join(lines)


def test_arguments_that_cannot_be(store, tmp_path):
    loaded = FakeTrainedModel(store.manifest.modalities)
    with pytest.raises(ConfigError, match="into a file"):
        evaluate_store(loaded, store, tmp_path, run="r")
    (tmp_path / "file").write_text("")
    for folder in ("file", "nowhere"):
        with pytest.raises(ConfigError, match="no such folder"):
            evaluate_store(loaded, store, tmp_path / folder / "s.json", run="r")
    for max_cells in (1, "10"):
        with pytest.raises(ConfigError, match=r"`max_cells`\n.*\n.*2 or more"):
            evaluate_store(loaded, store, tmp_path / "s.json", run="r", max_cells=max_cells)
    (tmp_path / "cells.h5ad").write_text("cells")
    with pytest.raises(ConfigError, match=r"got: \.h5ad\n  expected: \.json"):
        evaluate_store(loaded, store, tmp_path / "cells.h5ad", run="r")
    assert (tmp_path / "cells.h5ad").read_text() == "cells"


@pytest.mark.parametrize(("modalities", "is_told"), [(["rna"], False), (["rna", "adt"], True)])
def test_a_lone_modality_lies_apart_from_none(modalities, is_told):
    about = {"modalities": modalities, "common_space": False}
    assert any("no common space" in text for text in list_warnings({"about": about})) == is_told


def test_batches_of_one_cell_give_null_not_nan(tmp_path):
    store = make_store(
        tmp_path / "s.zarr", cells={"rna+adt": 2}, features={"rna": 9, "adt": 4}, batches=2, seed=2
    )
    codes = store.segments["rna+adt"].read_codes("batch", np.arange(2))
    assert codes[0] != codes[1], "the seed must put the two cells into two batches"
    evaluate_store(FakeTrainedModel(store.manifest.modalities), store, tmp_path / "s.json", run="r")
    text = (tmp_path / "s.json").read_text()
    assert "NaN" not in text
    assert json.loads(text)["rna->adt"]["within_batch"]["foscttm"] is None
