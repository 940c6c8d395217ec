"""ml-4m's tars of tokens and labels as shards that are trained on: rows in any order, without a conversion.

A shard is the aligned tars of one number (`ml4m.Tars`). Its members are found by one look at the headers, and a row is
made of their bytes when it is asked for, as `dataengine pack --from-ml4m` makes it and `packed` reads it.
"""

from __future__ import annotations

import hashlib
import os
import random
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import pyarrow as pa

from dataengine import _disk, _opened, _packed_rows, _tar_index, ml4m, packed
from dataengine._tar_index import TarIndex
from dataengine.ml4m import Tars
from dataengine.modalities import TextLike
from dataengine.packed import Column
from dataengine.shard_cache import Remote, ShardCache, locked
from dataengine.shards import Member
from dataengine.storage import Entry, Store

_THREADS = 8
_AT_ONCE = 64  # rows that are made at a time, where all are looked at


class Values(Protocol):
    """What makes packed values of members; it can be pickled."""

    def __call__(
        self,
        keys: Sequence[str],
        members: dict[str, list[Member]],
        columns: Sequence[Column],
        *,
        encoded: bool = True,
        only: int | None = None,
    ) -> Mapping[str, Iterable[Any]]:
        """What `packed.build` takes of keys and their members by modality.

        Without `encoded`, texts are of any ids. `only`: of this crop alone, as if there were no other.
        """
        ...


@dataclass(frozen=True)
class Reading:
    """How the tars of a dataset are read: the columns they give, and what makes the values of these."""

    columns: tuple[Column, ...]
    num_crops: int
    names: tuple[tuple[str, str], ...]
    """Folders that are called otherwise: (folder, modality)."""
    needs: Mapping[str, tuple[str, ...]]
    """The modalities of ml-4m that each column is made of, as far as they are there."""
    values: Values
    identity: str
    """What changes whenever `values` gives something else of the same members."""


