# ---
# jupyter:
#   jupytext:
#     text_representation:
#       extension: .py
#       format_name: percent
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # Tutorial
#
# Blood cells of four donors, some with RNA, some with surface proteins, some with both. We train a
# model on them, embed the cells, impute proteins, match profiles of the same cell and transfer
# cell types. It takes ten minutes on a laptop without a GPU.
#
# [`tutorial.py`](tutorial.py) is this page as a notebook. Jupyter opens it with the extension
# [jupytext](https://jupytext.readthedocs.io), as PyCharm, VS Code and Spyder do by themselves.
#
# ## The cells
#
# In a terminal, this downloads the cells (3 MB) into two files:
#
# ```
# python -m data_prep fetch --out data/pbmc
# ```

# %%
import matplotlib.pyplot as plt
import mudata
import numpy as np
import pandas as pd
import umap

import clue_dist as clue

mudata.set_options(pull_on_update=False)
train = mudata.read_h5mu("data/pbmc/train.h5mu")
test = mudata.read_h5mu("data/pbmc/test.h5mu")
train

# %% [markdown]
# 641 of the 1,441 cells in `train` have both modalities, 400 have only RNA and 400 only proteins.
# The 159 cells in `test` have both; training does not see them.
#
# Use your own cells in the same way. From two `.h5ad` files with raw counts:
#
# ```
# rna, proteins = anndata.read_h5ad("rna.h5ad"), anndata.read_h5ad("proteins.h5ad")
# train = mudata.MuData({"rna": rna, "adt": proteins})
# ```
#
# Rows with the same name are one cell. A cell may lack any modality.
#
# ## Train a model
#
# `fit` writes everything about the model into the folder `out`. It needs raw counts, and the names
# of the columns of `obs` that hold the batch and, if there is one, the cell type. Cell types serve
# for scores only; the model does not learn from them. `config="demo"` is a small model for few
# cells; leave it out for your own cells.

# %%
run = clue.fit(train, out="runs/pbmc", batch_key="batch", label_key="cell_type", config="demo")
run

# %% [markdown]
# Later, the same call loads the trained model instead of training again. So does
# `clue.load("runs/pbmc")`.
#
# ## Embed the cells
#
# `embed` writes the embedding of each cell into `test`: `test.obsm["X_clue"]` from everything that
# was observed in a cell, `test["rna"].obsm["X_clue"]` from its RNA alone. Modalities share one
# space, so we can draw each test cell twice: once by its RNA and once by its proteins.

# %%
run.embed(test)
profiles = np.vstack([test[name].obsm["X_clue"] for name in ("rna", "adt")])
plane = umap.UMAP(min_dist=0.3, random_state=0, n_jobs=1).fit_transform(profiles)


def draw_groups(panel: plt.Axes, points: np.ndarray, names: pd.Series, title: str) -> None:
    """Draw points, and colour them by their names."""
    for name, chosen in pd.Series(range(len(names))).groupby(np.asarray(names, dtype=str)):
        panel.scatter(*points[chosen].T, s=9, label=name)
    panel.set(title=title, xticks=[], yticks=[])
    panel.legend(fontsize=7, frameon=False, bbox_to_anchor=(1, 1))


cell_types = test["rna"].obs["cell_type"]
figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4), layout="constrained")
draw_groups(left, plane, pd.Series(["rna", "adt"]).repeat(len(cell_types)), "modality")
draw_groups(right, plane, pd.concat([cell_types, cell_types]), "cell type")

# %% [markdown]
# The modalities mix, and cell types separate. This is Figure 3 of the paper, for cells that the
# model has not seen. scanpy takes the same matrix: `sc.pp.neighbors(test["rna"],
# use_rep="X_clue")`.
#
# ## Impute proteins from RNA
#
# `impute` predicts a modality, here proteins from RNA alone, as if the proteins had not been
# measured. With `log1p=True` the values are logarithms of counts per 10,000, as from scanpy's
# `normalize_total` and `log1p`. These proteins were measured, so we can compare.

