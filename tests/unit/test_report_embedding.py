"""The report shows what was embedded, and colours cells by what is known of them."""

from __future__ import annotations

import warnings

import anndata as ad
import mudata as md
import numpy as np
import pandas as pd
import pytest

from clue_dist.inference.report import figures, layouts, write_report
from clue_dist.inference.report.layouts import compute_umap
from clue_dist.inference.report.profiles import ALL_OBSERVED, UNKNOWN, read_profiles
from tests.unit.report_helpers import read_sections

pytestmark = pytest.mark.usefixtures("quick_pictures")


@pytest.mark.parametrize("n_cells", [1, 2])
def test_one_cell_or_two_have_a_layout(n_cells):
    points = compute_umap(np.ones((n_cells, 5)))
    assert points.shape == (n_cells, 2)
    assert len(np.unique(points, axis=0)) == n_cells


def test_labels_pass_from_one_modality_to_another(tmp_path):
    """A modality in which two types lie together confuses these two, in one direction alone."""
    draws = np.random.default_rng(0)
    labels = np.repeat(["A", "B", "C"], 40)
    corners = np.array([[1, 0, 0], [0, 1, 0], [0, 0.6, 0.8]])
    apart = np.repeat(corners, 40, axis=0) + draws.normal(scale=0.02, size=(120, 3))
    together = np.repeat(corners[[0, 1, 1]], 40, axis=0) + draws.normal(scale=0.02, size=(120, 3))
    obs = pd.DataFrame({"cell_type": labels}, index=[f"c{i}" for i in range(120)])
    parts = {
        name: ad.AnnData(obs=obs.copy(), obsm={"X_clue": z})
        for name, z in (("rna", apart), ("adt", together))
    }
    md.MuData(parts).write(tmp_path / "o.h5mu")
    alone = read_profiles(tmp_path / "o.h5mu").alone
    assert alone is not None
    first, second = layouts.list_confusions(alone)
    assert (first.queries, first.keys, first.labels) == ("rna", "adt", ["A", "B", "C"])
    assert first.counts[0] == [40, 0, 0]
    assert first.counts[1][0] == first.counts[2][0] == 0  # B or C: adt tells them apart no better
    assert second.counts[1:] == [[0, 40, 0], [0, 40, 0]]  # all lie at B of rna
    assert first.n_cells == 120
    assert second.accuracy == pytest.approx(sum(second.counts[k][k] for k in range(3)) / 120)


def test_points_can_be_coloured_by_what_tells_them_apart(embedding_file):
    embedded = read_profiles(embedding_file)
    assert embedded.joint is not None
    assert embedded.alone is not None
    titles = [c.title for c in layouts.list_colourings(embedded.joint)]
    assert titles == ["cell type", "batch", "observed"]
    modality, *_, pattern = layouts.list_colourings(embedded.alone)
    assert (modality.names, pattern.names) == (["adt", "rna"], ["rna", "rna+adt"])
    assert len(modality.codes) == 70
    cell_type, *_ = layouts.list_colourings(embedded.joint)
    assert cell_type.rest == UNKNOWN
    assert cell_type.codes.count(-1) == 10


def test_a_joint_embedding_is_called_one(logged_run, tmp_path):
    z = np.random.default_rng(0).normal(size=(30, 4))
    ad.AnnData(obs=pd.DataFrame(index=[f"c{i}" for i in range(30)]), obsm={"X_clue": z}).write_h5ad(
        tmp_path / "o.h5ad"
    )
    text = write_report(logged_run, tmp_path / "o.h5ad").read_text()
    assert "each a cell seen through everything observed in it" in text
    assert "one modality alone" not in text
    assert "confusion" not in read_sections(text)


def test_profiles_are_scaled_sampled_and_named(embedding_file):
    everything = read_profiles(embedding_file).alone
    assert len(everything.z) == 70
    np.testing.assert_allclose(np.linalg.norm(everything.z, axis=1), 1)
    assert everything.modality.tolist() == ["rna"] * 40 + ["adt"] * 30
    assert everything.batch[:3].tolist() == ["a", "b", "a"]
    assert everything.cell_type[:3].tolist() == ["T", "B", UNKNOWN]
    assert everything.pattern[:40].tolist() == ["rna+adt"] * 30 + ["rna"] * 10
    assert everything.cell[[0, 39, 40]].tolist() == [0, 39, 0]
    joint = read_profiles(embedding_file).joint
    assert set(joint.modality) == {ALL_OBSERVED}
    assert joint.pattern.tolist() == everything.pattern[:40].tolist()
    some, again, other = (read_profiles(embedding_file, most=20, seed=s).alone for s in (1, 1, 2))
    assert len(some.z) == 20
    np.testing.assert_array_equal(some.z, again.z)
    assert not np.array_equal(some.z, other.z)


def test_profiles_of_one_table_leave_out_what_was_not_observed(tmp_path):
    z = np.ones((6, 2), "f4")
    alone = z.copy()
    alone[4:] = np.nan
    table = ad.AnnData(
        obs=pd.DataFrame(index=list("abcdef")),
        obsm={"X_clue": z, "X_clue_rna": alone, "X_clue_adt": z},
    )
    table.write_h5ad(tmp_path / "o.h5ad")
    profiles = read_profiles(tmp_path / "o.h5ad").alone
    assert sorted(profiles.modality) == ["adt"] * 6 + ["rna"] * 4
    assert set(profiles.batch) == {UNKNOWN}
    assert set(read_profiles(tmp_path / "o.h5ad").joint.pattern) == {"adt+rna", "adt"}
    # The key of the variances begins alike; the file says which modalities it has.
    table.obsm["X_clue_var"] = z
    table.uns["clue_dist"] = {"modalities": ["rna", "adt"]}
    table.write_h5ad(tmp_path / "o.h5ad")
    assert set(read_profiles(tmp_path / "o.h5ad").alone.modality) == {"adt", "rna"}
    del table.obsm["X_clue_var"]
    del table.obsm["X_clue_rna"], table.obsm["X_clue_adt"]
    table.write_h5ad(tmp_path / "joint.h5ad")
    embedded = read_profiles(tmp_path / "joint.h5ad")
    assert embedded.alone is None
    assert embedded.joint.modality.tolist() == [ALL_OBSERVED] * 6


def test_legends_stay_readable():
    names = np.array(
        [f"type-{i % 60}" for i in range(6000)] + ["type-2"] * 50 + [UNKNOWN] * 9,
        dtype=object,
    )
    groups = figures.group_legend(names)
    assert len(groups) == figures.MOST_LEGEND
    assert groups.index("type-2") < groups.index("type-10")
    assert UNKNOWN not in groups
    for n in (3, 20, 36):
        assert len(set(figures.choose_colours(n))) == n
    figure = figures.draw_scatter(
        np.random.default_rng(0).normal(size=(len(names), 2)), names, "cell type"
    )
    labels = [t.get_text() for t in figure.legends[0].get_texts()]
    assert labels == [*groups, "24 others"]


@pytest.mark.parametrize(
    "label",
    ["$\\frac{1}{$", "CD4$+$ $", "_hidden", "two\nlines", "\\alpha", "{0}", "β-cell 细胞", ""],
)
def test_any_name_can_stand_in_a_picture(label):
    names = np.array([label] * 5 + ["other"] * 5, dtype=object)
    figure = figures.draw_scatter(np.random.default_rng(0).normal(size=(10, 2)), names, label)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # the font lacks some of the letters
        assert figures.render_png(figure).startswith(b"\x89PNG")
    shown = [text.get_text() for text in figure.legends[0].get_texts()]
    assert sorted(shown) == sorted([label, "other"])
