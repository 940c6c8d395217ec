"""Rehearsal: the run itself on a scratch copy of some images, for what no sum of parts tells.

Processes that share cores and memory slow one another down, and starting Ray, reading, encoding and committing take
what they take: so a few seconds of the real thing are run, by the same runner with as many workers, and its events are
read. Nothing is written to the dataset.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import dataclasses
import multiprocessing
import os
import shutil
import tempfile
import time
import uuid
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field
from pathlib import Path

from dataengine import eventlog, shards
from dataengine.events import Event
from dataengine.groups import Group
from dataengine.labeler import Labeler
from dataengine.manifest import Dataset, tar_path
from dataengine.plan import LabelPlan, plan_labels
from dataengine.work import Task
from pipelines import label
from pipelines.running import Runner

SECONDS = 12.0
"""How long the labelling of a rehearsal should take, starting aside."""
MOST = 0.25
"""The part of the images to do that it may take, at most: a rehearsal is not the run."""


@dataclass(frozen=True)
class Seen:
    """One stage as it was seen; seconds are of one worker, per row, while all of them were at work."""

    labelers: tuple[str, ...]
    rows: int
    workers: int
    num_cpus: float
    num_gpus: float
    seconds: float
    label_seconds: Mapping[str, float]
    """Per row, by labeler: the labeler's own part; the rest is reading, decoding, encoding and committing."""
    start_seconds: float
    """Until a worker has started and loaded its labelers."""
    bytes_out: Mapping[str, float]
    """Per row, by column."""


@dataclass(frozen=True)
class Rehearsal:
    """What a rehearsal showed: `starting` is from its launch to its first task, `ending` from the last to its end."""

    images: int
    starting: float
    ending: float
    stages: Mapping[str, Seen]
    room: Mapping[str, float] = field(default_factory=dict)
    """CPU and GPU of the nodes it ran on; empty when it ran in one process."""


def rehearse(
    dataset: Dataset,
    plan: LabelPlan,
    pins: Sequence[Group] = (),
    *,
    seconds_per_image: float,
    at_once: int,
    device: str,
    runner: Runner,
    workers: int | None,
) -> Rehearsal:
    """Label a scratch copy of some of the plan's images as `label` would, in a process of its own.

    `seconds_per_image`, on one of the `at_once` workers of a machine, decides how many. RuntimeError when it fails.
    """
    with _scratch_root(dataset) as root:
        images = copy_rows(dataset, plan, Dataset(root), _counts(plan, seconds_per_image, at_once))
        began = time.time()
        # A fresh process, as a command is: what it takes to start Python and to import what is needed is in it.
        with concurrent.futures.ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
            job = pool.submit(_perform, root, plan.labelers, plan.wanted, tuple(pins), device, runner, workers)
            try:
                job.result()
            except BrokenProcessPool as error:
                raise RuntimeError(f"the rehearsal was ended by one of its labelers: {error}") from error
        ended, store = time.time(), Dataset(root).store
        return summary(
            [e for run in eventlog.runs(store)[:1] for e in eventlog.events(store, run)], began, ended, images
        )


