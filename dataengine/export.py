"""Some columns of a dataset as a plain tree of tars, for readers that know no commit records and no validity."""

from __future__ import annotations

import functools
import hashlib
import itertools
import json
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np

from dataengine import shards
from dataengine.evolve import PACKED, existing, records
from dataengine.manifest import Commit, Conflict, Dataset, tar_path
from dataengine.shards import Member
from dataengine.storage import Store

MANIFEST = "export.json"
"""Written last: an export that has it is whole."""

_STARTED = "export.partial.json"
"""Written first and removed last: what the tars that are there already were made of."""


@dataclass(frozen=True)
class Piece:
    """Rows start..stop, counted among the kept ones, of one shard of the dataset."""

    shard: int
    start: int
    stop: int


@dataclass(frozen=True)
class Layout:
    """What an export will hold: its columns, what each of its shards is made of, and what is left out and why."""

    columns: tuple[str, ...]
    drop_invalid: bool
    shard_size: int | None
    pieces: tuple[tuple[Piece, ...], ...]
    num_samples: int
    num_dropped: int
    skipped: dict[str, str]
    source: str
    """sha256 over every cell that is read: content and failed labels."""
    invalid: dict[str, int]
    """How many placeholders for failed labels each column of the export holds."""
    masks: dict[int, np.ndarray] = field(default_factory=dict)
    """For shards with samples that are left out: a bit for each key, 1 where it is kept, packed into uint8."""


class Form(Protocol):
    """How a certain reader needs columns to be."""

    name: str

    def folder(self, column: str) -> str:
        """Where its tars go."""

    def form(self, column: str, num_crops: int) -> Callable[[Member], Member]:
        """What becomes of its members."""


def layout(dataset: Dataset, columns: Sequence[str], drop_invalid: bool, shard_size: int | None) -> Layout:
    """Plan an export of some columns, of all that are complete and meaningful when none is named; reads records only.

    With none named, `skipped` tells which columns are left out: incomplete ones, packed tokens, and what random weights
    had a part in. ValueError when a named column cannot be exported. Without a shard size every shard stays one.
    """
    if shard_size is not None and shard_size < 1:
        raise ValueError(f"shard size {shard_size}: expected at least 1")
    known = dataset.modalities()
    chosen, skipped, num_samples = [], {}, 0
    for column in columns or known:
        why = _hindrance(dataset, column, known, named=bool(columns))
        if why is None:
            chosen.append(column)
        elif columns:
            raise ValueError(f"{column} {why}")
        else:
            skipped[column] = why
    digest, counts, masks = hashlib.sha256(), [], {}
    invalid: Counter[str] = Counter()
    cells = dataset.committed("rgb")
    columns_read = [records(dataset, column, cells, threads=4) for column in ("rgb", *chosen)]
    for shard, rgb, *read in zip(cells, *columns_read, strict=True):
        for record in read:
            what = [record.modality, shard, record.sha256, sorted(record.invalid.items())]
            digest.update(json.dumps(what).encode())
            invalid[record.modality] += 0 if drop_invalid else len(record.invalid)
        _check_aligned(rgb, read)
        bad = set().union(*(r.invalid for r in read)) if drop_invalid else set()
        if bad:
            masks[shard] = np.packbits([key not in bad for key in rgb.keys])
        counts.append((shard, rgb.num_samples - len(bad)))
        num_samples += rgb.num_samples
    kept = sum(n for _, n in counts)
    return Layout(
        tuple(chosen),
        drop_invalid,
        shard_size,
        tuple(_pieces(counts, shard_size)),
        kept,
        num_samples - kept,
        skipped,
        digest.hexdigest(),
        dict(sorted((+invalid).items())),
        masks,
    )


def _check_aligned(rgb: Commit, others: Sequence[Commit]) -> None:
    for record in others:
        if record.keys_sha256 != rgb.keys_sha256:
            raise ValueError(f"{record.file} does not list the keys of {rgb.file}: run `dataengine verify`")


def _hindrance(dataset: Dataset, column: str, known: Sequence[str], named: bool) -> str | None:
    """Why a column cannot be exported, or is not unless it is named."""
    if column not in known:
        return f"is no column of this dataset; there is: {', '.join(known)}"
    if column == PACKED:
        return "is packed for the trainer of this project and no tar"
    there, of = len(dataset.committed(column)), len(dataset.committed("rgb"))
    if there < of:
        return f"is committed in {there} of {of} shards"
    if not named and existing(dataset, column, dataset.committed(column)[0]).provenance.get("random"):
        return "comes from random weights"
    return None


