"""A finished dataset changed: columns forgotten, columns renamed. The same call completes one that was cut short.

What is promised at every instant: no reader sees a record without its tar, and a column that is being renamed is whole
under one name or the other.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

from dataengine import modalities, plugins, provenance, shards
from dataengine.index import record_path
from dataengine.manifest import Commit, Conflict, Dataset, tar_path
from dataengine.storage import Store

PACKED = "tokens"
"""The column of packed shards, which are Arrow files and no tars."""

_THREADS = 4
"""Cells handled at once: object stores answer slowly, and each thread may hold one tar in memory."""

T = TypeVar("T")


@dataclass(frozen=True)
class Dropped:
    """What became of one column: the records and the files (tars, unfinished rows) that were deleted."""

    column: str
    num_cells: int
    num_files: int


def drop(dataset: Dataset, columns: Sequence[str], forced: Collection[str] = ()) -> list[Dropped]:
    """Forget columns: the records of each, then its tars and what lies in staging for it.

    ValueError, and nothing changed, for an ingested column, for a name that is neither a column nor a modality, and
    for one that another column was made from, unless that one goes too or `forced` names it.
    """
    for column in columns:
        _known(dataset, column)
    if stray := [c for c in forced if c not in columns]:
        raise ValueError(f"--force {', '.join(stray)}: not among the columns to drop, {', '.join(columns)}")
    sources = made_from(dataset)
    for column in columns:
        users = [m for m, inputs in sources.items() if column in inputs and m not in columns]
        if users and column not in forced:
            raise ValueError(
                f"{', '.join(users)} was made from {column}: drop it too, or --force {column} to keep what could then "
                "not be made again"
            )
    # What was made from a column goes before it, so that an interruption leaves nothing without its source.
    ordered = sorted(set(columns), key=lambda c: (-_depth(c, sources), c))
    return [_drop(dataset, column) for column in ordered]


def _drop(dataset: Dataset, column: str) -> Dropped:
    """Records first; then whatever is in the column's folders, which an interruption may have left without one."""
    cells = dataset.committed(column)
    dataset.store.remove_many([record_path(column, shard) for shard in cells])
    files = [*_below(dataset.store, column), *_below(dataset.store, f"staging/{column}")]
    dataset.store.remove_many(files)
    return Dropped(column, len(cells), len(files))


def _below(store: Store, folder: str) -> Iterator[str]:
    for name in store.files(folder):
        yield f"{folder}/{name}"
    for name in store.folders(folder):
        yield from _below(store, f"{folder}/{name}")


def rename(dataset: Dataset, old: str, new: str, forced: bool = False) -> int:
    """Give a column another name, its cells' bytes unchanged; the number of cells that had the old name.

    Every cell first gets its tar (a hard link on a local disk) and its record under the new name, then all are
    forgotten under the old one. The records are those of the old cells with the identity that the same labeler would
    have under the new name (so that labelling it again does nothing) and the former names in
    `provenance["renamed"]`. ValueError, and nothing changed: an ingested column, another kind of value, no such column,
    a column that others were made from, or one whose identity can not be carried over; `forced` allows the last two,
    keeping the identity as it was. Conflict when something else has the new name.
    """
    if old == new:
        raise ValueError(f"{old} has that name already")
    for column in (old, new):
        _known(dataset, column)
    _same_kind(old, new)
    cells, there = dataset.committed(old), dataset.committed(new)
    if not cells:
        if there and _former(dataset, new, there[0]) == old:
            _drop(dataset, old)
            return 0
        known = dataset.modalities()
        raise ValueError(f"no column {old!r}{plugins.nearest(old, known)}; there is: {', '.join(known)}")
    users = [m for m, inputs in made_from(dataset).items() if old in inputs]
    if users and not forced:
        raise ValueError(
            f"{', '.join(users)} was made from {old}, and would name an input that is not there any more: drop it "
            "first, or --force to keep it as it is"
        )
    for shard in there:
        _check_own(dataset, old, new, shard, forced)
    each(lambda shard: _rename(dataset, old, new, shard, forced), cells)
    _drop(dataset, old)
    return len(cells)


def _rename(dataset: Dataset, old: str, new: str, shard: int, forced: bool) -> None:
    record = existing(dataset, old, shard)
    copy_cell(dataset, record, dataset, _renamed(dataset, record, new, forced))


def _check_own(dataset: Dataset, old: str, new: str, shard: int, forced: bool) -> None:
    """Conflict unless the cell of the new name is one that this very renaming has made before it was cut short."""
    source = dataset.commit(old, shard)
    own = (
        _former(dataset, new, shard) == old
        if source is None
        else dataset.commit(new, shard) == _renamed(dataset, source, new, forced)
    )
    if not own:
        raise Conflict(f"{tar_path(new, shard)} is there and is not {old}'s: drop or rename {new} first")


def _former(dataset: Dataset, column: str, shard: int) -> str | None:
    names = existing(dataset, column, shard).provenance.get("renamed") or [None]
    return names[-1]


