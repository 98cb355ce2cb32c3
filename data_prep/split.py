"""The rule that cuts a test set of paired cells from a mosaic; it depends on barcodes alone."""

from __future__ import annotations

import hashlib
from typing import Any

import numpy as np

TEST_PERCENT = 20  # share of the cells that carry every modality


def split_mosaic(cells: Any) -> tuple[Any, Any]:
    """Cut a MuData in two.

    Returns:
        The cells for training, and TEST_PERCENT of the cells that carry every modality. A cell that
        is in one of them is in the other in no modality.
    """
    from mudata import MuData

    barcodes = [set(part.obs_names) for part in cells.mod.values()]
    paired = set.intersection(*barcodes)
    test = {barcode for barcode in paired if _hash_to_percent(barcode) < TEST_PERCENT}
    is_test = {
        name: np.array([barcode in test for barcode in part.obs_names])
        for name, part in cells.mod.items()
    }
    train_part, test_part = (
        MuData({name: part[is_test[name] == kept].copy() for name, part in cells.mod.items()})
        for kept in (False, True)
    )
    return train_part, test_part


def _hash_to_percent(barcode: str) -> int:
    """Hash a barcode to a number from 0 to 99."""
    return int(hashlib.sha1(barcode.encode()).hexdigest(), 16) % 100