@dataclass(frozen=True, eq=False)
class TarShard:
    """The aligned tars of one shard; of the interface of `packed.Packed`.

    The tars are opened when a row is first asked for, downloaded to the cache before if they are not on this machine.
    Each row is read and made anew: it takes milliseconds where a packed one takes microseconds.
    """

    tars: Tars
    files: tuple[Remote, ...]
    """In the order of the tars; `tag` is their version."""
    reading: Reading
    cache: ShardCache
    local: bool
    num_rows: int

    def __len__(self) -> int:
        return self.num_rows

    @property
    def path(self) -> str:
        """The path that names the tars."""
        return self.tars.name

    @property
    def columns(self) -> dict[str, Column]:
        """The columns by name."""
        return {c.name: c for c in self.reading.columns}

    @property
    def num_crops(self) -> int:
        """Crops of a row."""
        return self.reading.num_crops

    @property
    def keys(self) -> list[str]:
        """The keys, in order."""
        return self._index().keys

    def wanted(self) -> list[tuple[ShardCache, Remote]]:
        """Its tars, unless they are on this machine anyway."""
        return [] if self.local else [(self.cache, file) for file in self.files]

    def row(
        self, index: int, rng: np.random.Generator, names: Sequence[str], crop: int | None = None
    ) -> dict[str, Any]:
        """See `packed.Packed.row`: the same numbers are drawn from `rng`, in the same order."""
        chosen = int(rng.random() * self.num_crops) if crop is None else crop
        if not (0 <= index < self.num_rows and 0 <= chosen < self.num_crops):
            raise IndexError(
                f"row {index} under crop {chosen}: {self.path} has {len(self)} rows, {self.num_crops} crops"
            )
        columns = [self._column(name) for name in names]
        batch = self._batch(range(index, index + 1), list(dict.fromkeys(columns)), only=chosen)
        draws: _packed_rows.Draws = {}
        return {c.name: _packed_rows.reader(c, batch.column(c.name), 1)(0, 0, rng, draws) for c in columns}

    def present(self, names: Sequence[str]) -> np.ndarray:
        """See `packed.Packed.present`; of captions, metadata and the like, found out once for all rows, and kept."""
        return self._known("present", _packed_rows.present, np.bool_, names)

    def lengths(self, names: Sequence[str]) -> np.ndarray:
        """See `packed.Packed.lengths`; of texts, found out once for all rows by tokenising them, and kept."""
        return self._known("lengths", _packed_rows.lengths, np.int32, names)

    def members(self, row: int) -> dict[str, Member]:
        """All members of a row, by modality."""
        index, files = self._index(), self._files()
        return {modality: self._member(index, modality, row, files) for modality in index.columns}

    # -- rows ---------------------------------------------------------------------------------------------------------

    def _column(self, name: str) -> Column:
        found = next((c for c in self.reading.columns if c.name == name), None)
        if found is None:
            raise KeyError(name)
        return found

    def _batch(
        self, rows: range, columns: Sequence[Column], *, encoded: bool = True, only: int | None = None
    ) -> pa.RecordBatch:
        """Packed rows, of all crops or of one."""
        index = self._index()
        modalities = dict.fromkeys(m for c in columns for m in self.reading.needs[c.name])
        keys = index.keys[rows.start : rows.stop]
        files = self._files()
        members = {m: [self._member(index, m, row, files) for row in rows] for m in modalities if m in index.columns}
        try:
            values = self.reading.values(keys, members, columns, encoded=encoded, only=only)
            return packed.build(columns, self.num_crops if only is None else 1, keys, values)
        except ValueError as error:
            raise ValueError(f"{self.path}: {error}") from error

    def _member(self, index: TarIndex, modality: str, row: int, files: _Files) -> Member:
        where = index.columns[modality]
        offset, size = int(where.offsets[row]), int(where.sizes[row])
        data = os.pread(files.handles[where.tar], size, offset)
        if len(data) != size:
            raise ValueError(f"{self.files[where.tar].name} was cut short since it was indexed: start again")
        return ml4m.member(index.keys[row], where.suffixes[row], data)

    # -- what is known of all rows -----------------------------------------------------------------------------------

    def _known(
        self, what: str, of: Callable[[Column, pa.Array], np.ndarray], dtype: type[np.generic], names: Sequence[str]
    ) -> np.ndarray:
        columns = [self._column(name) for name in names]
        out = np.stack([self._of_all(what, of, dtype, c) for c in columns], axis=1) if columns else None
        out = np.zeros((self.num_rows, 0), dtype) if out is None else out
        out.flags.writeable = False
        return out

    def _of_all(
        self, what: str, of: Callable[[Column, pa.Array], np.ndarray], dtype: type[np.generic], column: Column
    ) -> np.ndarray:
        if not _varies(what, column):
            return np.full(self.num_rows, 1 if what == "present" else column.max_tokens, dtype)
        name = hashlib.sha256(
            "\n".join((self._identity, self.reading.identity, repr(column), what)).encode()
        ).hexdigest()
        file = self._folder / f"{name}.npy"

        def found() -> np.ndarray:
            rows = [range(i, min(i + _AT_ONCE, self.num_rows)) for i in range(0, self.num_rows, _AT_ONCE)]
            parts = [self._batch(some, [column], encoded=what == "lengths").column(column.name) for some in rows]
            return np.concatenate([np.zeros(0, dtype), *(of(column, part) for part in parts)]).astype(dtype)

        def kept() -> tuple[np.ndarray, list[int]]:
            with locked(self._folder / "locks" / f"known-{name[:2]}"):
                values = _tar_index.load_array(file, dtype, (self.num_rows,))
                if values is None:
                    values = found()
                    _tar_index.save_array(file, values)
            return values, []

        return _opened.here.get(name, kept)

    # -- files --------------------------------------------------------------------------------------------------------

    @property
    def _folder(self) -> Path:
        return self.cache.base / "tars"

    @cached_property
    def _identity(self) -> str:
        return _tar_index.identity(self.tars, [file.tag for file in self.files], dict(self.reading.names))

    def _index(self) -> TarIndex:
        index = self._found_index()
        if len(index.keys) != self.num_rows:
            raise ValueError(f"{self.path} has {len(index.keys)} keys, expected {self.num_rows}: start again")
        return index

    def _found_index(self) -> TarIndex:
        file = self._folder / f"{self._identity}.arrow"

        def kept() -> tuple[TarIndex, list[int]]:
            index = _tar_index.load(file)
            if index is None:
                with locked(self._folder / "locks" / f"index-{self._identity[:2]}"):
                    index = _tar_index.load(file)
                    if index is None:
                        files = self._files()  # held: they are closed when nobody does
                        index = _tar_index.made(self.tars, files.handles, dict(self.reading.names))
                        _tar_index.save(file, index)
            return index, []

        return _opened.here.get(self._identity, kept)

    def _files(self) -> _Files:
        return _opened.tars.get(self._identity, lambda: (_Files(self._open()), []))

    def _open(self) -> list[int]:
        handles: list[int] = []
        try:
            for file in self.files:
                if not self.local:
                    handles.append(self.cache.open(file))
                    continue
                handles.append(os.open(Path(file.root, file.path), os.O_RDONLY))
                if _disk.tag_of(os.fstat(handles[-1])) != file.tag:
                    raise ValueError(f"{file.name} has changed since it was listed: start again")
        except BaseException:
            for handle in handles:
                os.close(handle)
            raise
        return handles


