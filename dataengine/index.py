"""Summaries of all commit records, cached in `runs/`: what planning and status read instead of every record."""

from __future__ import annotations

import hashlib
import json
import os
import re
import time
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from dataengine.storage import Entry, Store

PATH = "runs/index.arrow"
"""Where the cache lies: an Arrow IPC stream, one batch a modality, then the sha256 of the stream. Never truth."""

_SCHEMA = pa.schema(
    [
        ("modality", pa.string()),
        ("shard", pa.int32()),
        ("size", pa.int64()),  # size and change tag of the record object, as the store lists them
        ("tag", pa.string()),
        ("spec", pa.string()),
        ("sha256", pa.string()),
        ("num_bytes", pa.int64()),
        ("num_samples", pa.int64()),
        ("num_invalid", pa.int64()),
        ("random", pa.bool_()),
        ("maker", pa.string()),
        ("file", pa.string()),
    ],
    metadata={"format": "1"},
)
_LISTED = ("shard", "size", "tag")
_RECORD = re.compile(r"shard-(\d{5,})\.json")
_DIGEST_BYTES = 32
_TICK_SECONDS = 2.0
"""The coarsest clock of a file system in use (FAT)."""


@dataclass(frozen=True)
class Totals:
    """A column of a dataset in numbers; `maker` made its first cell, `random` says if random weights made any."""

    num_cells: int
    num_samples: int
    num_invalid: int
    num_bytes: int
    maker: str
    random: bool


class Index:
    """What the commit records say, as far as planning, status and `gc` need it; a snapshot of when it was opened.

    The truth is the records. What an earlier index read is taken over where the store lists the same size and change
    tag; the rest is read. Losing or damaging the cache costs time, nothing else, and so do two writers at once.
    """

    def __init__(self, columns: Mapping[str, pa.RecordBatch]) -> None:
        self._columns = columns

    @classmethod
    def open(cls, store: Store) -> Index:
        """The index of a dataset as it is now; renews the cache if anything changed and the store can be written."""
        opened, cached = time.time(), _load(store)
        found = {}
        names = store.folders("commits")
        with ThreadPoolExecutor(max_workers=1 if store.local else 16) as threads:
            listings = threads.map(lambda name: _listed(store, name), names)
            for name, listed in zip(names, listings, strict=True):
                batch = _column(store, name, listed, cached.get(name), opened)
                if batch.num_rows:
                    found[name] = batch
        _save(store, found, cached)
        return cls(found)

    def modalities(self) -> list[str]:
        """The columns with at least one committed cell, sorted."""
        return sorted(self._columns)

    def shards(self, modality: str) -> list[int]:
        """The committed shards of a column, ascending."""
        return self._values(modality, "shard")

    def specs(self, modality: str) -> dict[int, str]:
        """The identity of each committed cell of a column, by shard."""
        return dict(zip(self._values(modality, "shard"), self._values(modality, "spec"), strict=True))

    def num_samples(self, modality: str) -> dict[int, int]:
        """How many samples each committed cell of a column has, by shard."""
        return dict(zip(self._values(modality, "shard"), self._values(modality, "num_samples"), strict=True))

    def failed(self, modality: str) -> list[int]:
        """The shards of a column in which a label failed."""
        counts = self._values(modality, "num_invalid")
        return [shard for shard, count in zip(self.shards(modality), counts, strict=True) if count]

    def files(self) -> Iterator[str]:
        """The paths that commit records name, and those of the records themselves."""
        for name in self._columns:
            yield from self._values(name, "file")
            yield from (record_path(name, shard) for shard in self.shards(name))

    def totals(self, modality: str) -> Totals:
        """The numbers of a column that has committed cells."""
        batch = self._columns[modality]
        samples, invalid, num_bytes = (
            pc.sum(batch.column(name)).as_py() for name in ("num_samples", "num_invalid", "num_bytes")
        )
        made_by, random = batch.column("maker")[0].as_py(), pc.any(batch.column("random")).as_py()
        return Totals(batch.num_rows, samples, invalid, num_bytes, made_by, random)

    def _values(self, modality: str, field: str) -> list[Any]:
        batch = self._columns.get(modality)
        return [] if batch is None else batch.column(field).to_pylist()


def maker(provenance: Mapping[str, Any]) -> str:
    """Who made a cell: the corpus, a labeler, or the packer."""
    return str(provenance.get("labeler") or ("ingest" if "ingest" in provenance else "pack"))


def record_path(modality: str, shard: int) -> str:
    """Where the commit record of a cell lies."""
    return f"commits/{modality}/shard-{shard:05d}.json"


def _listed(store: Store, modality: str) -> pa.RecordBatch:
    """The records of a column as the store lists them: shard, size and tag, by shard."""
    rows = sorted((int(match[1]), e.size, e.tag) for e, match in _records(store.entries(f"commits/{modality}")))
    columns = zip(*rows, strict=True) if rows else ([], [], [])
    fields = [_SCHEMA.field(name) for name in _LISTED]
    return pa.record_batch(
        [pa.array(values, field.type) for values, field in zip(columns, fields, strict=True)], pa.schema(fields)
    )


