"""What tells whether two stores share cells, without a look at the cells themselves."""

from __future__ import annotations

import hashlib
import json
from collections import defaultdict
from collections.abc import Iterable, Iterator

from clue_dist.store.manifest import Manifest
from clue_dist.store.provenance import Provenance


def identify_cells(manifest: Manifest) -> list[str]:
    """List what identifies the cells of a store; `share_cells` compares two such lists.

    Args:
        manifest: that of the store.

    Returns:
        SHA-256 in hexadecimal: the fingerprint, those that the store had before cells were
        appended, and a digest of each modality of each segment. The digests stay when cells are
        appended, and where the features of another modality are others. Of a part of a store, also
        `WHOLE:RULE:SIDE` for everything that identifies the whole.
    """
    notes = Provenance.model_validate(manifest.provenance)
    # Both parts of a store that grew keep its notes: what it was before identifies neither of them.
    wholes = {whole for part in notes.parts for whole in part.whole}
    earlier = [note.before for note in notes.appended if note.before not in wholes]
    fingerprints = [manifest.fingerprint, *earlier]
    names = [name for name in (*fingerprints, *_digest_segments(manifest)) if name]
    return names + [
        f"{whole}:{part.rule}:{part.side}" for part in notes.parts for whole in part.whole
    ]


def share_cells(names: Iterable[str], others: Iterable[str]) -> bool:
    """Whether two stores, or more, share cells, by what `identify_cells` lists of them.

    Parts of the same store share cells unless the same rule made them, on different sides.

    Args:
        names: of one store.
        others: of one store, or of all that a model was trained on.
    """
    plain, parts = _separate_parts(names)
    other_plain, other_parts = _separate_parts(others)
    # The same store, or a part of the other one.
    if not plain.isdisjoint(other_plain | other_parts.keys()) or other_plain & parts.keys():
        return True
    common = parts.keys() & other_parts.keys()
    return bool(common) and not any(
        all(rule == other_rule and side != other_side for other_rule, other_side in cuts)
        for whole in common
        for rule, side in parts[whole]
        for cuts in [other_parts[whole]]
    )


def _separate_parts(names: Iterable[str]) -> tuple[set[str], dict[str, set[tuple[str, str]]]]:
    """Separate what identifies stores from the rules and sides of their wholes, by whole."""
    plain, parts = set(), defaultdict(set)
    for name in names:
        whole, *cut = name.split(":")
        if len(cut) == 2:
            parts[whole].add((cut[0], cut[1]))
        else:
            plain.add(name)
    return plain, dict(parts)


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