def _renamed(dataset: Dataset, record: Commit, new: str, forced: bool) -> Commit:
    spec = _spec_as(dataset, record, new)
    if spec is None:
        if not forced:
            raise ValueError(
                f"{record.file}: its identity {record.spec[:12]} is not that of its recorded settings and the inputs "
                f"that are here now, so `label` would not know it as {new}; --force renames it all the same"
            )
        spec = record.spec
    made = {**record.provenance, "renamed": [*record.provenance.get("renamed", []), record.modality]}
    return replace(record, modality=new, spec=spec, file=tar_path(new, record.shard), provenance=made)


def _spec_as(dataset: Dataset, record: Commit, new: str) -> str | None:
    """The identity that the same labeler on the same inputs has when its column is called `new`.

    It can be had because a record holds all that went into its identity; None when that does not add up to it.
    """
    made = record.provenance
    if not {"labeler", "version", "settings", "weights", "inputs"} <= set(made):
        return None
    identity = {k: made[k] for k in ("labeler", "version", "settings")}
    identity["weights"] = None if made["weights"] is None else made["weights"]["sha256"]
    inputs = {}
    for m in sorted({"rgb", *made["inputs"]}):
        source = dataset.commit(m, record.shard)
        if source is None:
            return None
        inputs[m] = source.spec
    if provenance.spec({**identity, "emits": record.modality}, inputs) != record.spec:
        return None
    return provenance.spec({**identity, "emits": new}, inputs)


def _same_kind(old: str, new: str) -> None:
    names = [modalities.split(name)[0] for name in (old, new)]
    if names[0] != names[1]:
        raise ValueError(
            f"{new} would be read as {names[1]}, and {old} holds {names[0]}: expected a name like {names[0]}@v2"
        )


def made_from(dataset: Dataset) -> Mapping[str, tuple[str, ...]]:
    """What each column was made from, by the record of its first cell."""
    found = {}
    for column in dataset.modalities():
        made = existing(dataset, column, dataset.committed(column)[0]).provenance
        found[column] = tuple(made.get("inputs") or made.get("columns") or ())
    return found


def _depth(column: str, sources: Mapping[str, tuple[str, ...]], path: tuple[str, ...] = ()) -> int:
    """How many columns lie between one and the image."""
    inputs = [c for c in sources.get(column, ()) if c not in path]
    return 1 + max((_depth(c, sources, (*path, column)) for c in inputs), default=-1)


def existing(dataset: Dataset, column: str, shard: int) -> Commit:
    """The commit record of a cell that is known to be there; Conflict when somebody has just removed it."""
    record = dataset.commit(column, shard)
    if record is None:
        raise Conflict(f"{tar_path(column, shard)} vanished: is another program changing {dataset.store.name}?")
    return record


def records(dataset: Dataset, column: str, cells: Iterable[int], threads: int = 16) -> Iterator[Commit]:
    """The commit records of some cells of a column in their order, read in parallel and few of them at a time."""
    paths = (record_path(column, shard) for shard in cells)
    for path, data in dataset.store.read_many(paths, threads):
        if data is None:
            raise Conflict(f"{path} vanished: is another program changing {dataset.store.name}?")
        record = json.loads(data)
        yield Commit(**{**record, "keys": tuple(record["keys"])})


def _known(dataset: Dataset, column: str) -> None:
    if column in dataset.plan.ingested:
        raise ValueError(f"{column} was ingested: it belongs to the dataset; `dataengine export` can leave it out")
    if column not in dataset.store.folders("commits"):
        modalities.load(column)  # raises with the nearest name: a mistyped column must not pass for one that is gone


def copy_cell(source: Dataset, record: Commit, target: Dataset, new: Commit) -> None:
    """Commit a cell with the bytes of another, under another name or root; Conflict when there is another one.

    A hard link where both lie on one local disk (a tar is never changed in place), else the bytes are read, held to
    the record and published. A file without a record that is in the way is replaced, as `Dataset.publish` does.
    """
    there = target.commit(new.modality, new.shard)
    if there is None:
        if _linked(source.store, record, target.store, new):
            target.record(new)
        else:
            data = source.store.read(record.file)
            if shards.sha256(data) != record.sha256:
                raise ValueError(f"{record.file} does not have the sha256 of its commit record {record.sha256}")
            target.publish(new, data)
        there = existing(target, new.modality, new.shard)
    if (there.spec, there.sha256) != (new.spec, new.sha256):
        raise Conflict(f"{new.file} of {target.store.name} is committed with other content: it was kept")


def _linked(source: Store, record: Commit, target: Store, new: Commit) -> bool:
    """Whether the new file now is the old one under a second name."""
    if not (source.local and target.local):
        return False
    origin, path = Path(source.base, record.file), Path(target.base, new.file)
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        os.link(origin, path)
    except FileExistsError:
        return path.samefile(origin)
    except FileNotFoundError:
        raise ValueError(f"{record.file} has a commit record and is not there: run `dataengine verify`") from None
    except OSError:
        return False  # another disk, or one without hard links
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)
    return True


def each(do: Callable[[T], Any], items: Iterable[T]) -> None:
    """Do something for every cell, a few at once; the first error ends it."""
    with ThreadPoolExecutor(_THREADS) as threads:
        for _ in threads.map(do, items):
            pass
