"""A store at a glance, from its manifest and the sizes of its files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from clue_dist.errors import list_names
from clue_dist.store import svd
from clue_dist.store.manifest import Manifest
from clue_dist.store.reader import Store

_SHOWN = 12  # batches, labels and inputs printed before "... and N more"


def collect_facts(root: str | Path) -> dict[str, Any]:
    """What `inspect --json` prints. Reads row lengths where a modality is sparse, no counts.

    Raises:
        StoreError: there is no sound store at `root`.
    """
    store = Store(root)
    manifest = store.manifest
    total = sum(shard.bytes for shard in manifest.shards.values())
    return {
        "store": str(root),
        "fingerprint": manifest.fingerprint,
        "cells": manifest.n_cells,
        "block_cells": manifest.block_cells,
        "codec": manifest.codec,
        "bytes": total,
        "modalities": {name: _modality(store, name) for name in store.modalities},
        "strata": {
            name: {
                "cells": s.n_cells,
                "paired": len(s.modalities) > 1,
                "modalities": s.modalities,
                "shard_blocks": s.shard_blocks,
            }
            for name, s in manifest.strata.items()
        },
        "batches": _totals(manifest, "batch"),
        "labels": _totals(manifest, "label"),
        "svd": {
            name: {
                "components": note.components,
                "cells": note.n_cells,
                "normalise": note.normalise,
            }
            for name, note in svd.list_svds(store.root, manifest).items()
        },
        "provenance": manifest.provenance,
    }


def _modality(store: Store, name: str) -> dict[str, Any]:
    modality = store.manifest.modalities[name]
    size = sum(s.bytes for key, s in store.manifest.shards.items() if key.split("/")[2] == name)
    cells = sum(r.n_cells for r in store.segments.values() if name in r.modalities)
    out = {
        "kind": modality.kind,
        "storage": modality.storage,
        "features": modality.n_features,
        "cells": cells,
        "bytes": size,
    }
    if modality.storage == "sparse":
        nnz = sum(
            _non_zeros(store, stratum, name)
            for stratum, r in store.segments.items()
            if name in r.modalities
        )
        return out | {"non_zeros": nnz, "bytes_per_non_zero": size / max(nnz, 1)}
    return out | {"bytes_per_value": size / max(cells * modality.n_features, 1)}


def _non_zeros(store: Store, stratum: str, modality: str) -> int:
    reader = store.segments[stratum]
    step = 4096
    return sum(
        int(
            reader.read_lengths(modality, np.arange(lo, min(lo + step, reader.n_blocks))).sum(
                dtype=np.int64
            )
        )
        for lo in range(0, reader.n_blocks, step)
    )


def _totals(manifest: Manifest, field: str) -> dict[str, int]:
    names = manifest.batches if field == "batch" else manifest.labels
    tallies = [
        s.batch_counts if field == "batch" else s.label_counts for s in manifest.strata.values()
    ]
    totals = {name: sum(tally.get(name, 0) for tally in tallies) for name in names}
    unknown = manifest.n_cells - sum(totals.values())
    return totals | ({"(unknown)": unknown} if unknown else {})


def format_facts(found: dict[str, Any]) -> str:
    """`facts` for people."""
    lines = [
        f"{found['store']}: {found['cells']:,} cells, {found['bytes'] / 2**20:,.1f} MiB",
        f"fingerprint  {found['fingerprint']}",
        f"blocks       {found['block_cells']} cells, codec {found['codec']}",
        "modalities",
    ]
    for name, m in found["modalities"].items():
        density = (
            f"{m['bytes_per_non_zero']:.2f} bytes per non-zero"
            if "non_zeros" in m
            else f"{m['bytes_per_value']:.2f} bytes per value"
        )
        lines.append(
            f"  {name:<12} {m['kind']}, {m['storage']}, {m['features']:,} features, {m['cells']:,} cells, {density}"
        )
    lines.append("strata")
    for name, s in found["strata"].items():
        lines.append(
            f"  {name:<12} {s['cells']:,} cells, {'paired' if s['paired'] else 'one modality'}"
        )
    for title in ("batches", "labels"):
        shares = [f"{name} {n:,}" for name, n in found[title].items() if n]
        lines.append(f"{title:<12} {list_names(shares, _SHOWN) or 'none'}")
    for name, note in found["svd"].items():
        how = f"{note['components']} components of {note['cells']:,} cells, {note['normalise']}"
        lines.append(f"{'svd':<12} {name}: {how}")
    additions = found["provenance"].get("appended", [])
    return "\n".join(
        lines
        + _provenance(found["provenance"])
        + [line for a in additions for line in _provenance(a, added=True)]
    )


def _provenance(notes: dict[str, Any], added: bool = False) -> list[str]:
    if not notes:
        return ["provenance   none recorded"]
    cells, title = notes.get("cells", {}), "added" if added else "provenance"
    lines = [
        f"{title:<12} {notes.get('tool', '?')}: {cells.get('in', 0):,} cells in, {cells.get('dropped', 0):,} dropped"
    ]
    lines += [
        f"  {name}: {how}" for name in notes.get("features", {}) if (how := _chosen(name, notes))
    ]
    for item in notes.get("inputs", [])[:_SHOWN]:
        missing, extra = item["features"]["missing"], item["features"]["extra"]
        told = f"{item['cells']:,} cells ({item['empty']:,} empty), features: {missing} missing, {extra} extra"
        told += (
            f", named by {item['names']}" if item.get("names", "var_names") != "var_names" else ""
        )
        told += f", {item['counted']} counted" if "counted" in item else ""
        lines.append(
            f"  {item['dataset'] + ':' if item['dataset'] else ''}{item['file']} -> {item['modality']}: {told}"
        )
    if len(notes.get("inputs", [])) > _SHOWN:
        lines.append(f"  ... and {len(notes['inputs']) - _SHOWN} more")
    return lines


def _chosen(name: str, notes: dict[str, Any]) -> str:
    """How a modality's features were decided, where that was not simply those of its files."""
    choice, selected = notes["features"][name], notes.get("selected", {}).get(name)
    parts = [f"{choice['mode']} of its files"] if choice["mode"] != "same" else []
    if choice["list_sha256"]:
        parts = [f"a list (sha256 {choice['list_sha256'][:12]})"]
    if choice["bins"]:
        parts.append(f"bins of {choice['bins']:,} bp")
    if selected:
        parts.append(f"{selected['kept']:,} of {selected['of']:,}, {selected['by']}")
    return "; ".join(parts)


def dump_facts(found: dict[str, Any]) -> str:
    return json.dumps(found, indent=1)
