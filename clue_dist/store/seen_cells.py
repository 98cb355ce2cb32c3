"""What tells whether two stores hold the same cells, without a look at the cells themselves."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator

from clue_dist.store.manifest import Manifest
from clue_dist.store.provenance import Provenance


def identify_cells(manifest: Manifest) -> list[str]:
    """List what identifies the cells of a store; two stores with the same cells share some of it.

    Args:
        manifest: that of the store.

    Returns:
        SHA-256 in hexadecimal: the fingerprint, those that the store had before cells were
        appended, and a digest of each modality of each segment. The digests stay when cells are
        appended, and where the features of another modality are others.
    """
    appended = Provenance.model_validate(manifest.provenance).appended
    fingerprints = [manifest.fingerprint, *(note.before for note in appended)]
    return [name for name in (*fingerprints, *_digest_segments(manifest)) if name]


def _digest_segments(manifest: Manifest) -> Iterator[str]:
    """Hash barcodes and values of each modality of each segment, as their files are."""
    for name, segment in manifest.strata.items():
        for modality in segment.modalities:
            # Barcodes alone may agree by accident, as those that are numbers of rows do.
            folders = (f"strata/{name}/obs/barcode/", f"strata/{name}/{modality}/")
            files = {
                file.removeprefix(f"strata/{name}/"): digest.sha256
                for file, digest in manifest.shards.items()
                if file.startswith(folders)
            }
            if files and all(files.values()):
                yield hashlib.sha256(json.dumps(files, sort_keys=True).encode()).hexdigest()
