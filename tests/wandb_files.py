"""Reads what wandb has recorded offline, as its server would."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any


@dataclass
class RecordedRun:
    """What the .wandb files of a run hold, in the order in which they were written."""

    run_id: str = ""
    name: str = ""
    group: str = ""
    project: str = ""
    config: dict[str, Any] = field(default_factory=dict)
    history: list[dict[str, Any]] = field(default_factory=list)
    summary: dict[str, Any] = field(default_factory=dict)
    artifacts: dict[str, list[str]] = field(default_factory=dict)  # names of files, by type


def read_recorded_run(run_folder: Path) -> RecordedRun:
    """Read all offline files of a run folder; they must be of one run."""
    from wandb.proto.wandb_internal_pb2 import Record
    from wandb.sdk.internal.datastore import DataStore

    found, ids = RecordedRun(), set()
    for path in sorted(run_folder.glob("wandb/offline-run-*/*.wandb")):
        store = DataStore()
        store.open_for_scan(str(path))
        while (data := store.scan_data()) is not None:
            record = Record()
            record.ParseFromString(data)
            _add_record(found, record)
            ids.add(found.run_id)
    assert len(ids - {""}) == 1
    return found


def _add_record(found: RecordedRun, record: Any) -> None:
    """Add what one record says."""
    kind = record.WhichOneof("record_type")
    if kind == "run":
        run = record.run
        found.run_id, found.name, found.project = run.run_id, run.display_name, run.project
        found.group = run.run_group
        _update(found.config, run.config.update)
    elif kind == "config":
        _update(found.config, record.config.update)
    elif kind == "history":
        row: dict[str, Any] = {}
        _update(row, record.history.item)
        found.history.append(row)
    elif kind == "summary":
        _update(found.summary, record.summary.update)
    elif kind == "artifact":
        files = [entry.path for entry in record.artifact.manifest.contents]
        found.artifacts[record.artifact.type] = files


def _update(tree: dict[str, Any], items: Any) -> None:
    for item in items:
        key = "/".join(item.nested_key) or item.key
        tree[key] = json.loads(item.value_json)
