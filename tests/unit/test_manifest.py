"""A manifest that contradicts itself is refused before any array is opened."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from clue_dist.errors import StoreError
from clue_dist.store.layout import MANIFEST
from clue_dist.store.manifest import Manifest
from tests.stores import make_store

Fields = dict[str, Any]


@pytest.fixture(scope="module")
def manifest(tmp_path_factory: pytest.TempPathFactory) -> Manifest:
    """The manifest of a store of 100 paired cells and 50 single ones, in blocks of 16."""
    return make_store(tmp_path_factory.mktemp("store") / "s.zarr").manifest


def rename_segment(fields: Fields) -> None:
    fields["strata"]["rna+adt.2"] = fields["strata"].pop("rna+adt")


def drop_packing(fields: Fields) -> None:
    del fields["strata"]["rna+adt"]["packed"]["adt"]


def swap_packing(fields: Fields) -> None:
    packed = fields["strata"]["rna+adt"]["packed"]
    packed["rna"], packed["adt"] = packed["adt"], packed["rna"]


def pack_both_ways(fields: Fields) -> None:
    fields["strata"]["rna+adt"]["packed"]["rna"]["values"] = "uint8"


def pack_neither_way(fields: Fields) -> None:
    fields["strata"]["rna+adt"]["packed"]["rna"]["rest_type"] = None


def count_more_cells(fields: Fields) -> None:
    segment = fields["strata"]["rna+adt"]
    name = next(iter(segment["label_counts"]))
    segment["label_counts"][name] += 1


def count_unknown_batch(fields: Fields) -> None:
    fields["strata"]["rna"]["batch_counts"]["elsewhere"] = 0


def repeat_batch(fields: Fields) -> None:
    fields["batches"].append(fields["batches"][0])


def reverse_modalities(fields: Fields) -> None:
    fields["strata"]["rna+adt"]["modalities"].reverse()


def reserve_name(fields: Fields) -> None:
    fields["modalities"]["obs"] = fields["modalities"]["rna"]


def use_other_storage(fields: Fields) -> None:
    fields["modalities"]["rna"]["storage"] = "dense"


def make_shards_uneven(fields: Fields) -> None:
    fields["strata"]["rna"]["shard_blocks"] = 15


def make_shards_long(fields: Fields) -> None:
    fields["strata"]["rna"]["shard_blocks"] = 32


def raise_capacity(fields: Fields) -> None:
    fields["strata"]["rna"]["packed"]["rna"]["capacity"] = 16 * 30 + 1


def raise_rest(fields: Fields) -> None:
    fields["strata"]["rna"]["packed"]["rna"]["rest"] = 3 * 16 * 30 + 1


CONTRADICTIONS: list[tuple[Callable[[Fields], None], str]] = [
    (rename_segment, "does not fit its modalities"),
    (drop_packing, "does not fit its modalities"),
    (swap_packing, "against its storage"),
    (pack_both_ways, "against its storage"),
    (pack_neither_way, "against its storage"),
    (count_more_cells, "label_counts of segment"),
    (count_unknown_batch, "batch_counts of segment"),
    (repeat_batch, "1 names that occur more than once"),
    (reverse_modalities, "lists modalities"),
    (reserve_name, "is not a plain name"),
    (use_other_storage, "is stored sparse, not dense"),
    (make_shards_uneven, "more than 16 or uneven"),
    (make_shards_long, "more than 16 or uneven"),
    (raise_capacity, "is packed as more"),
    (raise_rest, "is packed as more"),
]


@pytest.mark.parametrize(("change", "message"), CONTRADICTIONS)
def test_contradictions_are_refused(
    manifest: Manifest, change: Callable[[Fields], None], message: str
) -> None:
    fields = manifest.model_dump(mode="json")
    assert Manifest.model_validate(fields) == manifest
    change(fields)
    with pytest.raises(ValidationError, match=message):
        Manifest.model_validate(fields)


def test_blocks_may_be_as_full_as_cells_and_features_allow(manifest: Manifest) -> None:
    fields = manifest.model_dump(mode="json")
    fullest = {"capacity": 16 * 30, "rest": 3 * 16 * 30}
    fields["strata"]["rna"]["packed"]["rna"] |= fullest
    packed = Manifest.model_validate(fields).strata["rna"].packed["rna"]
    assert {name: getattr(packed, name) for name in fullest} == fullest


def test_exactly_the_shards_of_the_arrays_are_listed(manifest: Manifest) -> None:
    assert manifest.lists_every_shard()
    first, *others = manifest.shards
    fewer = {name: manifest.shards[name] for name in others}
    for shards in (fewer, fewer | {f"{first}.more": manifest.shards[first]}):
        assert not manifest.model_copy(update={"shards": shards}).lists_every_shard()


def test_an_edited_manifest_is_told_from_the_one_that_was_written(
    manifest: Manifest, tmp_path: Path
) -> None:
    written = manifest.write(tmp_path)
    content = (tmp_path / MANIFEST).read_bytes()
    assert written.is_sealed(content)
    assert not written.is_sealed(content.replace(b"batch-0", b"batch-9"))
    assert Manifest.read(tmp_path) == written
    (tmp_path / MANIFEST).write_bytes(content.replace(b"batch-0", b"batch-9"))
    with pytest.raises(StoreError):
        Manifest.read(tmp_path)
    (tmp_path / MANIFEST).unlink()
    with pytest.raises(StoreError, match="no store here"):
        Manifest.read(tmp_path)
