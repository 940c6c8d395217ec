"""Label a sample of committed cells again, elsewhere, and compare: does what made them still give the same bytes?"""

from __future__ import annotations

import hashlib
import math
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from dataengine import modalities, shards
from dataengine.labeler import Labeler
from dataengine.manifest import Commit, Dataset, tar_path
from dataengine.validate import Problem, cells
from dataengine.work import LabelGroup, Task

Resolve = Callable[[Commit], tuple[Labeler, int]]
"""The labeler that made a cell, with its settings and weights, and its batch size; ValueError when it is not here."""


@dataclass(frozen=True)
class Replayed:
    """What became of one cell. `detail`: how the values differ, or why the cell cannot be made again."""

    modality: str
    shard: int
    outcome: Literal["same", "differs", "cannot"]
    detail: str = ""
    num_samples: int = 0
    seconds: float = 0.0

    def problem(self) -> Problem | None:
        """What is wrong, if anything is."""
        said = {"differs": "labelled again it differs: ", "cannot": "cannot replay: "}.get(self.outcome)
        return None if said is None else Problem(tar_path(self.modality, self.shard), "", said + self.detail)


@dataclass(frozen=True)
class Difference:
    """How two tars of one column differ."""

    num_samples: int
    num_differ: int
    """Samples whose members are not the same bytes."""
    num_values: int
    num_values_differ: int
    """Of the arrays of those samples: pixels, features or ids."""
    max_difference: float
    """The largest between two numbers of arrays of one shape; 0 when only the bytes differ."""
    num_validity: int
    """Samples with a label in one and a failure in the other."""

    def __str__(self) -> str:
        said = [f"{self.num_differ} of {self.num_samples} samples"]
        if self.num_values:
            part = self.num_values_differ / self.num_values
            said.append(f"in them {part:.3%} of the values, by at most {self.max_difference:g}")
        if self.num_validity:
            said.append(f"{self.num_validity} labels failed in one and not in the other")
        return "; ".join(said)


def drawn(dataset: Dataset, fraction: float) -> list[Commit]:
    """The records of a sample of the labelled cells: the same ones every time, and at least one of every column.

    Shards are taken in an order that the dataset's fingerprint decides, the same for all columns, so that a labeler is
    loaded once for several cells. Columns that no labeler made (ingested, packed) have nothing to replay.
    """
    plan = dataset.plan

    def rank(shard: int) -> bytes:
        return hashlib.sha256(f"{plan.fingerprint} {shard}".encode()).digest()

    columns: dict[str, list[int]] = {}
    for shard, names in cells(dataset).items():
        for name in names:
            if name not in plan.ingested:
                columns.setdefault(name, []).append(shard)
    found = []
    for name, there in sorted(columns.items()):
        count = max(1, math.ceil(fraction * len(there)))
        records = (dataset.commit(name, shard) for shard in sorted(there, key=rank)[:count])
        found += [r for r in records if r is not None and "labeler" in r.provenance]
    return found


def replay(dataset: Dataset, records: Sequence[Commit], resolve: Resolve, device: str = "cpu") -> Iterator[Replayed]:
    """Make the cells of these records again, labeler by labeler, and compare; nothing is written to the root."""
    groups: dict[Labeler, tuple[int, dict[int, list[Commit]]]] = {}
    for record in records:
        try:
            labeler, batch_size = resolve(record)
        except (ValueError, FileNotFoundError, ImportError) as error:
            yield Replayed(record.modality, record.shard, "cannot", str(error), record.num_samples)
            continue
        _, found = groups.setdefault(labeler, (batch_size, {}))
        found.setdefault(record.shard, []).append(record)
    for labeler, (batch_size, found) in groups.items():
        yield from _again(dataset, labeler, batch_size, found, device)