# %%
imputed = run.impute(test, "adt", from_=["rna"], log1p=True)
counts = test["adt"].to_df().loc[imputed.obs_names, imputed.var_names]
measured = np.log1p(counts.div(counts.sum(axis=1), axis=0) * 10_000)
correlations = imputed.to_df().corrwith(measured).sort_values(ascending=False)
correlations.head(10)

# %%
markers = {"cd3.1": "T cells", "cd14": "monocytes", "cd19": "B cells"}
places = plane[: test["rna"].n_obs]  # where the RNA profiles lie
order = test["rna"].obs_names
figure, panels = plt.subplots(2, 3, figsize=(10, 6), layout="constrained")
for values, row, panel_row in zip(
    (measured, imputed.to_df()), ("measured", "imputed from RNA"), panels, strict=True
):
    for (marker, cells), panel in zip(markers.items(), panel_row, strict=True):
        dots = panel.scatter(*places.T, s=9, c=values.loc[order, marker])
        panel.set(title=f"{marker} ({cells}), {row}", xticks=[], yticks=[])
        figure.colorbar(dots, ax=panel)

# %% [markdown]
# `impute(..., samples=50, interval=0.9)` adds draws and intervals, `batch="p1_0"` predicts the
# values that cells would have in that batch, and `out="proteins.h5ad"` writes them to a file.
#
# ## Match profiles of the same cell
#
# For each RNA profile, `match` finds the protein profile that is most likely of the same cell. The
# test cells have both, so we know the truth.

# %%
pairs = run.match(test, "rna", "adt", calibrate_on=test)
types = cell_types.astype(str).to_dict()
is_cell = pairs["cell"] == pairs["partner"]
is_type = pairs["cell"].map(types) == pairs["partner"].map(types)
print(f"of {len(pairs)} partners {is_cell.mean():.0%} are the same cell")
print(f"and {is_type.mean():.0%} are of the same type")
pairs.head()

# %% [markdown]
# `confidence` is the probability that both are one cell. It was calibrated on these cells, which
# have both modalities and are new to the model. Now we match cells without known partners: the 400
# with only RNA and the 400 with only proteins. Test cells calibrate the confidence.

# %%
is_paired = train.obsm["rna"] & train.obsm["adt"]
unpaired = train[~is_paired].copy()
partners = run.match(unpaired, "rna", "adt", calibrate_on=test)
partners.sort_values("confidence", ascending=False).head()

# %% [markdown]
# ## Transfer cell types
#
# `transfer` gives labels of a reference to other cells, here from the RNA of the training cells to
# the proteins of the test cells. Cells unlike all of the reference are called "unknown". A warning
# says that no labelled cell has proteins, so that `confidence` is that of RNA; with `train` instead
# of `train["rna"]` it is calibrated.

# %%
labels = run.transfer(train["rna"], test["adt"], "cell_type")
truth = test["adt"].obs["cell_type"].astype(str)
print(f"right: {np.mean(labels['nearest_label'].astype(str) == truth):.0%}")
pd.crosstab(truth, labels["label"].astype(str))

# %%
figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4), layout="constrained")
places = plane[test["rna"].n_obs :]  # where the protein profiles lie
draw_groups(left, places, truth, "cell type")
draw_groups(right, places, labels["label"], "transferred from RNA to proteins")

# %% [markdown]
# ## Score the model
#
# `evaluate` scores cells that the model has not seen, and `report` writes a page with these scores
# and with pictures of the run. [The glossary](glossary.md#of-scores) explains the scores.

# %%
scores = run.evaluate("data/pbmc/test.h5mu")
report = run.report(scores=scores)
print(report)

# %% [markdown]
# ## Where to read on
#
# [Answers from a model](answers.md) explains everything that these calls can do, also with cells
# of other studies. [Your data](data.md) is about files too large for memory: convert them to a
# store, which `fit` and all other calls accept in place of cells.
