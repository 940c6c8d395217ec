"""The unit of work: one group of labelers over one shard. Reads, labels and writes; only a small report comes back."""

from __future__ import annotations

import functools
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

from threadpoolctl import threadpool_limits

from dataengine import modalities, provenance, shards
from dataengine.labeler import Labeler, Loaded
from dataengine.manifest import Commit, Dataset, tar_path
from dataengine.sample import Sample
from dataengine.shards import Member


@dataclass(frozen=True)
class Task:
    """What a worker is asked to do: the wanted cells of one shard, and the identity each will be committed under."""

    shard: int
    specs: dict[str, str]
    rows: tuple[int, int] | None = None
    """None: the whole shard, committed at the end; else only rows start..stop, left in staging for who commits."""


@dataclass(frozen=True)
class CellReport:
    """What became of one cell."""

    modality: str
    num_samples: int
    num_invalid: int
    num_bytes: int
    seconds: float
    reasons: dict[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class Report:
    """What became of one task: small, the only thing that crosses a process border."""

    shard: int
    cells: tuple[CellReport, ...]
    seconds: float
    num_refused: int = 0
    rows: tuple[int, int] | None = None
    outcome: Literal["done", "busy", "drained"] = "done"
    """`busy`: another run holds the shard, nothing was done; `drained`: told to stop, finished rows are in staging."""
    spent: dict[str, float] = field(default_factory=dict)
    """Seconds by what they went to: `read`, `decode`, `label:<labeler>`, `encode`, `commit`, `wait`."""
    notes: tuple[str, ...] = ()
    """What an operator should know: a batch that had to shrink, a process that died and on what."""


Work = Callable[[Task], Report]


class Worker(Protocol):
    """Something that can be started in any process and then runs tasks; it travels there as a pickle."""

    def start(self, device: str) -> Work:
        """Load what is needed onto a device and return the function that runs one task."""
        ...


@dataclass(frozen=True)
class LabelGroup:
    """Labelers that share a process, in an order in which each finds its inputs; their images are decoded once."""

    root: str
    labelers: tuple[Labeler, ...]
    batches: Mapping[str, int] = field(default_factory=dict)
    """Batch sizes other than the labelers' own, by labeler name."""

    def start(self, device: str) -> Work:
        """Load every labeler of the group."""
        dataset = Dataset(self.root)
        loaded = [(labeler, labeler.load(device)) for labeler in self.labelers]

        def run(task: Task) -> Report:
            # One thread a worker: sums that a matrix product splits over threads round differently, and the bytes
            # must not depend on how many cores a machine has.
            with threadpool_limits(limits=1):
                return _label_shard(dataset, loaded, task)

        return run


@dataclass
class _Column:
    """A cell in the making."""

    labeler: Labeler
    members: list[Future[Member]] = field(default_factory=list)
    invalid: dict[str, str] = field(default_factory=dict)
    seconds: float = 0.0


class _Failed(Exception):
    """A label that could not be made; the message is the reason."""


def _label_shard(dataset: Dataset, loaded: Sequence[tuple[Labeler, Loaded]], task: Task) -> Report:
    began = time.perf_counter()
    # A labeler runs when a wanted cell is its own; its other outputs are dropped.
    active = [(labeler, call) for labeler, call in loaded if set(labeler.emits) & set(task.specs)]
    emitted = {m for labeler, _ in active for m in labeler.emits}
    inner = {m for labeler, _ in active for m in labeler.inputs} & emitted
    columns = {m: _Column(labeler) for labeler, _ in active for m in labeler.emits if m in inner | set(task.specs)}
    outer = sorted({"rgb", *(m for labeler, _ in active for m in labeler.inputs)} - inner)
    # Every labeler is fed its own batches, counted from the start of the shard, whoever else is in the group: a batch
    # of other images may round differently, and a resumed shard must end with the same bytes.
    size = math.lcm(*(labeler.batch_size for labeler, _ in active))
    with ThreadPoolExecutor(max_workers=2) as threads:
        for samples, bad in _prefetched(threads, _batches(dataset, task.shard, outer, size)):
            known = {s.key: dict(s.values) for s in samples}
            failed = {s.key: set(bad[s.key]) for s in samples}
            for labeler, call in active:
                for start in range(0, len(samples), labeler.batch_size):
                    batch = samples[start : start + labeler.batch_size]
                    _label_batch(labeler, call, batch, known, failed, columns, inner, threads)
    random = _random(dataset, [labeler for labeler, _ in active], task.shard, outer)
    reports = [_publish(dataset, task, m, c, random[m]) for m, c in columns.items() if m in task.specs]
    return Report(task.shard, tuple(reports), time.perf_counter() - began)


def _batches(
    dataset: Dataset, shard: int, inputs: Sequence[str], size: int
) -> Iterator[Callable[[], tuple[list[Sample], dict[str, set[str]]]]]:
    """Thunks that decode one batch each, so that the decoding can run ahead in a thread."""
    members = {m: dataset.read(m, shard) for m in inputs}
    invalid = {m: (dataset.commit(m, shard) or _missing(m, shard)).invalid for m in inputs}
    codecs = {m: modalities.load(m) for m in inputs}
    keys = dataset.keys(shard)
    for m, column in members.items():
        if tuple(member.key for member in column) != keys:
            raise ValueError(f"{tar_path(m, shard)} does not list the keys of the rgb tar: run `dataengine verify`")

    def decode(start: int) -> tuple[list[Sample], dict[str, set[str]]]:
        rows = range(start, min(start + size, len(keys)))
        samples = [Sample(keys[i], {m: codecs[m].decode(members[m][i].data) for m in inputs}) for i in rows]
        return samples, {keys[i]: {m for m in inputs if keys[i] in invalid[m]} for i in rows}

    for start in range(0, len(keys), size):
        yield functools.partial(decode, start)


def _missing(modality: str, shard: int) -> Commit:
    raise ValueError(f"{tar_path(modality, shard)} is needed as input and is not committed")


def _prefetched(threads: ThreadPoolExecutor, thunks: Iterator[Callable[[], Any]]) -> Iterator[Any]:
    """Results of the thunks in order, the next one being made while the caller works on this one."""
    ahead: Future[Any] | None = None
    for thunk in thunks:
        following = threads.submit(thunk)
        if ahead is not None:
            yield ahead.result()
        ahead = following
    if ahead is not None:
        yield ahead.result()


def _label_batch(
    labeler: Labeler,
    call: Loaded,
    samples: Sequence[Sample],
    known: dict[str, dict[str, Any]],
    failed: dict[str, set[str]],
    columns: dict[str, _Column],
    inner: set[str],
    threads: ThreadPoolExecutor,
) -> None:
    """Run one labeler on one batch and hand its values to the encoder threads; failures become placeholders."""
    began = time.perf_counter()
    kept = [m for m in labeler.emits if m in columns]
    ready, reasons = [], {}
    for s in samples:
        bad = [m for m in labeler.inputs if m in failed[s.key]]
        if bad:
            # The same words as when the input failed in an earlier run: the bytes of the record must not tell.
            reasons[s.key] = f"input {bad[0]} is not valid"
        else:
            ready.append(Sample(s.key, {m: known[s.key][m] for m in {"rgb", *labeler.inputs}}))
    outputs = dict(zip((s.key for s in ready), _attempt(call, ready), strict=True))
    for s in samples:
        for m in kept:
            codec = modalities.load(m)
            value = _checked(codec, outputs.get(s.key, _Failed(reasons.get(s.key, ""))), s.size)
            if isinstance(value, _Failed):
                failed[s.key].add(m)
                columns[m].invalid[s.key] = str(value)
                value = codec.placeholder(s.size)
            future = threads.submit(_encode, codec, s.key, value)
            columns[m].members.append(future)
            if m in inner:
                # The next labeler of the group must see what a later run would read back from the tar.
                known[s.key][m] = codec.decode(future.result().data)
    for m in kept:
        columns[m].seconds += (time.perf_counter() - began) / len(kept)


def _encode(codec: modalities.Modality, key: str, value: Any) -> Member:
    return Member(key, codec.suffix, codec.encode(value))


def _attempt(call: Loaded, samples: Sequence[Sample]) -> list[dict[str, Any] | _Failed]:
    """The labeler's outputs; a batch that raises is halved down to the samples that cannot be labelled."""
    if not samples:
        return []
    try:
        outputs = call(samples)
        if len(outputs) != len(samples):
            raise ValueError(f"gave {len(outputs)} outputs for {len(samples)} samples")
        return list(outputs)
    except Exception as error:
        # Whatever a network throws (out of memory, a bad shape, a bug on one odd image) costs that sample alone.
        if len(samples) == 1:
            return [_Failed(f"{type(error).__name__}: {error}"[:300])]
        half = len(samples) // 2
        return _attempt(call, samples[:half]) + _attempt(call, samples[half:])


def _checked(codec: modalities.Modality, output: dict[str, Any] | _Failed, size: tuple[int, int]) -> Any:
    """The value of one modality, or the failure that it is: missing, or not what its modality allows."""
    if isinstance(output, _Failed):
        return output
    if codec.name not in output:
        return _Failed(f"gave no {codec.name}")
    try:
        codec.check(output[codec.name], size)
    except ValueError as error:
        return _Failed(f"invalid value: {error}"[:300])
    return output[codec.name]


def _random(dataset: Dataset, active: Sequence[Labeler], shard: int, outer: Sequence[str]) -> dict[str, bool]:
    """Which modalities come from random weights, directly or through what they were computed from."""
    found = {m: bool((dataset.commit(m, shard) or _missing(m, shard)).provenance.get("random")) for m in outer}
    for labeler in active:
        made = labeler.random or any(found[m] for m in labeler.inputs)
        found |= dict.fromkeys(labeler.emits, made)
    return found


def _publish(dataset: Dataset, task: Task, modality: str, column: _Column, random: bool) -> CellReport:
    members = [future.result() for future in column.members]
    data = shards.build_tar(members)
    record = Commit(
        modality=modality,
        shard=task.shard,
        spec=task.specs[modality],
        file=tar_path(modality, task.shard),
        num_bytes=len(data),
        sha256=shards.sha256(data),
        num_samples=len(members),
        keys_sha256=shards.keys_sha256(m.key for m in members),
        invalid=dict(sorted(column.invalid.items())),
        provenance=provenance.of_labeler(column.labeler) | {"random": random},
    )
    dataset.publish(record, data)
    reasons: dict[str, int] = {}
    for reason in column.invalid.values():
        reasons[reason] = reasons.get(reason, 0) + 1
    return CellReport(modality, len(members), len(column.invalid), len(data), column.seconds, reasons)
