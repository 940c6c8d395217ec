"""What a label plan will cost before anything is spent: measured here, rehearsed, and carried on to all of it."""

from __future__ import annotations

import heapq
import itertools
import math
import os
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from dataengine import packing
from dataengine.groups import Group, Node
from dataengine.manifest import Dataset
from dataengine.measured import Measured
from dataengine.plan import LabelPlan
from dataengine.schedule import Schedule, Stage
from dataengine.work import Task
from pipelines import planning, preflight, rehearsal
from pipelines.live import Prices
from pipelines.rehearsal import Rehearsal, Seen, tasks_of
from pipelines.running import Runner

COMMIT_SECONDS = 0.1
"""Of a shard that was labelled in parts: reading the parts and writing the tars."""


@dataclass(frozen=True)
class LabelerCost:
    """One labeler's share: its own seconds, and of its group's reading, decoding, encoding and committing as much."""

    labeler: str
    group: str
    images: int
    cells: int
    seconds_per_image: float
    gpu_hours: float
    cpu_hours: float
    cost: float | None


@dataclass(frozen=True)
class ColumnSize:
    """What one column will add to the dataset, and what it costs: its labeler's cost, shared with its other columns."""

    modality: str
    labeler: str
    cells: int
    images: int
    num_bytes: int
    gpu_hours: float
    cpu_hours: float
    cost: float | None


@dataclass(frozen=True)
class Estimate:
    """The bill: `seconds` of wall time are `starting` + `labelling` + `ending`; hours are of what is reserved."""

    labelers: tuple[LabelerCost, ...]
    columns: tuple[ColumnSize, ...]
    starting: float
    labelling: float
    ending: float
    gpu_hours: float
    cpu_hours: float
    cost: float | None
    measuring: float
    """Seconds that the measuring for this estimate took."""
    rehearsed: int
    """Images it was rehearsed on."""

    @property
    def seconds(self) -> float:
        """Wall time of the run."""
        return self.starting + self.labelling + self.ending

    @property
    def num_bytes(self) -> int:
        """What the run will write."""
        return sum(c.num_bytes for c in self.columns)


def estimate(
    dataset: Dataset,
    plan: LabelPlan,
    pins: Sequence[Group] = (),
    *,
    device: str = "cpu",
    runner: Runner = "ray",
    workers: int | None = None,
    prices: Prices | None = None,
    again: bool = False,
) -> Estimate:
    """Measure the labelers of a plan where that was not done (or `again`), rehearse it, and carry it on to the whole.

    RuntimeError when a labeler cannot be measured or the rehearsal fails.
    """
    began = time.perf_counter()
    prices = prices or Prices()
    if not plan.tasks:
        return Estimate((), (), 0.0, 0.0, 0.0, 0.0, 0.0, prices.of(0.0, 0.0), 0.0, 0)
    labelers = planning.active(plan)
    # On a cluster the labelers run elsewhere, maybe on GPUs that this machine has not.
    cluster = runner == "ray" and "RAY_ADDRESS" in os.environ
    measured = preflight.preflight(dataset, labelers, device, again=again, on_ray=cluster)
    batches = planning.chosen_batches(dataset, labelers, measured, planning.pinned(pins), record=False)
    packed = planning.pack(labelers, measured, batches, pins, device=device, workers=workers)
    at_once = sum(g.workers for g in packed.groups) if runner == "ray" else 1
    seen = rehearsal.rehearse(
        dataset,
        plan,
        pins,
        seconds_per_image=_alone(measured),
        at_once=at_once,
        device=device,
        runner=runner,
        workers=workers,
    )
    if runner == "local":
        labelling = sum(_seconds(plan, stage) for stage in seen.stages.values())
    else:
        # The groups as they really ran, on the nodes that were really there.
        groups = [_as_seen(stage, pins) for stage in seen.stages.values()]
        nodes = [Node(cpus=seen.room["CPU"], gpus=seen.room["GPU"])]
        packed = planning.pack(labelers, measured, batches, groups, device=device, workers=workers, nodes=nodes)
        stages = packing.stages(packed, plan, dataset.store.url, plan.num_rows)
        labelling = makespan(stages, seen.stages, seen.room, workers)
    return _bill(plan, seen, labelling, prices, time.perf_counter() - began)


def _as_seen(stage: Seen, pins: Sequence[Group]) -> Group:
    most = next((p.max_workers for p in pins if set(stage.labelers) & set(p.labelers)), None)
    return Group(labelers=stage.labelers, num_gpus=stage.num_gpus, num_cpus=stage.num_cpus, max_workers=most)


def _seconds(plan: LabelPlan, stage: Seen) -> float:
    """Of one worker that does all of a stage."""
    made = [m for labeler in plan.labelers if labeler.name in stage.labelers for m in labeler.emits]
    return stage.seconds * sum(plan.num_rows[t.shard] for t in tasks_of(plan, made))


def _alone(measured: Mapping[str, Measured]) -> float:
    """Seconds an image on one worker, from the labelers' own: only to choose the size of the rehearsal."""
    own = sum(m.at(m.batches[-1].size).seconds / m.batches[-1].size + m.encode_seconds for m in measured.values())
    return own + max((m.decode_seconds for m in measured.values()), default=0.0)


