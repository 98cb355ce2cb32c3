"""The commands of docs/published.md run as they stand, on small files of the public format."""

from __future__ import annotations

import gzip
import json
import re
import shlex
import subprocess
from pathlib import Path

import anndata as ad
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp
from scipy.io import mmwrite

from tests.distributed.command import FAST, ROOT, environment, spawned

PAGE = (ROOT / "docs/published.md").read_text()
BLOCKS = dict(re.findall(r'^```\w+ title="([^"]+)"\n(.*?)^```', PAGE, re.MULTILINE | re.DOTALL))
GEO = "GSE194122_openproblems_neurips2021_{}_BMMC_processed.h5ad"
# As small as a training can be: the page is tested, not the model.
SMALL = (
    *(
        "model.latent=4",
        "model.trunk.hidden=8",
        "model.trunk.projection=5",
        "model.trunk.members=1",
    ),
    *("data.batch_size=64", "train.epochs=2", *FAST),
)


def draw_counts(kinds: np.ndarray, width: int, mean: float, seed: int) -> sp.csr_matrix:
    rng = np.random.default_rng(seed)
    profiles = rng.gamma(0.5, 2 * mean, (kinds.max() + 1, width))
    return sp.csr_matrix(rng.poisson(profiles[kinds] + 0.02).astype(np.float32))


def write_bone_marrow(folder: Path, name: str, other: str) -> None:
    """A file as GSE194122 has them: normalised values in X, counts in a layer."""
    batches = np.repeat(["s1d1", "s1d2", "s2d1", "s3d6", "s3d10", "s4d8"], 80)
    kinds = np.arange(len(batches)) % 3
    widths, means = {"GEX": 60, other: 25}, {"GEX": 2.0, "ADT": 5.0, "ATAC": 0.8}
    counts = [draw_counts(kinds, n, means[m], i) for i, (m, n) in enumerate(widths.items())]
    whole = sp.hstack(counts).tocsr()
    cells = ad.AnnData(sp.csr_matrix(np.log1p(whole.toarray() / 3)), layers={"counts": whole})
    cells.obs_names = [f"CELL{i}-1-{batch}" for i, batch in enumerate(batches)]
    peaks = {"ATAC": [f"chr{1 + i % 3}-{i}00-{i}99" for i in range(25)]}
    cells.var_names = [f"GENE{i}" for i in range(60)] + peaks.get(
        other, [f"CD{i}" for i in range(25)]
    )
    cells.var["feature_types"] = pd.Categorical(np.repeat(list(widths), list(widths.values())))
    cells.obs["batch"] = pd.Categorical(batches)
    cells.obs["Site"] = pd.Categorical([f"site{batch[1]}" for batch in batches])
    cells.obs["cell_type"] = pd.Categorical(np.array(["B", "NK", "T"])[kinds])
    cells.write_h5ad(folder / GEO.format(name))


def write_skin(folder: Path) -> None:
    """Files as GSE140203 has them: a dense table of genes, and of peaks a matrix beside lists."""
    n_cells, kinds = 320, np.arange(320) % 3
    names = [f"R1.{i:03d}.R2.01.R3.06.P1.{53 + i % 4}" for i in range(n_cells)]
    rna = draw_counts(kinds, 60, 2, 0).T.toarray().astype(int)
    columns = [",".join(re.findall(r"[A-Z]\d\.\d+", name)) for name in names]
    genes = [f"Gene{i}" for i in range(60)]
    table = pd.DataFrame(rna, index=pd.Index(genes, name="gene"), columns=columns)
    # The table has cells that have no type, in an order of its own.
    table = table[table.columns[::-1]].assign(**{"R1.999,R2.01,R3.06,P1.53": 1})
    table.to_csv(folder / "GSM4156608_skin.late.anagen.rna.counts.txt.gz", sep="\t")
    skin = folder / "GSM4156597_skin.late.anagen"
    with gzip.open(f"{skin}.counts.txt.gz", "wb") as file:
        mmwrite(file, draw_counts(kinds, 25, 1, 1).T.astype(int))
    pd.Series(names).to_csv(f"{skin}.barcodes.txt.gz", index=False, header=False)
    peaks = pd.DataFrame([(f"chr{1 + i % 3}", 100 * i, 100 * i + 99) for i in range(25)])
    peaks.to_csv(f"{skin}.peaks.bed.gz", sep="\t", index=False, header=False)
    others = [name.replace(".P1.", ".P1.0") for name in names]
    labels = np.array(["TAC-1", "IRS", "Medulla"])[kinds]
    types = pd.DataFrame({"atac.bc": others, "rna.bc": names, "celltype": labels})
    types.to_csv(folder / "GSM4156597_skin_celltype.txt.gz", sep="\t", index=False)


