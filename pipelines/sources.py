"""What training data lies where: the shards of a packed dataset, on a disk or in a store, by the name in a recipe."""

from __future__ import annotations

from dataengine.index import record_path
from dataengine.manifest import Commit, Dataset
from dataengine.shard_cache import ShardCache
from dataengine.stored import Shard, stored
from pipelines.pack import CELL


def shards(root: str, cache: ShardCache | None = None) -> tuple[Shard, ...]:
    """The shards that a root holds; none of their rows is read. ValueError when there are none.

    `cache` is where copies of what is not on this machine go; by default the user's cache, as the disk allows.
    """
    dataset = Dataset(root)
    records = _records(dataset)
    if not records:
        raise ValueError(f"{dataset.store.name} holds no packed tokens; `dataengine pack` makes them")
    return tuple(stored(dataset, records, cache or ShardCache()))


def _records(dataset: Dataset) -> list[Commit]:
    numbers = {record_path(CELL, shard): shard for shard in sorted(dataset.committed(CELL))}
    read = dataset.store.read_many(numbers)
    return [Commit.parse(data, CELL, numbers[path]) for path, data in read if data is not None]