class _Files:
    """Open files, which are closed when nobody uses them any more."""

    def __init__(self, handles: list[int]) -> None:
        self.handles = handles

    def __del__(self) -> None:
        for handle in self.handles:
            os.close(handle)


def _varies(what: str, column: Column) -> bool:
    """Whether it has to be looked at to know of a row; a modality that is packed by crops has something for each."""
    if column.kind == "embeddings":
        return True
    if column.kind != "sequence":
        return False
    codec = column.source
    return codec.choice == "any" or (what == "lengths" and type(codec).assemble is TextLike.assemble)


def tar_shards(shards: Sequence[Tars], reading: Reading, cache: ShardCache) -> list[TarShard]:
    """The shards, indexed where they were not yet: that reads every header once, and downloads what is in a store.

    ValueError when a tar is damaged or tars of a shard are not aligned, FileNotFoundError when one is not there.
    """
    parents = dict.fromkeys(_split(url)[0] for tars in shards for _, url in tars.urls)
    stores = {parent: Store(parent) for parent in parents}
    with ThreadPoolExecutor(_THREADS) as threads:
        listed = threads.map(lambda store: {e.name: e for e in store.entries("")}, stores.values())
        entries = dict(zip(stores, listed, strict=True))
    made = []
    for tars in shards:
        places = [_split(url) for _, url in tars.urls]
        files = tuple(_remote(stores[parent], entries[parent], name) for parent, name in places)
        local = all(stores[parent].local for parent, _ in places)
        if local != any(stores[parent].local for parent, _ in places):
            raise ValueError(f"{tars.name}: some tars are on this machine and some are not, expected one or the other")
        made.append(TarShard(tars, files, reading, cache, local, 0))
    order = list(range(len(made)))
    random.Random(os.getpid()).shuffle(order)  # processes that begin together index different shards
    with ThreadPoolExecutor(_THREADS) as threads:
        counts = dict(zip(order, threads.map(lambda i: len(made[i]._found_index().keys), order), strict=True))
    return [replace(shard, num_rows=counts[i]) for i, shard in enumerate(made)]


def _split(url: str) -> tuple[str, str]:
    parent, _, name = url.rpartition("/")
    return parent or ("/" if url.startswith("/") else "."), name


def _remote(store: Store, entries: Mapping[str, Entry], name: str) -> Remote:
    if name not in entries:
        raise FileNotFoundError(f"{store.name}/{name} is not there")
    return Remote(store.url, name, entries[name].size, tag=entries[name].tag)