def follow_page(folder: Path, title: str) -> dict[str, dict]:
    """Run a block of commands in a folder that has `launch` and `configs`; the scores."""
    for name in ("launch", "configs"):
        (folder / name).symlink_to(ROOT / name)
    for script in ("cut.py", "share_seq.py"):
        (folder / script).write_text(BLOCKS[script])
    for line in BLOCKS[title].splitlines():
        done = subprocess.run(
            shorten_command(shlex.split(line)),
            cwd=folder,
            env=environment() | {"PYTHONPATH": str(ROOT)},
            capture_output=True,
            text=True,
            timeout=400,
        )
        assert done.returncode == 0, f"{line}\n{done.stdout[-2000:]}\n{done.stderr[-2000:]}"
    return json.loads((folder / "scores.json").read_text())


def shorten_command(words: list[str]) -> list[str]:
    """The same command, quicker to start, with few steps and few cells drawn."""
    program, *others = words
    if program == "python":
        return spawned(1, *others, *(["80"] if others == ["share_seq.py"] else []))
    assert program == "deepspeed"
    return spawned(1, *others, *SMALL)


def test_every_command_of_the_page_is_one_that_is_run_here() -> None:
    assert BLOCKS.keys() == {"cut.py", "share_seq.py", "multiome", "cite", "share", "site4"}
    assert PAGE.count("\n```") == 2 * len(BLOCKS)


@pytest.mark.slow
@pytest.mark.parametrize(("title", "other"), [("multiome", "ATAC"), ("cite", "ADT")])
def test_bone_marrow_is_scored_on_the_batch_whose_cells_were_not_paired(
    tmp_path: Path, title: str, other: str
) -> None:
    write_bone_marrow(tmp_path, title, other)
    scores = follow_page(tmp_path, title)
    pair = scores[f"rna->{other.lower()}"]
    assert pair["cells"] == 80
    assert 0 < pair["global"]["foscttm"] < 1  # chance or better would be luck after few steps
    assert pair["within_type"]["types"] == 3
    model = json.loads((tmp_path / "runs/mosaic/model.json").read_text())
    assert len(model["batches"]) == 2


@pytest.mark.slow
def test_mouse_skin_is_read_from_its_five_files(tmp_path: Path) -> None:
    write_skin(tmp_path)
    scores = follow_page(tmp_path, "share")
    assert scores["rna->atac"]["cells"] == 80
    assert 0 < scores["rna->atac"]["global"]["foscttm"] < 1
    cells = ad.read_h5ad(tmp_path / "share.h5ad")
    assert cells.obs["part"].value_counts().to_dict() == {"none": 160, "paired": 80, "unpaired": 80}
    assert set(cells.obs["batch"]) == {"53", "54", "55", "56"}


@pytest.mark.slow
def test_the_papers_split_trains_on_three_sites_and_tests_on_the_fourth(tmp_path: Path) -> None:
    write_bone_marrow(tmp_path, "cite", "ADT")
    scores = follow_page(tmp_path, "site4")
    assert scores["rna->adt"]["cells"] == 80
    assert scores["about"]["seen_in_training"] is False
    assert ad.read_h5ad(tmp_path / "train.h5ad").n_obs == 400
