"""Read a dataset back and hold it to its commit records and its modalities."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from dataengine import modalities, shards
from dataengine.geometry import crops_of
from dataengine.manifest import Commit, Dataset
from dataengine.shards import Member


@dataclass(frozen=True)
class Problem:
    """Something that is not as its commit record or its modality says."""

    file: str
    key: str
    problem: str


def verify(dataset: Dataset, on_cell: Callable[[str, int], None] = lambda modality, shard: None) -> list[Problem]:
    """Every committed cell re-read: hash, size, alignment with rgb, decodability, schema, crops inside their image."""
    problems: list[Problem] = []
    columns = dataset.modalities()
    for shard in dataset.committed("rgb"):
        sizes: dict[str, tuple[int, int]] = {}
        for modality in columns:
            if dataset.commit(modality, shard) is not None and not modality.startswith("tokens"):
                problems += _cell(dataset, modality, shard, sizes)
                on_cell(modality, shard)
    for record in _packed(dataset):
        if shards.sha256(dataset.store.read(record.file)) != record.sha256:
            problems.append(Problem(record.file, "", "does not have the sha256 of its commit record"))
    return problems


def _packed(dataset: Dataset) -> Iterator[Commit]:
    for modality in dataset.modalities():
        if modality.startswith("tokens"):
            for shard in dataset.committed(modality):
                record = dataset.commit(modality, shard)
                if record is not None:
                    yield record


def _cell(dataset: Dataset, modality: str, shard: int, sizes: dict[str, tuple[int, int]]) -> Iterator[Problem]:
    record = dataset.commit(modality, shard)
    assert record is not None
    try:
        members = dataset.read(modality, shard)
    except (ValueError, FileNotFoundError) as error:
        yield Problem(record.file, "", str(error) or "is missing")
        return
    found = tuple(m.key for m in members)
    if found != dataset.keys(shard) or record.keys_sha256 != shards.keys_sha256(found):
        yield Problem(record.file, "", "does not list the keys of the rgb tar in their order")
        return
    yield from _values(record, members, modality, sizes)


def _values(
    record: Commit, members: Sequence[Member], modality: str, sizes: dict[str, tuple[int, int]]
) -> Iterator[Problem]:
    codec = modalities.load(modality)
    for member in members:
        try:
            value = codec.decode(member.data)
            if modality == "rgb":
                sizes[member.key] = value.shape[:2]
            if member.key not in sizes:
                continue  # its image is a problem of its own, and without it there is no size to check against
            codec.check(value, sizes[member.key])
            if modality == "crop_settings":
                _inside(value, sizes[member.key])
        except ValueError as error:
            yield Problem(record.file, member.key, str(error))


def _inside(rows: object, size: tuple[int, int]) -> None:
    for crop in crops_of(rows):  # type: ignore[arg-type]
        if crop.top < 0 or crop.left < 0 or crop.top + crop.height > size[0] or crop.left + crop.width > size[1]:
            raise ValueError(f"{crop} lies partly outside of an image of {size[0]} x {size[1]} pixels")