def _again(
    dataset: Dataset, labeler: Labeler, batch_size: int, found: Mapping[int, list[Commit]], device: str
) -> Iterator[Replayed]:
    with tempfile.TemporaryDirectory(prefix="dataengine-replay-") as folder:
        scratch = Dataset(folder)
        scratch.write_plan(dataset.plan)
        work = LabelGroup(folder, (labeler,), {labeler.name: batch_size}).start(device)
        for shard, records in sorted(found.items()):
            began = time.perf_counter()
            try:
                inputs = _copy(dataset, scratch, shard, labeler)
                work(Task(shard, {r.modality: r.spec for r in records}))
            except (ValueError, OSError, RuntimeError) as error:
                yield from (Replayed(r.modality, shard, "cannot", str(error), r.num_samples) for r in records)
                continue
            seconds = (time.perf_counter() - began) / len(records)
            for record in records:
                yield _compared(dataset, scratch, record, seconds)
            for modality in [*inputs, *(r.modality for r in records)]:
                scratch.uncommit(modality, shard)  # one shard at a time on this machine's disk


def _copy(dataset: Dataset, scratch: Dataset, shard: int, labeler: Labeler) -> list[str]:
    """Bring the input cells of a shard to the scratch root, as they are committed."""
    names = sorted({"rgb", *labeler.inputs})
    for name in names:
        record = dataset.commit(name, shard)
        if record is None:
            raise ValueError(f"its input {tar_path(name, shard)} is not committed")
        data = dataset.store.read(record.file)
        if shards.sha256(data) != record.sha256:
            raise ValueError(f"its input {record.file} does not have the sha256 of its commit record")
        scratch.publish(record, data)
    return names


def _compared(dataset: Dataset, scratch: Dataset, record: Commit, seconds: float) -> Replayed:
    again = scratch.commit(record.modality, record.shard)
    if again is None:
        detail = "the labeler did not make it"
        return Replayed(record.modality, record.shard, "cannot", detail, record.num_samples, seconds)
    if (again.sha256, again.invalid.keys()) == (record.sha256, record.invalid.keys()):
        return Replayed(record.modality, record.shard, "same", "", record.num_samples, seconds)
    try:
        detail = str(_difference(dataset, scratch, record, again))
    except (ValueError, FileNotFoundError) as error:
        detail = f"{again.sha256}, and the committed one cannot be read: {error}"
    return Replayed(record.modality, record.shard, "differs", detail, record.num_samples, seconds)


def _difference(dataset: Dataset, scratch: Dataset, record: Commit, again: Commit) -> Difference:
    codec = modalities.load(record.modality)
    num_differ = num_values = num_values_differ = 0
    largest = 0.0
    there, here = dataset.read(record.modality, record.shard), scratch.read(record.modality, record.shard)
    for old, new in zip(there, here, strict=True):
        if old.data == new.data:
            continue
        num_differ += 1
        for a, b in arrays(codec.decode(old.data), codec.decode(new.data)):
            apart = np.abs(a.astype(np.float64) - b.astype(np.float64))
            num_values += apart.size
            num_values_differ += int(np.count_nonzero(~(apart == 0)))  # a nan differs
            largest = max(largest, float(np.nanmax(apart, initial=0.0)))
    validity = len(set(record.invalid) ^ set(again.invalid))
    return Difference(len(there), num_differ, num_values, num_values_differ, largest, validity)


def arrays(old: Any, new: Any) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """The pairs of numeric arrays of one shape in two values, however they are nested."""
    if isinstance(old, dict) and isinstance(new, dict):
        for name in old.keys() & new.keys():
            yield from arrays(old[name], new[name])
    elif isinstance(old, list) and isinstance(new, list) and not _numeric(old):
        for a, b in zip(old, new, strict=False):
            yield from arrays(a, b)
    elif _numeric(old) and _numeric(new) and np.shape(old) == np.shape(new):
        yield np.atleast_1d(old), np.atleast_1d(new)


def _numeric(value: Any) -> bool:
    if isinstance(value, list):
        return bool(value) and all(isinstance(v, int | float) and not isinstance(v, bool) for v in value)
    return isinstance(value, int | float) or (isinstance(value, np.ndarray) and value.dtype.kind in "biuf")