def makespan(
    stages: Sequence[Stage], seen: Mapping[str, Seen], room: Mapping[str, float], limit: int | None = None
) -> float:
    """Seconds from the first task to the last, of a run in which every row takes what it was seen to take.

    It is the run's own schedule that hands out the tasks; a worker that changes its stage has to start anew.
    """
    schedule = Schedule(stages)
    for stage in stages:
        schedule.measured(stage.name, seen[stage.name].seconds)
    by_name = {stage.name: stage for stage in stages}
    order, now = itertools.count(), 0.0
    ends: list[tuple[float, int, str, Task | None]] = []  # a worker that is ready has no task
    workers, idle, leaving = Counter[str](), Counter[str](), Counter[str]()
    split: set[tuple[str, int]] = set()

    def seconds(name: str, task: Task) -> float:
        if task.rows is not None:
            split.add((name, task.shard))
            return (task.rows[1] - task.rows[0]) * seen[name].seconds
        if (name, task.shard) in split:
            return COMMIT_SECONDS
        return by_name[name].num_rows[task.shard] * seen[name].seconds

    def fits(name: str) -> bool:
        there = workers.items()
        cpus = sum(by_name[n].num_cpus * count for n, count in there) + by_name[name].num_cpus
        gpus = sum(by_name[n].num_gpus * count for n, count in there) + by_name[name].num_gpus
        few = limit is None or workers.total() < limit
        return few and cpus <= room.get("CPU", 0.0) + 1e-9 and gpus <= room.get("GPU", 0.0) + 1e-9

    def scale() -> None:
        wanted = _bounded(schedule.num_workers(room, workers), limit)
        starved = any(wanted[name] and not workers[name] for name in by_name)
        for name in by_name:
            # Those at work leave when their task ends, if another stage has nobody.
            surplus = max(workers[name] - wanted[name], 0) if starved or not schedule.open(name) else 0
            gone = min(idle[name], surplus)
            idle[name], workers[name] = idle[name] - gone, workers[name] - gone
            leaving[name] = surplus - gone
        for name in by_name:
            while workers[name] < wanted[name] and fits(name):
                # Those of the beginning are counted in what the rehearsal took to start.
                ready = now + (seen[name].start_seconds if now else 0.0)
                heapq.heappush(ends, (ready, next(order), name, None))
                workers[name] += 1

    def dispatch() -> None:
        for name in by_name:
            while idle[name] and (task := schedule.take(name, workers[name])) is not None:
                idle[name] -= 1
                heapq.heappush(ends, (now + seconds(name, task), next(order), name, task))

    scale()
    while not schedule.finished:
        if not ends:
            raise RuntimeError(f"no room for a worker of any of {', '.join(by_name)}: the nodes have {dict(room)}")
        now, _, name, ended = heapq.heappop(ends)
        if ended is not None:
            schedule.done(name, ended)
        if leaving[name]:
            leaving[name], workers[name] = leaving[name] - 1, workers[name] - 1
        else:
            idle[name] += 1
        dispatch()
        if any(idle.values()) or any(not workers[n] and schedule.can_start(n) for n in by_name):
            scale()
    return now


def _bounded(wanted: dict[str, int], limit: int | None) -> dict[str, int]:
    while limit is not None and sum(wanted.values()) > limit:
        wanted[max(wanted, key=lambda n: wanted[n])] -= 1
    return wanted


def _bill(plan: LabelPlan, seen: Rehearsal, labelling: float, prices: Prices, measuring: float) -> Estimate:
    labelers: list[LabelerCost] = []
    columns: list[ColumnSize] = []
    for labeler in planning.active(plan):
        group, stage = next((n, s) for n, s in seen.stages.items() if labeler.name in s.labelers)
        tasks = tasks_of(plan, labeler.emits)
        images = sum(plan.num_rows[t.shard] for t in tasks)
        own = stage.label_seconds.get(labeler.name, 0.0)
        share = own / max(sum(stage.label_seconds.values()), 1e-9)
        hours = images * stage.seconds * share / 3600
        gpu, cpu = hours * stage.num_gpus, hours * stage.num_cpus
        made = sorted({m for t in tasks for m in t.specs} & set(labeler.emits))
        cells = sum(m in t.specs for t in tasks for m in made)
        labelers.append(LabelerCost(labeler.name, group, images, cells, own, gpu, cpu, prices.of(gpu, cpu)))
        for m in made:
            todo = [t for t in tasks if m in t.specs]
            rows = sum(plan.num_rows[t.shard] for t in todo)
            size, part = round(rows * stage.bytes_out.get(m, 0.0)), 1 / len(made)
            cost = prices.of(gpu * part, cpu * part)
            columns.append(ColumnSize(m, labeler.name, len(todo), rows, size, gpu * part, cpu * part, cost))
    wall = (seen.starting + labelling + seen.ending) / 3600
    # What takes turns is not reserved at the same time.
    gpus = min(sum(s.workers * s.num_gpus for s in seen.stages.values()), seen.room.get("GPU", math.inf))
    cpus = min(sum(s.workers * s.num_cpus for s in seen.stages.values()), seen.room.get("CPU", math.inf))
    return Estimate(
        labelers=tuple(labelers),
        columns=tuple(columns),
        starting=seen.starting,
        labelling=labelling,
        ending=seen.ending,
        gpu_hours=wall * gpus,
        cpu_hours=wall * cpus,
        cost=prices.of(wall * gpus, wall * cpus),
        measuring=measuring,
        rehearsed=seen.images,
    )
