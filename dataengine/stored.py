"""Packed shards where they lie, on a disk or in a store: opened when a row is asked for, through a cache if need be."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np

from dataengine import _opened, packed
from dataengine.manifest import Commit, Dataset
from dataengine.packed import Column, Packed
from dataengine.shard_cache import Remote, ShardCache

ABOUT = "packed"
"""The entry of a commit record's provenance that says what is in the file: see `about`."""


class Shard(Protocol):
    """What is trained on: rows of modalities, as `packed.Packed` has them; it can be pickled."""

    @property
    def path(self) -> str:
        """Where it lies, for people."""
        ...

    @property
    def columns(self) -> dict[str, Column]:
        """The columns by name."""
        ...

    @property
    def num_crops(self) -> int:
        """Crops of a row."""
        ...

    @property
    def keys(self) -> list[str]:
        """The keys, in order."""
        ...

    def __len__(self) -> int: ...

    def row(
        self, index: int, rng: np.random.Generator, names: Sequence[str], crop: int | None = None
    ) -> dict[str, Any]:
        """The named modalities of a row; see `packed.Packed.row`."""
        ...

    def present(self, names: Sequence[str]) -> np.ndarray:
        """bool (rows, names): where `row` gives a value."""
        ...

    def lengths(self, names: Sequence[str]) -> np.ndarray:
        """int32 (rows, names): what `row` gives at most."""
        ...


@runtime_checkable
class Elsewhere(Protocol):
    """A shard whose files may have to be downloaded."""

    def wanted(self) -> list[tuple[ShardCache, Remote]]:
        """The files, and where their copies go; none when they are on this machine anyway."""
        ...


def prefetch(shards: Iterable[Shard]) -> None:
    """Begin to download what is not on this machine of shards that will be read next; it does not wait.

    In the order given, as long as there is room in the cache that nobody needs. What fails is left to who reads.
    """
    for shard in shards:
        for cache, remote in shard.wanted() if isinstance(shard, Elsewhere) else ():
            if not cache.has(remote):
                _opened.downloads.add(cache, remote)


@dataclass(frozen=True, eq=False)
class StoredShard:
    """A packed shard of which only the commit record has been read; of the interface of `packed.Packed`.

    Its file is mapped when a row (or what is known of rows) is first asked for, downloaded to the cache before if it
    is not on this machine; a process has only so many shards mapped, and lets go of the others.
    """

    path: str
    columns: dict[str, Column]
    num_crops: int
    num_rows: int
    remote: Remote
    cache: ShardCache | None
    """None: the file is on this machine."""

    def __len__(self) -> int:
        return self.num_rows

    @property
    def keys(self) -> list[str]:
        """The keys, in order."""
        return self._opened().keys

    def row(
        self, index: int, rng: np.random.Generator, names: Sequence[str], crop: int | None = None
    ) -> dict[str, Any]:
        """See `packed.Packed.row`."""
        return self._opened().row(index, rng, names, crop)

    def present(self, names: Sequence[str]) -> np.ndarray:
        """See `packed.Packed.present`."""
        return self._opened().present(names)

    def lengths(self, names: Sequence[str]) -> np.ndarray:
        """See `packed.Packed.lengths`."""
        return self._opened().lengths(names)

    def wanted(self) -> list[tuple[ShardCache, Remote]]:
        """Its file, unless it is on this machine anyway."""
        return [] if self.cache is None else [(self.cache, self.remote)]

    def _opened(self) -> Packed:
        return (_opened.here if self.cache is None else _opened.held).get(self.remote, self._map)

    def _map(self) -> tuple[Packed, list[int]]:
        shard, handles = _mapped(self.remote, self.cache)
        if (len(shard), shard.num_crops, shard.columns) != (self.num_rows, self.num_crops, self.columns):
            raise ValueError(f"{self.path} is not as its commit record says: `dataengine verify` tells more")
        return shard, handles


def _mapped(remote: Remote, cache: ShardCache | None) -> tuple[Packed, list[int]]:
    """A packed file, and the descriptor that holds its copy where it is one."""
    if cache is None:
        return Packed(Path(remote.root, remote.path)), []
    handle = cache.open(remote)
    try:
        shard = Packed(f"/proc/self/fd/{handle}")  # by its name it might be gone by now
    except ValueError as error:
        os.close(handle)
        raise ValueError(f"{remote.name}: {error}") from error
    shard.path = remote.name
    return shard, [handle]


def stored(dataset: Dataset, records: Iterable[Commit], cache: ShardCache) -> list[StoredShard]:
    """The packed shards that commit records name, which are not opened unless a record does not say what is in them."""
    store = dataset.store
    known: dict[str, tuple[int, dict[str, Column]]] = {}  # most records of a dataset say the same
    through = None if store.local else cache
    out = []
    for record in records:
        # A file of this machine is mapped as it is, without a look at all of its bytes.
        remote = Remote(store.url, record.file, record.num_bytes, "" if store.local else record.sha256)
        said = record.provenance.get(ABOUT)
        if not isinstance(said, dict) or said.get("format") != packed.FORMAT:
            said = _looked_into(remote, through)
        text = json.dumps(said, sort_keys=True)
        if text not in known:
            try:
                known[text] = _parsed(said)
            except (ValueError, TypeError, KeyError, AttributeError) as error:
                raise ValueError(f"the record of {store.name}/{record.file}: {error}") from error
        num_crops, columns = known[text]
        name = str(Path(remote.root, remote.path)) if through is None else remote.name
        out.append(StoredShard(name, columns, num_crops, record.num_samples, remote, through))
    return out


def about(columns: Sequence[Column], num_crops: int) -> dict[str, Any]:
    """What a commit record says of a packed file, under `ABOUT`, so that nobody must open it to know."""
    return {"format": packed.FORMAT, "num_crops": num_crops, "columns": [dataclasses.asdict(c) for c in columns]}


def _parsed(said: dict[str, Any]) -> tuple[int, dict[str, Column]]:
    columns = [Column(**{**c, "grid": tuple(c["grid"])}) for c in said["columns"]]
    if type(said["num_crops"]) is not int or said["num_crops"] < 1:
        raise ValueError(f"num_crops {said['num_crops']!r:.40}, expected at least 1")
    return said["num_crops"], {c.name: c for c in columns}


def _looked_into(remote: Remote, cache: ShardCache | None) -> dict[str, Any]:
    shard, handles = _mapped(remote, cache)
    for handle in handles:
        os.close(handle)
    return about(list(shard.columns.values()), shard.num_crops)
