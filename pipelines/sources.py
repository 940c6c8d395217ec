"""What training data lies where, by the name in a recipe: packed datasets, on a disk or in a store, or ml-4m's tars."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from dataengine import ml4m, packed
from dataengine.index import record_path
from dataengine.manifest import Commit, Dataset
from dataengine.ml4m import Tars
from dataengine.ml4m_shards import Reading, TarShard, tar_shards
from dataengine.packed import Column
from dataengine.shard_cache import ShardCache
from dataengine.shards import Member
from dataengine.storage import redacted
from dataengine.stored import Shard, stored
from pipelines import convert, pack
from pipelines.convert import Convert
from pipelines.pack import CELL


@dataclass(frozen=True, kw_only=True)
class Ml4m:
    """How ml-4m's tars are read where they are not packed before: what `dataengine pack --from-ml4m` is told.

    `pixels` is the side of the images that the model reads, 0 for none; `folders` are those of other names than their
    modality, as (folder, modality). `tokenizers` is a folder of what made the tokens, `aligned_captions` says that a
    caption belongs to the crop of its number, as ml-4m has it by default.
    """

    text_tokenizer: str = "tokenizers/text.json"
    tokenizers: str = ""
    pixels: int = 0
    folders: tuple[tuple[str, str], ...] = ()
    aligned_captions: bool = False


def shards(root: str, cache: ShardCache | None = None, tars: Ml4m | None = None) -> tuple[Shard, ...]:
    """The shards of a root; none of their rows is read. ValueError when there are none.

    `root` is a dataset with packed shards, a folder with a folder of tars for each modality, or a path of ml-4m
    (`root/[caption,tok_rgb@224]/shard-{000..099}.tar`). `cache` is where copies of what is not on this machine go, by
    default the one that this machine's environment names.
    """
    cache = cache or ShardCache.of_machine()
    if root.endswith(".tar"):
        return tuple(_tar_shards(ml4m.expand(root), cache, tars or Ml4m()))
    dataset = Dataset(root)
    records = _records(dataset)
    if records:
        return tuple(stored(dataset, records, cache))
    if dataset.planned:
        raise ValueError(f"{dataset.store.name} holds no packed tokens: `dataengine pack` makes them")
    found = _tars_in(dataset, dict((tars or Ml4m()).folders))
    if not found:
        raise ValueError(f"{dataset.store.name} holds neither packed tokens (`dataengine pack`) nor ml-4m's tars")
    return tuple(_tar_shards(found, cache, tars or Ml4m()))


def _records(dataset: Dataset) -> list[Commit]:
    numbers = {record_path(CELL, shard): shard for shard in sorted(dataset.committed(CELL))}
    read = dataset.store.read_many(numbers)
    return [Commit.parse(data, CELL, numbers[path]) for path, data in read if data is not None]


def _tars_in(dataset: Dataset, folders: Mapping[str, str]) -> list[Tars]:
    """The shards in the folders of a root that are named like modalities; ValueError when they are not the same."""
    store, there = dataset.store, {}
    for folder in store.folders(""):
        name = folders.get(folder, folder)
        if name.startswith("tok_") or name in (*ml4m.TEXTS, *ml4m.OTHERS):
            names = [n for n in store.files(folder) if n.endswith(".tar")]
            if names:
                there[folder] = names
    for folder, names in there.items():
        first = next(iter(there))
        unlike = sorted(set(names) ^ set(there[first]))
        if unlike:
            raise ValueError(f"{store.name}: {unlike[0]} is in {folder} or in {first}, but not in both")
    listed = ",".join(there)
    return [
        Tars(redacted(f"{store.name}/[{listed}]/{name}"), tuple((f, f"{store.url}/{f}/{name}") for f in there))
        for name in (next(iter(there.values())) if there else ())
    ]


def _tar_shards(tars: Sequence[Tars], cache: ShardCache, told: Ml4m) -> list[TarShard]:
    unknown = Reading((), 1, told.folders, {}, _Values(None), "")
    (first,) = tar_shards(tars[:1], unknown, cache)
    if not len(first):
        raise ValueError(f"{first.path} holds no sample: what the others hold is not known")
    members = first.members(0)
    worker = convert.worker_of(
        "",
        tars[:1],
        members,
        text_tokenizer=told.text_tokenizer,
        tokenizers=told.tokenizers,
        pixels=told.pixels,
        encoded=bool(told.pixels),
        names=dict(told.folders),
        aligned=told.aligned_captions,
    )
    worker = replace(worker, shards=())
    reading = Reading(
        worker.columns,
        worker.num_crops,
        worker.names,
        {c.name: _needed(c, members) for c in worker.columns},
        _Values(worker),
        repr((packed.FORMAT, worker.columns, worker.num_crops, worker.aligned)),
    )
    return tar_shards(tars, reading, cache)


def _needed(column: Column, there: Iterable[str]) -> tuple[str, ...]:
    """The modalities that a column is made of."""
    if column.kind in pack.IMAGES:
        return "rgb", "crop_settings"
    if column.name in convert.PLACED:
        return column.name, "rgb", "crop_settings"
    return (column.name, "crop_settings") if "crop_settings" in there else (column.name,)


@dataclass(frozen=True)
class _Values:
    """What makes packed values of members: a `Values` of `ml4m_shards`."""

    worker: Convert | None

    def __call__(
        self,
        keys: Sequence[str],
        members: dict[str, list[Member]],
        columns: Sequence[Column],
        *,
        encoded: bool = True,
        only: int | None = None,
    ) -> Mapping[str, Iterable[Any]]:
        assert self.worker is not None
        worker = replace(self.worker, columns=tuple(columns))
        encode = _encoder(worker.text_tokenizer) if encoded else _unknown
        return convert.values_of(worker, keys, members, encode, only)


@functools.lru_cache(maxsize=4)
def _encoder(text_tokenizer: str) -> pack.Encode:
    return pack.encoder(text_tokenizer)


def _unknown(text: str) -> list[int]:
    return [0]