def _pieces(counts: Sequence[tuple[int, int]], shard_size: int | None) -> list[tuple[Piece, ...]]:
    """What each shard of the export is made of, from (shard, kept samples) in order; no shard is empty."""
    if shard_size is None:
        return [(Piece(shard, 0, count),) for shard, count in counts if count]
    out: list[tuple[Piece, ...]] = []
    open_: list[Piece] = []
    room = shard_size
    for shard, count in counts:
        start = 0
        while start < count:
            stop = min(start + room, count)
            open_.append(Piece(shard, start, stop))
            room -= stop - start
            start = stop
            if room == 0:
                out.append(tuple(open_))
                open_, room = [], shard_size
    return [*out, tuple(open_)] if open_ else out


def export(
    dataset: Dataset,
    out: str,
    plan: Layout,
    on_tar: Callable[[str], None] = lambda path: None,
    reader: Form | None = None,
) -> dict[str, Any]:
    """Write `<column>/shard-00000.tar` for every column under `out`, and `export.json`, which it returns, last.

    All tars of a number hold the same keys in the same order. Run it again to complete one that was cut short: tars
    that are there are kept. Conflict when something else is under `out`, or the dataset has changed in between.
    `reader` says how it needs the columns to be; without one they have the bytes that they have in the dataset.
    """
    if not plan.num_samples:
        raise ValueError(f"nothing to export: none of {plan.num_dropped} samples is valid in {', '.join(plan.columns)}")
    target = Store(out)
    asked = {
        "plan": dataset.plan.fingerprint,
        "source": plan.source,
        "columns": list(plan.columns),
        "drop_invalid": plan.drop_invalid,
        "shard_size": plan.shard_size,
    }
    folders = {column: column for column in plan.columns}
    if reader is not None:
        folders = {column: reader.folder(column) for column in plan.columns}
        asked["reader"] = reader.name
    if _claim(target, asked, list(folders.values())):
        manifest: dict[str, Any] = json.loads(target.read(MANIFEST))
        return manifest
    tars: dict[str, list[dict[str, Any]]] = {}
    for column in plan.columns:
        source = _Column(dataset, column, plan.masks)
        tars[column] = []
        for number, pieces in enumerate(plan.pieces):
            path = tar_path(folders[column], number)
            if target.exists(path):
                data = target.read(path)
            else:
                members: Iterable[Member] = itertools.chain.from_iterable(source.rows(p) for p in pieces)
                if reader is not None:
                    members = map(reader.form(column, dataset.plan.num_crops), members)
                data = shards.build_tar(members)
                target.publish(path, data)
            tars[column].append({"sha256": shards.sha256(data), "num_bytes": len(data)})
            on_tar(path)
    manifest = {
        **asked,
        "num_samples": plan.num_samples,
        "num_dropped": plan.num_dropped,
        "skipped": plan.skipped,
        "shards": [sum(p.stop - p.start for p in pieces) for pieces in plan.pieces],
        "invalid": plan.invalid,
        "random": [c for c in plan.columns if existing(dataset, c, dataset.committed(c)[0]).provenance.get("random")],
        "tars": tars,
    }
    target.publish(MANIFEST, _json(manifest))
    target.remove(_STARTED)
    return manifest


def _claim(target: Store, asked: dict[str, Any], folders: Sequence[str]) -> bool:
    """Whether the target is this very export, and whole; Conflict when it was, or is being, made of something else."""
    for name in (MANIFEST, _STARTED):
        if target.exists(name):
            there = json.loads(target.read(name))
            other = [k for k in {"reader": None, **asked} if there.get(k) != asked.get(k)]
            if other:
                raise Conflict(f"{name} is there, of an export with another {', '.join(other)}: use another folder")
            if name == MANIFEST and target.exists(_STARTED):
                target.remove(_STARTED)
            return name == MANIFEST
    taken = [folder for folder in folders if target.files(folder)]
    if taken or target.exists("plan.json"):
        raise Conflict(f"there is {', '.join(taken) or 'a dataset'} already, and no {MANIFEST}: use an empty folder")
    target.publish(_STARTED, _json(asked))
    return False


class _Column:
    """Kept rows of one column; the shard read last stays in memory, since the next piece is often of the same."""

    def __init__(self, dataset: Dataset, column: str, masks: dict[int, np.ndarray]) -> None:
        self._dataset, self._column, self._masks = dataset, column, masks
        self._members = functools.lru_cache(maxsize=1)(self._read)

    def _read(self, shard: int) -> list[Member]:
        members = self._dataset.read(self._column, shard)
        if shard not in self._masks:
            return members
        kept = np.unpackbits(self._masks[shard], count=len(members))
        return [m for m, keep in zip(members, kept, strict=True) if keep]

    def rows(self, piece: Piece) -> Iterator[Member]:
        """The members of a piece, with the bytes they have in the dataset."""
        yield from self._members(piece.shard)[piece.start : piece.stop]


def _json(value: Any) -> bytes:
    return (json.dumps(value, sort_keys=True, indent=1, ensure_ascii=False) + "\n").encode()