def _records(entries: Iterable[Entry]) -> Iterator[tuple[Entry, re.Match[str]]]:
    for entry in entries:
        match = _RECORD.fullmatch(entry.name)
        if match is not None:
            yield entry, match


def _column(
    store: Store, modality: str, listed: pa.RecordBatch, cached: pa.RecordBatch | None, opened: float
) -> pa.RecordBatch:
    """The rows of one column: those of the cache that are still as listed, the others read."""
    if cached is not None and cached.select(_LISTED).equals(listed):
        return cached
    known = {} if cached is None else {row: i for i, row in enumerate(_rows(cached))}
    kept: list[int] = []
    missing: list[tuple[int, int, str]] = []
    for row in _rows(listed):
        if row in known:
            kept.append(known[row])
        else:
            missing.append(row)
    read = _read(store, (record_path(modality, shard) for shard, _, _ in missing))
    # A record that was listed and is gone was forgotten meanwhile: it is no cell.
    fresh = [
        (modality, shard, size, tag if _settled(store, path, opened) else "", *_summary(path, data))
        for (shard, size, tag), (path, data) in zip(missing, read, strict=True)
        if data is not None
    ]
    columns = zip(*fresh, strict=True) if fresh else [[] for _ in _SCHEMA]
    batch = pa.record_batch([pa.array(v, f.type) for v, f in zip(columns, _SCHEMA, strict=True)], _SCHEMA)
    if cached is None or not kept:
        return batch
    rows = pa.Table.from_batches([cached.take(pa.array(kept, pa.int32())), batch]).sort_by("shard").combine_chunks()
    return rows.to_batches()[0]


def _read(store: Store, paths: Iterable[str]) -> Iterator[tuple[str, bytes | None]]:
    """Each record, or None where there is none; few are held, for those of rgb are as long as their shard."""
    if not store.local:
        yield from store.read_many(paths)
        return
    # On a disk a thread that reads would wait longer for the interpreter than for the file.
    for path in paths:
        try:
            yield path, store.read(path)
        except FileNotFoundError:
            yield path, None


def _settled(store: Store, path: str, opened: float) -> bool:
    """Whether a later record under the same name is sure to get another tag; what is not settled is not cached.

    On a disk the tag is made of the time of last change, the size and the file's number: two records that one tick of
    the disk's clock saw written one after the other can have all three in common.
    """
    if not store.local:
        return True
    try:
        return os.stat(f"{store.base}/{path}").st_mtime < opened - _TICK_SECONDS
    except FileNotFoundError:
        return False


def _rows(batch: pa.RecordBatch) -> Iterator[tuple[int, int, str]]:
    return zip(*(batch.column(name).to_pylist() for name in _LISTED), strict=True)


def _summary(path: str, data: bytes) -> tuple[Any, ...]:
    """What the index keeps of a record; ValueError when the bytes are none."""
    try:
        record = json.loads(data)
        made = record["provenance"]
        return (
            str(record["spec"]),
            str(record["sha256"]),
            int(record["num_bytes"]),
            int(record["num_samples"]),
            len(record["invalid"]),
            bool(made.get("random")),
            maker(made),
            str(record["file"]),
        )
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} is no commit record ({type(error).__name__}: {error})") from error


def _load(store: Store) -> dict[str, pa.RecordBatch]:
    """The cached columns; none when there is no cache, or it is damaged or another program's."""
    try:
        data = memoryview(store.read(PATH))
        stream, digest = data[:-_DIGEST_BYTES], data[-_DIGEST_BYTES:]
        if hashlib.sha256(stream).digest() != digest:
            return {}
        with pa.ipc.open_stream(pa.py_buffer(stream)) as reader:
            if not reader.schema.equals(_SCHEMA, check_metadata=True):
                return {}
            return {batch.column("modality")[0].as_py(): batch for batch in reader}
    except (OSError, pa.ArrowException):
        return {}


def _save(store: Store, columns: Mapping[str, pa.RecordBatch], cached: Mapping[str, pa.RecordBatch]) -> None:
    settled = {}
    for name, batch in columns.items():
        rows = batch.filter(pc.not_equal(batch.column("tag"), ""))
        if rows.num_rows:
            settled[name] = rows
    if settled.keys() == cached.keys() and all(rows.equals(cached[name]) for name, rows in settled.items()):
        return
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, _SCHEMA, options=pa.ipc.IpcWriteOptions(compression="zstd")) as writer:
        for name in sorted(settled):
            writer.write_batch(settled[name])
    stream = sink.getvalue().to_pybytes()
    try:
        store.put(PATH, stream + hashlib.sha256(stream).digest())
    except OSError:
        # A root that may only be read, or a full disk: the next opening takes as long as this one.
        return
