"""A small real data set for the demo: PBMC CITE-seq of four donors (Hao et al. 2021).

It travels in the MIT-licensed wheel of PyPI's `scmidas`; one file is taken out and nothing is
installed. The cells are a mosaic of RNA and ADT.
"""

from __future__ import annotations

import hashlib
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import Any

import numpy as np

from clue_dist.errors import DataError
from clue_dist.files import TEMPORARY_ENDING, replace_file
from clue_dist.process import silence_mudata
from data_prep import simulate
from data_prep.jobs.whole_folders import make_folder
from data_prep.options import FIELDS

TEST_PERCENT = 20  # share of the cells that carry every modality, for the test set
WHEEL = "scmidas==0.3.0"
WHEEL_SHA256 = "24df81372decc6d3edf6c2481d7b0c58f4685386d2ac938564946916f1bd9522"
MEMBER = "scmidas/data/quickstart_pbmc_mosaic.h5mu"
SIMULATED = simulate.SimulationSpec(
    (("rna", "rna", 500), ("adt", "adt", 224)), cells=1600, batches=4
)


def fetch_cells(folder: Path, simulated: bool = False) -> None:
    """Write `train.h5mu` (mosaic) and `test.h5mu` (paired); what is there already stays.

    Args:
        folder: gets the two files.
        simulated: whether the cells are simulated, which needs no network.

    Raises:
        DataError: there is no network, or another file than expected came; `folder` cannot be made.
    """
    files = [folder / "train.h5mu", folder / "test.h5mu"]
    if all(file.exists() for file in files):
        print(f"{folder}: already there")
        return
    make_folder(folder)
    with tempfile.TemporaryDirectory(dir=folder) as name, silence_mudata():
        cells = simulate.build_mudata(SIMULATED) if simulated else _download_cells(Path(name))
        for file, part in zip(files, split_mosaic(cells), strict=True):
            with replace_file(file, ending=f"{TEMPORARY_ENDING}.h5mu") as temporary:
                part.write(temporary)
            shapes = [f"{name} {data.n_obs} x {data.n_vars}" for name, data in part.mod.items()]
            print(f"{file}: {', '.join(shapes)}")


def _download_cells(folder: Path) -> Any:
    """Download the wheel and read the cells in it."""
    # A configuration of pip that refuses wheels does not count here.
    options = "--no-deps --no-binary=:none: --quiet --timeout=20 --retries=1"
    command = [sys.executable, "-m", "pip", "download", *options.split(), "--dest", str(folder)]
    pip = subprocess.run([*command, WHEEL], capture_output=True, text=True, check=False)
    wheels = list(folder.glob("*.whl"))
    if pip.returncode or len(wheels) != 1:
        errors = [line.strip() for line in pip.stderr.splitlines() if "ERROR" in line]
        reason = errors[-1] if errors else "no wheel came"
        raise DataError(
            f"cannot download {WHEEL} ({reason}): offline? "
            "`--simulate` (make demo SIMULATE=1) writes simulated cells"
        )
    digest = hashlib.sha256(wheels[0].read_bytes()).hexdigest()
    if digest != WHEEL_SHA256:
        raise DataError(
            "the download is not the expected wheel",
            where=wheels[0].name,
            got=digest,
            expected=WHEEL_SHA256,
        )
    import mudata

    with zipfile.ZipFile(wheels[0]) as wheel:
        cells = mudata.read(wheel.extract(MEMBER, folder))
    for part in cells.mod.values():
        part.obs = part.obs.rename(columns={"celltype": FIELDS["label"]})
    return cells


def split_mosaic(cells: Any) -> tuple[Any, Any]:
    """Cut a MuData in two; on which side a paired cell falls depends on its barcode alone.

    Returns:
        The cells for training, and TEST_PERCENT of the cells that carry every modality. A cell that
        is in one of them is in the other in no modality.
    """
    import mudata

    barcodes = [set(part.obs_names) for part in cells.mod.values()]
    paired = set.intersection(*barcodes)
    test = {barcode for barcode in paired if _hash_to_percent(barcode) < TEST_PERCENT}
    is_test = {
        name: np.array([barcode in test for barcode in part.obs_names])
        for name, part in cells.mod.items()
    }
    train_part, test_part = (
        mudata.MuData(
            {name: part[is_test[name] == kept].copy() for name, part in cells.mod.items()}
        )
        for kept in (False, True)
    )
    return train_part, test_part


def _hash_to_percent(barcode: str) -> int:
    """Hash a barcode to a number from 0 to 99."""
    return int(hashlib.sha1(barcode.encode()).hexdigest(), 16) % 100
