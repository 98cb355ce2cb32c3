"""A small real data set for the demo: PBMC CITE-seq of four donors (Hao et al. 2021), a mosaic of RNA and ADT.

It travels in the MIT-licensed wheel of PyPI's `scmidas`; one file is taken out and nothing is installed.
"""

from __future__ import annotations

import hashlib
import subprocess
import sys
import tempfile
import warnings
import zipfile
from pathlib import Path
from typing import Any

import numpy as np

from clue_dist.errors import DataError
from data_prep import simulate
from data_prep.jobs.whole_files import make_folder
from data_prep.options import FIELDS

WHEEL = "scmidas==0.3.0"
WHEEL_SHA256 = "24df81372decc6d3edf6c2481d7b0c58f4685386d2ac938564946916f1bd9522"
MEMBER = "scmidas/data/quickstart_pbmc_mosaic.h5mu"
TEST_SHARE = 20  # percent of the paired cells, chosen by their barcodes alone
SIMULATED = simulate.SimulationSpec(
    (("rna", "rna", 500), ("adt", "adt", 224)), cells=1600, batches=4
)


def fetch_cells(out: Path, simulated: bool = False) -> None:
    """Write `train.h5mu` (mosaic) and `test.h5mu` (paired) to `out`; what is there already stays.

    Raises:
        DataError: no network, not the file that was expected, or `out` cannot be a folder.
    """
    wanted = [out / "train.h5mu", out / "test.h5mu"]
    if all(path.exists() for path in wanted):
        print(f"{out}: already there")
        return
    make_folder(out)
    with tempfile.TemporaryDirectory(dir=out) as folder, warnings.catch_warnings():
        warnings.simplefilter(
            "ignore", FutureWarning
        )  # mudata announces its next defaults at every call
        whole = simulate.build_mudata(SIMULATED) if simulated else _download(Path(folder))
        for path, part in zip(wanted, split_mosaic(whole), strict=True):
            temporary = Path(folder) / path.name
            part.write(temporary)
            temporary.rename(path)
            print(
                f"{path}: "
                + ", ".join(f"{name} {m.n_obs} x {m.n_vars}" for name, m in part.mod.items())
            )


def split_mosaic(whole: Any) -> tuple[Any, Any]:
    """Cut a MuData into (train, test): test gets TEST_SHARE percent of the cells that carry every modality."""
    from mudata import MuData

    names = [set(part.obs_names) for part in whole.mod.values()]
    test = {name for name in set.intersection(*names) if _percentile(name) < TEST_SHARE}
    chosen = {
        name: np.array([barcode in test for barcode in part.obs_names])
        for name, part in whole.mod.items()
    }
    return tuple(
        MuData({name: part[chosen[name] == kept].copy() for name, part in whole.mod.items()})
        for kept in (False, True)
    )  # type: ignore[return-value]


def _percentile(barcode: str) -> int:
    return int(hashlib.sha1(barcode.encode()).hexdigest(), 16) % 100


def _download(folder: Path) -> Any:
    import mudata

    command = [
        sys.executable,
        "-m",
        "pip",
        "download",
        "--no-deps",
        "--no-binary=:none:",
        "--quiet",
        "--timeout=20",
        "--retries=1",
    ]
    done = subprocess.run(
        [*command, "--dest", str(folder), WHEEL], capture_output=True, text=True, check=False
    )
    wheels = list(folder.glob("*.whl"))
    if done.returncode or len(wheels) != 1:
        last = [line for line in done.stderr.splitlines() if "ERROR" in line][-1:] or [
            "no wheel came"
        ]
        raise DataError(
            f"cannot download {WHEEL} ({last[0].strip()}): offline? "
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
    with zipfile.ZipFile(wheels[0]) as wheel:
        whole = mudata.read(wheel.extract(MEMBER, folder))
    for part in whole.mod.values():
        part.obs = part.obs.rename(columns={"celltype": FIELDS["label"]})
    return whole
