"""Several datasets as one, and one as two: whole shards under new numbers, their bytes and identities as they were.

The same call completes one that was cut short. A shard's rgb record is written last, so a shard that is there has all
its columns.
"""

from __future__ import annotations

import hashlib
import json
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import PurePosixPath
from typing import Any

import numpy as np

from dataengine.evolve import copy_cell, each, existing, records
from dataengine.manifest import Commit, Dataset, Plan
from dataengine.shards import shard_name

_SAME = ("ingested", "num_crops", "min_crop_scale", "limits")
"""Fields of a plan that decide what a column holds, or that its readers must know."""

_NAMED = 1000
"""Of how many clashing keys the places are looked up."""


@dataclass(frozen=True)
class Combined:
    """What a merge or a split has made; `left_out` says why a column is not in it."""

    num_shards: int
    columns: tuple[str, ...]
    left_out: dict[str, str] = field(default_factory=dict)


def merge(
    out: Dataset,
    roots: Sequence[Dataset],
    columns: Sequence[str] = (),
    on_shard: Callable[[int], None] = lambda n: None,
) -> Combined:
    """One dataset from several, their shards numbered on in the order given.

    It gets the columns that are complete in all roots, or those of `columns` beside the ingested ones. ValueError,
    before anything is written: another way of ingesting, a root that is not wholly ingested, a column made otherwise
    in two roots, or a key that is in two shards. Conflict when `out` holds something else.
    """
    if len(roots) < 2:
        raise ValueError(f"merge: expected at least two roots, got {len(roots)}")
    plans = [root.plan for root in roots]
    for root, plan in zip(roots, plans, strict=True):
        _check_ingested(root, plan)
        other = [name for name in _SAME if getattr(plan, name) != getattr(plans[0], name)]
        if other:
            said = "; ".join(f"{n}: {getattr(plans[0], n)!r} and {getattr(plan, n)!r}" for n in other)
            raise ValueError(f"{roots[0].store.name} and {root.store.name} were ingested otherwise ({said})")
    chosen, left_out = _columns(roots, plans[0].ingested, columns)
    _check_makers(roots, [c for c in chosen if c not in plans[0].ingested])
    parts = [(root, shard) for root, plan in zip(roots, plans, strict=True) for shard in range(plan.num_shards)]
    _check_keys(roots, sum(plan.num_items for plan in plans))
    out.write_plan(
        replace(
            plans[0],
            corpus=" + ".join(dict.fromkeys(plan.corpus for plan in plans)),
            shard_size=max(plan.shard_size for plan in plans),
            num_shards=len(parts),
            num_items=sum(plan.num_items for plan in plans),
            fingerprint=_fingerprint("merge", [plan.fingerprint for plan in plans]),
        )
    )
    prints = {id(root): plan.fingerprint for root, plan in zip(roots, plans, strict=True)}

    def copy(number: int) -> None:
        root, shard = parts[number]
        _copy_shard(out, number, root, shard, chosen, prints[id(root)])
        on_shard(number)

    each(copy, range(len(parts)))
    return Combined(len(parts), tuple(chosen), left_out)


def split(
    outs: tuple[Dataset, Dataset],
    root: Dataset,
    first: Sequence[int],
    on_shard: Callable[[int], None] = lambda n: None,
) -> tuple[Combined, Combined]:
    """Two datasets from one: the shards of `first`, and the others, with every cell that is committed.

    ValueError, before anything is written, when one of them would be empty or `first` names what is not there.
    """
    plan = root.plan
    _check_ingested(root, plan)
    if stray := sorted(set(first) - set(range(plan.num_shards))):
        raise ValueError(f"{root.store.name} has the shards 0 to {plan.num_shards - 1}, not {_list(stray)}")
    parts = (sorted(set(first)), sorted(set(range(plan.num_shards)) - set(first)))
    if not all(parts):
        raise ValueError(f"{len(parts[0])} of {plan.num_shards} shards to the first root: both need at least one")
    if len({d.store.url for d in (*outs, root)}) < 3:
        raise ValueError("split: expected three different roots")
    columns = root.modalities()
    return (
        _split_off(outs[0], root, plan, parts[0], columns, on_shard),
        _split_off(outs[1], root, plan, parts[1], columns, on_shard),
    )


def _split_off(
    out: Dataset,
    root: Dataset,
    plan: Plan,
    part: Sequence[int],
    columns: Sequence[str],
    on_shard: Callable[[int], None],
) -> Combined:
    out.write_plan(
        replace(
            plan,
            num_shards=len(part),
            num_items=sum(_num_items(existing(root, "rgb", shard)) for shard in part),
            fingerprint=_fingerprint("split", [plan.fingerprint, *part]),
        )
    )

    def copy(number: int) -> None:
        _copy_shard(out, number, root, part[number], columns, plan.fingerprint)
        on_shard(part[number])

    each(copy, range(len(part)))
    return Combined(len(part), tuple(columns))


