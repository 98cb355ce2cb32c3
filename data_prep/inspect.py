"""A store at a glance, from its manifest and the sizes of its files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from clue_dist.errors import format_count, list_names
from clue_dist.store import svd
from clue_dist.store.manifest import Manifest
from clue_dist.store.reader import SegmentReader, Store

_SHOWN = 12  # batches, labels, kept columns and inputs that are printed before "... and N more"
_STEP_BLOCKS = 4096  # whose lengths of rows are read at once


def collect_facts(root: str | Path) -> dict[str, Any]:
    """Collect what `inspect --json` prints.

    Lengths of rows are read where a modality is sparse, but no counts.

    Args:
        root: a folder or a URL.

    Returns:
        JSON-able.

    Raises:
        StoreError: there is no sound store at `root`.
    """
    store = Store(root)
    manifest = store.manifest
    return {
        "store": str(root),
        "fingerprint": manifest.fingerprint,
        "cells": manifest.n_cells,
        "block_cells": manifest.block_cells,
        "codec": manifest.codec,
        "bytes": sum(shard.bytes for shard in manifest.shards.values()),
        "modalities": {name: _describe_modality(store, name) for name in store.modalities},
        "strata": {
            name: {
                "cells": segment.n_cells,
                "paired": len(segment.modalities) > 1,
                "modalities": segment.modalities,
                "shard_blocks": segment.shard_blocks,
            }
            for name, segment in manifest.strata.items()
        },
        "batches": _count_cells(manifest, "batch"),
        **({"covariates": covariates} if (covariates := _count_levels(manifest)) else {}),
        "labels": _count_cells(manifest, "label"),
        "kept_columns": {
            name: {"kind": column.kind, "categories": len(column.categories)}
            for name, column in manifest.obs_columns.items()
        },
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


def _describe_modality(store: Store, name: str) -> dict[str, Any]:
    """Describe a modality: its kind, its cells, and how many bytes its values take."""
    modality, shards = store.manifest.modalities[name], store.manifest.shards
    # A path is strata/SEGMENT/MODALITY/...
    size = sum(shard.bytes for path, shard in shards.items() if path.split("/")[2] == name)
    readers = [reader for reader in store.segments.values() if name in reader.modalities]
    n_cells = sum(reader.n_cells for reader in readers)
    facts = {
        "kind": modality.kind,
        "storage": modality.storage,
        "features": modality.n_features,
        "cells": n_cells,
        "bytes": size,
    }
    if modality.storage == "sparse":
        nonzeros = sum(_count_nonzeros(reader, name) for reader in readers)
        return facts | {"non_zeros": nonzeros, "bytes_per_non_zero": size / max(nonzeros, 1)}
    return facts | {"bytes_per_value": size / max(n_cells * modality.n_features, 1)}


def _count_nonzeros(reader: SegmentReader, modality: str) -> int:
    """Add up the lengths of all rows of a segment."""
    nonzeros = 0
    for first in range(0, reader.n_blocks, _STEP_BLOCKS):
        blocks = np.arange(first, min(first + _STEP_BLOCKS, reader.n_blocks))
        nonzeros += int(reader.read_lengths(modality, blocks)[..., 0].sum(dtype=np.int64))
    return nonzeros


def _count_cells(manifest: Manifest, field: str) -> dict[str, int]:
    """Count the cells of each batch or label, and those whose is unknown, if there are any."""
    is_batch = field == "batch"
    tallies = [
        segment.batch_counts if is_batch else segment.label_counts
        for segment in manifest.strata.values()
    ]
    names = manifest.batches if is_batch else manifest.labels
    totals = {name: sum(tally.get(name, 0) for tally in tallies) for name in names}
    unknown = manifest.n_cells - sum(totals.values())
    return totals | ({"(unknown)": unknown} if unknown else {})


def _count_levels(manifest: Manifest) -> dict[str, dict[str, int]]:
    """Count the cells of each level of each covariate, where several make up the batches."""
    n_cells, counted = _count_cells(manifest, "batch"), {}
    for name, levels in manifest.batch_covariates.items():
        counts = dict.fromkeys(manifest.batch_vocabulary.list_levels(name), 0)
        for batch, level in zip(manifest.batches, levels, strict=True):
            if level:
                counts[level] += n_cells[batch]
        counted[name] = counts
    return counted


def format_facts(facts: dict[str, Any]) -> str:
    """Format what `collect_facts` has found for people."""
    lines = [
        f"{facts['store']}: {format_count(facts['cells'], 'cell')}, "
        f"{facts['bytes'] / 2**20:,.1f} MiB",
        f"fingerprint  {facts['fingerprint']}",
        f"blocks       {facts['block_cells']} cells, codec {facts['codec']}",
        "modalities",
    ]
    for name, modality in facts["modalities"].items():
        unit = "non_zero" if "non_zeros" in modality else "value"
        density = f"{modality[f'bytes_per_{unit}']:.2f} bytes per {unit.replace('_', '-')}"
        lines.append(
            f"  {name:<12} {modality['kind']}, {modality['storage']}, {modality['features']:,} "
            f"features, {modality['cells']:,} cells, {density}"
        )
    lines.append("strata")
    for name, segment in facts["strata"].items():
        pairing = "paired" if segment["paired"] else "one modality"
        lines.append(f"  {name:<12} {format_count(segment['cells'], 'cell')}, {pairing}")
    for title in ("batches", "labels"):
        shares = [f"{name} {n_cells:,}" for name, n_cells in facts[title].items() if n_cells]
        lines.append(f"{title:<12} {list_names(shares, _SHOWN) or 'none'}")
        for name, levels in facts.get("covariates", {}).items() if title == "batches" else ():
            shares = [f"{level} {n_cells:,}" for level, n_cells in levels.items() if n_cells]
            lines.append(f"  {name:<12} {list_names(shares, _SHOWN)}")
    if kept := [_describe_column(*column) for column in facts["kept_columns"].items()]:
        lines.append(f"{'kept columns':<12} {list_names(kept, _SHOWN)}")
    for name, note in facts["svd"].items():
        result = f"{note['components']} components of {note['cells']:,} cells, {note['normalise']}"
        lines.append(f"{'svd':<12} {name}: {result}")
    provenance = facts["provenance"]
    lines += _format_provenance(provenance, "provenance")
    for addition in provenance.get("appended", []):
        lines += _format_provenance(addition, "added")
    return "\n".join(lines)


def _describe_column(name: str, column: dict[str, Any]) -> str:
    """Say what a kept column of obs holds."""
    if column["kind"] != "category":
        return f"{name} ({column['kind']})"
    n_categories = column["categories"]
    return f"{name} ({n_categories:,} {'category' if n_categories == 1 else 'categories'})"


def _format_provenance(notes: dict[str, Any], title: str) -> list[str]:
    """Say where the cells of a conversion, or of an addition, came from."""
    if not notes:
        return ["provenance   none recorded"]
    cells, inputs = notes.get("cells", {}), notes.get("inputs", [])
    lines = [
        f"{title:<12} {notes.get('tool', '?')}: {format_count(cells.get('in', 0), 'cell')} in, "
        f"{cells.get('dropped', 0):,} dropped"
    ]
    if n_paired := cells.get("paired_by_core"):
        lines.append(f"  paired by their core: {format_count(n_paired, 'barcode')}")
    for name in notes.get("features", {}):
        if decision := _describe_decision(name, notes):
            lines.append(f"  {name}: {decision}")
    lines += [_format_input(note) for note in inputs[:_SHOWN]]
    if len(inputs) > _SHOWN:
        lines.append(f"  ... and {len(inputs) - _SHOWN} more")
    return lines


def _format_input(note: dict[str, Any]) -> str:
    """Say in one line what became of an input."""
    missing, extra = note["features"]["missing"], note["features"]["extra"]
    prefix = f"{note['dataset']}:" if note["dataset"] else ""
    facts = [
        f"{format_count(note['cells'], 'cell')} ({note['empty']:,} empty)",
        f"features: {missing} missing",
        f"{extra} extra",
    ]
    # Stores of earlier versions have no such notes.
    if note.get("names", "var_names") != "var_names":
        facts.append(f"named by {note['names']}")
    if "counted" in note:
        facts.append(f"{note['counted']} counted")
    return f"  {prefix}{note['file']} -> {note['modality']}: {', '.join(facts)}"


def _describe_decision(name: str, notes: dict[str, Any]) -> str:
    """Say how a modality's features were decided; "" where they are simply those of its files."""
    choice, selected = notes["features"][name], notes.get("selected", {}).get(name)
    parts = [f"{choice['mode']} of its files"] if choice["mode"] != "same" else []
    if choice["list_sha256"]:
        parts = [f"a list (sha256 {choice['list_sha256'][:12]})"]
    if choice["bins"]:
        parts.append(f"bins of {choice['bins']:,} bp")
    if selected:
        parts.append(f"{selected['kept']:,} of {selected['of']:,}, {selected['by']}")
    return "; ".join(parts)


def dump_facts(facts: dict[str, Any]) -> str:
    """Format facts as JSON, for programs."""
    return json.dumps(facts, indent=1)