def _counts(plan: LabelPlan, seconds_per_image: float, at_once: int) -> list[int]:
    """The rows of each scratch shard: shards like those of the dataset, as many for each worker."""
    sizes = sorted(plan.num_rows[task.shard] for task in plan.tasks)
    typical, total = sizes[len(sizes) // 2], sum(sizes)
    each = max(min(SECONDS / max(seconds_per_image, 1e-6), MOST * total / at_once), 2)
    if each < typical:
        return [min(round(each), typical)] * at_once
    return [typical] * (round(each / typical) * at_once)


@contextlib.contextmanager
def _scratch_root(dataset: Dataset) -> Iterator[str]:
    """An empty root that is gone afterwards: beside the dataset, so that it is on the same disk or store."""
    if not dataset.store.local:
        # Beside a bucket there is nothing that could be written: then in it, under a name that no column has.
        bucket = "/" not in dataset.store.url.partition("://")[2]
        root = f"{dataset.store.url}{'/.' if bucket else '-'}rehearsal-{uuid.uuid4().hex[:8]}"
        try:
            yield root
        finally:
            store = Dataset(root).store
            for path in list(store.find()):
                store.remove(path)
        return
    beside = Path(dataset.store.base).absolute().parent
    folder = tempfile.mkdtemp(prefix=".rehearsal-", dir=beside if os.access(beside, os.W_OK) else None)
    try:
        yield folder
    finally:
        shutil.rmtree(folder)


def copy_rows(dataset: Dataset, plan: LabelPlan, scratch: Dataset, counts: Sequence[int]) -> int:
    """Fill a scratch root with shards of so many rows, taken evenly from shards of the plan; how many rows in all.

    What is committed in a shard and belongs to the plan is copied, so that the same cells are to do; the identities are
    those of the dataset.
    """
    cells = {m for labeler in plan.labelers for m in (*labeler.inputs, *labeler.emits)} | {"rgb"}
    total = 0
    for target, count in enumerate(counts):
        shard = plan.tasks[target * len(plan.tasks) // len(counts)].shard
        there = plan.num_rows[shard]
        rows = sorted({i * there // count for i in range(count)} if count < there else range(there))
        for m in sorted(cells):
            record = dataset.commit(m, shard)
            if record is None:
                continue
            members = dataset.read(m, shard)
            kept = [members[i] for i in rows]
            data = shards.build_tar(kept)
            keys = [member.key for member in kept]
            changed = dataclasses.replace(
                record,
                shard=target,
                file=tar_path(m, target),
                num_bytes=len(data),
                sha256=shards.sha256(data),
                num_samples=len(kept),
                keys_sha256=shards.keys_sha256(keys),
                invalid={key: why for key, why in record.invalid.items() if key in keys},
                keys=tuple(keys) if record.keys else (),
            )
            scratch.publish(changed, data)
        total += len(rows)
    scratch.write_plan(dataclasses.replace(dataset.plan, num_shards=len(counts), num_items=total))
    for name in dataset.store.files("runs/batches"):
        scratch.store.publish(f"runs/batches/{name}", dataset.store.read(f"runs/batches/{name}"))
    return total


def _perform(
    root: str,
    labelers: Sequence[Labeler],
    wanted: Sequence[str],
    pins: Sequence[Group],
    device: str,
    runner: Runner,
    workers: int | None,
) -> None:
    """The run, in the process that was started for it: all that it says is in its log, so its tables are dropped."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    for stream in (1, 2):
        os.dup2(nowhere, stream)
    dataset = Dataset(root)
    made = plan_labels(dataset, wanted, labelers)
    label.execute(dataset, made, pins, runner=runner, workers=workers, device=device, max_bad_fraction=1.0)


def summary(events: Sequence[Event], began: float, ended: float, images: int) -> Rehearsal:
    """What the events of a rehearsal show that was launched and had ended at these times; RuntimeError if it failed."""
    of = {kind: [e for e in events if e.kind == kind] for kind in ("stage", "start", "report", "failed", "node-up")}
    if of["failed"] or not of["report"]:
        why = "; ".join(str(e.values.get("cause")) for e in of["failed"][:3]) or "it did nothing"
        raise RuntimeError(f"the rehearsal could not label what it was given: {why}")
    room = {"CPU": 0.0, "GPU": 0.0}
    for event in of["node-up"]:
        for name in room:
            room[name] += float(event.values["resources"].get(name, 0.0))
    return Rehearsal(
        images=images,
        starting=min(e.time for e in of["start"]) - began,
        ending=ended - max(e.time for e in of["report"]),
        stages={e.stage: _seen(e, [x for x in events if x.stage == e.stage]) for e in of["stage"]},
        room=room if of["node-up"] else {},
    )


def _seen(stage: Event, events: Sequence[Event]) -> Seen:
    reports = [e for e in events if e.kind == "report"]
    split = {e.shard for e in reports if e.rows is not None}
    rows = 0
    spent: dict[str, float] = defaultdict(float)
    size: dict[str, int] = defaultdict(int)
    count: dict[str, int] = defaultdict(int)
    for e in reports:
        cells = e.values["cells"]
        # The last task of a split shard only commits what the others labelled.
        whole = 0 if e.shard in split else max((c["num_samples"] for c in cells), default=0)
        rows += whole if e.rows is None else e.rows[1] - e.rows[0]
        for what, seconds in e.values["spent"].items():
            spent[what] += seconds
        for c in cells if e.rows is None else ():
            size[c["modality"]] += c["num_bytes"]
            count[c["modality"]] += c["num_samples"]
    busy = _busy([e for e in events if e.kind in ("start", "report")])
    ups = [float(e.values["seconds"]) for e in events if e.kind == "worker-up"]
    return Seen(
        labelers=tuple(stage.values["labelers"]),
        rows=rows,
        workers=len(busy),
        num_cpus=float(stage.values["num_cpus"]),
        num_gpus=float(stage.values["num_gpus"]),
        seconds=sum(busy.values()) / max(rows, 1),
        label_seconds={
            what.removeprefix("label:"): seconds / max(rows, 1)
            for what, seconds in spent.items()
            if what.startswith("label:")
        },
        start_seconds=sum(ups) / max(len(ups), 1),
        bytes_out={m: size[m] / max(count[m], 1) for m in size},
    )


def _busy(events: Sequence[Event]) -> dict[str, float]:
    """Seconds in which each worker had a task at hand; it may have two at once."""
    busy: dict[str, float] = defaultdict(float)
    since: dict[str, float] = {}
    at_hand: dict[str, set[tuple[int | None, tuple[int, int] | None]]] = defaultdict(set)
    for e in sorted(events, key=lambda e: e.time):
        tasks, task = at_hand[e.worker], (e.shard, e.rows)
        if e.kind == "start":
            if not tasks:
                since[e.worker] = e.time
            tasks.add(task)
        else:
            tasks.discard(task)
            if not tasks:
                busy[e.worker] += e.time - since[e.worker]
    return dict(busy)


def tasks_of(plan: LabelPlan, emits: Sequence[str]) -> list[Task]:
    """The tasks of a plan with a cell of one of these columns to do."""
    return [task for task in plan.tasks if set(emits) & set(task.specs)]