def evenly(fraction: float, num_shards: int) -> list[int]:
    """A fraction of the shards, spread evenly over their numbers, at least one on either side if there are two.

    Spread, because a corpus often lies in an order that means something.
    """
    if not 0 < fraction < 1:
        raise ValueError(f"fraction {fraction}: expected more than 0 and less than 1")
    count = min(max(round(fraction * num_shards), 1), num_shards - 1)
    return [i for i in range(num_shards) if (i + 1) * count // num_shards > i * count // num_shards]


def ranges(text: str) -> list[int]:
    """The numbers of `0-99,120`, ascending."""
    found: set[int] = set()
    for part in text.split(","):
        start, dash, stop = part.strip().partition("-")
        if not start.isdigit() or (dash and not stop.isdigit()) or (dash and int(stop) < int(start)):
            raise ValueError(f"shards {text!r}: expected numbers and ranges such as 0-99,120, found {part!r}")
        found |= set(range(int(start), int(stop or start) + 1))
    return sorted(found)


def _check_ingested(root: Dataset, plan: Plan) -> None:
    for column in plan.ingested:
        there = len(root.committed(column))
        if there < plan.num_shards:
            raise ValueError(
                f"{root.store.name} is not wholly ingested: {column} is committed in {there} of {plan.num_shards} "
                "shards"
            )


def _columns(
    roots: Sequence[Dataset], ingested: Sequence[str], named: Sequence[str]
) -> tuple[list[str], dict[str, str]]:
    """The columns to merge, and why the others are left out; ValueError when a named one would be."""
    found = list(dict.fromkeys([*ingested, *(c for root in roots for c in root.modalities())]))
    for column in named:
        if column not in found:
            raise ValueError(f"{column} is no column of any root; there is: {', '.join(found)}")
    chosen, left_out = [], {}
    for column in found:
        short = [r for r in roots if len(r.committed(column)) < r.plan.num_shards]
        why = f"is not complete in {', '.join(r.store.name for r in short)}"
        if short and column in named:
            raise ValueError(f"{column} {why}")
        if short:
            left_out[column] = why
        elif named and column not in named and column not in ingested:
            left_out[column] = "was not asked for"
        else:
            chosen.append(column)
    return chosen, left_out


def _check_makers(roots: Sequence[Dataset], columns: Sequence[str]) -> None:
    """ValueError when a column would hold two things: a name in one dataset stands for one maker."""
    for column in columns:
        makers = [_maker(existing(root, column, 0)) for root in roots]
        for root, maker in zip(roots, makers, strict=True):
            other = [k for k in {**makers[0], **maker} if makers[0].get(k) != maker.get(k)]
            if other:
                said = "; ".join(f"{k}: {makers[0].get(k)!r} and {maker.get(k)!r}" for k in other)
                raise ValueError(
                    f"{column} was made otherwise in {roots[0].store.name} and {root.store.name} ({said}): make it "
                    "anew in one of them, rename it, or leave it out with --columns"
                )


def _maker(record: Commit) -> dict[str, Any]:
    made = record.provenance
    found: dict[str, Any] = {k: made[k] for k in ("labeler", "version", "settings", "inputs", "columns") if k in made}
    return {**found, "weights": (made.get("weights") or {}).get("sha256")}


def _check_keys(roots: Sequence[Dataset], num_items: int) -> None:
    """ValueError when two shards share a key.

    Eight bytes a key are held (96 MB for twelve million), by a hash whose few chance meetings are looked into; a key
    is a string in memory only while its shard is read.
    """
    hashes = np.empty(num_items, np.uint64)
    count = 0
    for root, record in _rgb(roots):
        if count + len(record.keys) > num_items:
            raise ValueError(f"{root.store.name} holds more samples than the {root.plan.num_items} items of its plan")
        hashes[count : count + len(record.keys)] = np.fromiter(map(_hash, record.keys), np.uint64, len(record.keys))
        count += len(record.keys)
    hashes = hashes[:count]
    hashes.sort()
    twice = np.unique(hashes[1:][hashes[1:] == hashes[:-1]])
    if not len(twice):
        return
    looked, places = set(twice[:_NAMED].tolist()), defaultdict(list)
    for root, record in _rgb(roots):
        for key in record.keys:
            if _hash(key) in looked:
                places[key].append(f"{root.store.name}/{shard_name(record.shard)}")
    shared = {key: where for key, where in places.items() if len(where) > 1}
    if shared:
        said = "; ".join(f"{key} in {' and '.join(where)}" for key, where in sorted(shared.items())[:5])
        count = len(shared) if len(twice) <= _NAMED else len(twice)
        raise ValueError(f"{count} keys are not unique, and a key names one sample of a dataset: {said}")


def _rgb(roots: Sequence[Dataset]) -> Iterator[tuple[Dataset, Commit]]:
    """The rgb records of all roots, in order."""
    for root in roots:
        for record in records(root, "rgb", range(root.plan.num_shards)):
            yield root, record


def _hash(key: str) -> int:
    return int.from_bytes(hashlib.blake2b(key.encode(), digest_size=8).digest(), "little")


def _copy_shard(out: Dataset, number: int, root: Dataset, shard: int, columns: Sequence[str], fingerprint: str) -> None:
    name = f"quarantine/{shard_name(shard)}.jsonl"
    if root.store.exists(name):
        out.store.publish(f"quarantine/{shard_name(number)}.jsonl", root.store.read(name))
    for record in _records(root, shard, columns):
        path = PurePosixPath(record.file)
        origin = [*record.provenance.get("origin", []), {"plan": fingerprint, "shard": shard}]
        new = replace(
            record,
            shard=number,
            file=f"{path.parent}/{shard_name(number)}{path.suffix}",
            provenance={**record.provenance, "origin": origin},
        )
        copy_cell(root, record, out, new)


def _records(root: Dataset, shard: int, columns: Sequence[str]) -> Iterator[Commit]:
    """The committed cells of a shard, rgb last."""
    for column in sorted(columns, key=lambda c: (c == "rgb", c)):
        record = root.commit(column, shard)
        if record is not None:
            yield record


def _num_items(record: Commit) -> int:
    return record.num_samples + int(record.provenance.get("num_refused", 0))


def _fingerprint(what: str, parts: Sequence[Any]) -> str:
    return hashlib.sha256(json.dumps([what, *parts]).encode()).hexdigest()


def _list(numbers: Sequence[int]) -> str:
    return ", ".join(map(str, numbers[:5])) + (" ..." if len(numbers) > 5 else "")
