"""Which group takes which shard next: pure bookkeeping, without clocks, processes or Ray.

Longest expected first; a stage gets a shard when the stages it needs are done with it; and near the end, shards are
split into ranges of rows that shrink with what is left (guided self-scheduling, Polychronopoulos and Kuck 1987), so
that all workers end together. The rows of a split shard lie in staging until one last task commits them.
"""

from __future__ import annotations

import heapq
import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any

from dataengine.work import Task, Worker

MIN_SECONDS = 5.0
"""No range is expected to take less: each reads the whole tar of its shard."""


@dataclass(frozen=True, kw_only=True)
class Stage:
    """One group of labelers and its tasks: what is started together, and scales by itself."""

    name: str
    worker: Worker
    tasks: tuple[Task, ...]
    num_rows: Mapping[int, int]
    """Rows of each shard."""
    window: int
    """Rows a task may be split at: multiples of this, counted from the start of the shard."""
    seconds_per_row: float = 1.0
    """Expected, on one worker; only its ratio to other stages matters until workers have been measured."""
    num_cpus: float = 1.0
    num_gpus: float = 0.0
    max_workers: int | None = None
    needs: tuple[str, ...] = ()
    """Stages whose task of the same shard must be committed first."""

    def described(self) -> dict[str, Any]:
        """The values of a `stage` event."""
        cells = Counter(m for t in self.tasks for m in t.specs)
        return {
            "tasks": len(self.tasks),
            "rows": sum(self.num_rows[t.shard] for t in self.tasks),
            "cells": dict(cells),
            "needs": list(self.needs),
            "seconds_per_row": self.seconds_per_row,
            "num_cpus": self.num_cpus,
            "num_gpus": self.num_gpus,
            "labelers": [x.name for x in getattr(self.worker, "labelers", ())],
            "modalities": sorted(cells),
        }


class _Split:
    """A shard that is being done in ranges."""

    def __init__(self, task: Task, stop: int) -> None:
        self.task, self.next, self.stop = task, 0, stop
        self.under_way: set[tuple[int, int]] = set()


class _Queue:
    """The tasks of one stage."""

    def __init__(self, stage: Stage) -> None:
        self.stage = stage
        self.seconds_per_row = stage.seconds_per_row
        self.tasks = {t.shard: t for t in stage.tasks}
        self.ready: list[tuple[int, int, int]] = []  # heap of (place, -rows, shard): place 0 before all
        self.blocked: dict[int, int] = {}  # shard: how many needed stages are not done with it
        self.again: list[Task] = []  # ranges and commits that go before everything else
        self.split: _Split | None = None
        self.splits: dict[int, _Split] = {}
        self.running = 0
        self.open = set(self.tasks)  # shards that are neither done nor given up
        self.rows_waiting = self.rows_open = sum(stage.num_rows[s] for s in self.tasks)

    def push(self, shard: int, place: int = 1) -> None:
        heapq.heappush(self.ready, (place, -self.stage.num_rows[shard], shard))

    def close(self, shard: int) -> None:
        self.open.remove(shard)
        self.rows_open -= self.stage.num_rows[shard]

    @property
    def can_start(self) -> bool:
        return bool(self.again or self.ready or (self.split and self.split.next < self.split.stop))


class Schedule:
    """The state of a run: tell it what happened, ask it what to do next."""

    def __init__(self, stages: Sequence[Stage]) -> None:
        names = [s.name for s in stages]
        unknown = sorted({n for s in stages for n in s.needs} - set(names))
        if len(set(names)) != len(names) or unknown:
            raise ValueError(f"stages {names}: names must be unique, and these are needed but not there: {unknown}")
        self.stages = {s.name: s for s in stages}
        self._queues = {s.name: _Queue(s) for s in stages}
        self.failed: dict[tuple[str, int], str] = {}
        for queue in self._queues.values():
            for shard in queue.tasks:
                before = sum(shard in self._queues[n].open for n in queue.stage.needs)
                if before:
                    queue.blocked[shard] = before
                else:
                    queue.push(shard)

    # -- asking -------------------------------------------------------------------------------------------------------

    def take(self, name: str, num_workers: int, ahead: bool = False) -> Task | None:
        """The next task for a worker of a stage, or None when there is none (yet).

        `num_workers` is how many workers the stage has. `ahead` asks for one that is to wait behind another on the
        same worker: near the end there is none, another worker may be free sooner.
        """
        queue = self._queues[name]
        chunk = self._chunk(queue, num_workers)
        if ahead and (num_workers == 0 or len(queue.ready) <= num_workers):
            return None
        task = self._next(queue, chunk)
        if task is not None:
            queue.running += 1
            queue.rows_waiting -= self._rows(queue, task)
        return task

    def _next(self, queue: _Queue, chunk: int) -> Task | None:
        if queue.again:
            return queue.again.pop(0)
        if queue.split is None or queue.split.next >= queue.split.stop:
            queue.split = None
            if not queue.ready:
                return None
            shard = heapq.heappop(queue.ready)[2]
            task, rows = queue.tasks[shard], queue.stage.num_rows[shard]
            # A shard whose last range would be a sliver is not worth splitting.
            if rows < chunk + queue.stage.window or task.deaths:
                return task
            queue.split = queue.splits[shard] = _Split(task, rows)
        split = queue.split
        start = split.next
        stop = start + chunk if split.stop - start >= chunk + queue.stage.window else split.stop
        split.next = min(stop, split.stop)
        split.under_way.add((start, split.next))
        return replace(split.task, rows=(start, split.next))

    def _chunk(self, queue: _Queue, num_workers: int) -> int:
        """Rows that one worker should take at once: half of its share of what waits, whole windows, not too few."""
        if num_workers <= 1:
            return 1 << 60
        window = queue.stage.window
        least = math.ceil(MIN_SECONDS / max(queue.seconds_per_row, 1e-9) / window) * window
        return max(math.ceil(queue.rows_waiting / (2 * num_workers) / window) * window, least, window)

    def _rows(self, queue: _Queue, task: Task) -> int:
        """The rows whose labelling a task stands for; the commit of a split shard stands for none."""
        if task.rows is not None:
            return task.rows[1] - task.rows[0]
        return 0 if task.shard in queue.splits else queue.stage.num_rows[task.shard]

    def can_start(self, name: str) -> bool:
        """Whether a stage has a task that a worker could begin now."""
        return self._queues[name].can_start

    def under_way(self, name: str) -> int:
        """Tasks of a stage that were taken and neither ended nor came back."""
        return self._queues[name].running

    def open(self, name: str) -> int:
        """Shards of a stage that are neither done nor given up."""
        return len(self._queues[name].open)

    def seconds_waiting(self, name: str) -> float:
        """Expected work that no worker has taken: rows waiting times seconds a row, blocked shards included."""
        queue = self._queues[name]
        return queue.rows_waiting * queue.seconds_per_row

    @property
    def finished(self) -> bool:
        """Whether nothing is left to do or to wait for."""
        return all(not q.open for q in self._queues.values())

    def num_workers(self, room: Mapping[str, float], now: Mapping[str, int]) -> dict[str, int]:
        """How many workers each stage should have in a cluster with this `room` (CPU, GPU), given those it has `now`.

        One after another they go to the stage that would otherwise end last, for that is what decides the end of the
        run; a stage that cannot start anything keeps none but those at work.
        """
        left = dict(room)
        wanted = dict.fromkeys(self.stages, 0)
        work = {name: self._seconds_open(name) for name in wanted}
        limits = {}
        for name, queue in self._queues.items():
            most = queue.stage.max_workers if queue.stage.max_workers is not None else 1 << 30
            tasks = queue.running + len(queue.ready) + len(queue.again)
            # Ranges are counted as far as there is room: of all shards they would take longer than a task ends.
            tasks = max(tasks, sum(1 for _ in islice(self._ranges(queue), self._room_for(queue.stage, room))))
            limits[name] = min(most, tasks) if queue.can_start else min(most, queue.running, now.get(name, 0))
        while True:
            able = [n for n in wanted if wanted[n] < limits[n] and self._fits(self.stages[n], left)]
            if not able:
                return wanted
            best = max(able, key=lambda n: (wanted[n] == 0, work[n] / max(wanted[n], 0.5)))
            wanted[best] += 1
            left["CPU"] = left.get("CPU", 0.0) - self.stages[best].num_cpus
            left["GPU"] = left.get("GPU", 0.0) - self.stages[best].num_gpus

    @staticmethod
    def _room_for(stage: Stage, room: Mapping[str, float]) -> int:
        """How many workers of a stage the whole cluster would hold."""
        asked = {"CPU": stage.num_cpus, "GPU": stage.num_gpus}
        return min((math.ceil(room.get(name, 0.0) / n) for name, n in asked.items() if n > 0), default=1 << 20)

    def _ranges(self, queue: _Queue) -> Iterator[int]:
        """One item for every least range of what is ready: more workers than that could not be fed."""
        window = queue.stage.window
        least = max(math.ceil(MIN_SECONDS / max(queue.seconds_per_row, 1e-9) / window) * window, window)
        for _, rows, _ in queue.ready:
            yield from range(max(1, -rows // least))
        if queue.split is not None and queue.split.next < queue.split.stop:
            yield from range(max(1, (queue.split.stop - queue.split.next) // least))
        yield from range(queue.running + len(queue.again))

    @staticmethod
    def _fits(stage: Stage, left: Mapping[str, float]) -> bool:
        return left.get("CPU", 0.0) >= stage.num_cpus - 1e-9 and left.get("GPU", 0.0) >= stage.num_gpus - 1e-9

    def _seconds_open(self, name: str) -> float:
        queue = self._queues[name]
        return queue.rows_open * queue.seconds_per_row

    # -- telling ------------------------------------------------------------------------------------------------------

    def done(self, name: str, task: Task) -> None:
        """A task has ended well."""
        queue = self._queues[name]
        queue.running -= 1
        if task.shard not in queue.open:
            return  # a range of a shard that was given up
        if task.rows is None:
            self._close(queue, task.shard)
            return
        split = queue.splits[task.shard]
        split.under_way.discard(task.rows)
        self._commit_if_whole(queue, split)

    def _commit_if_whole(self, queue: _Queue, split: _Split) -> None:
        waiting = any(t.shard == split.task.shard for t in queue.again)
        if split.next >= split.stop and not split.under_way and not waiting and split.task.shard in queue.open:
            queue.again.insert(0, split.task)

    def _close(self, queue: _Queue, shard: int) -> None:
        queue.close(shard)
        queue.splits.pop(shard, None)
        for other in self._queues.values():
            if queue.stage.name in other.stage.needs and shard in other.blocked:
                other.blocked[shard] -= 1
                if not other.blocked[shard]:
                    del other.blocked[shard]
                    other.push(shard)

    def again(self, name: str, task: Task, later: bool = False) -> None:
        """A task came back undone: it goes first, or with `later` behind all others of its stage."""
        queue = self._queues[name]
        queue.running -= 1
        if task.shard not in queue.open:
            return
        queue.rows_waiting += self._rows(queue, task)
        if task.rows is None and task.shard not in queue.splits:
            queue.tasks[task.shard] = task
            queue.push(task.shard, place=2 if later else 0)
        elif later:
            queue.again.append(task)
        else:
            queue.again.insert(0, task)

    def give_up(self, name: str, task: Task, why: str) -> list[tuple[str, int]]:
        """A task cannot be done: its shard is missing from this stage and from all that need it; returns them."""
        queue = self._queues[name]
        queue.running -= 1
        return self._drop(queue, task.shard, why)

    def _drop(self, queue: _Queue, shard: int, why: str) -> list[tuple[str, int]]:
        if shard not in queue.open:
            return []
        name = queue.stage.name
        queue.close(shard)
        queue.rows_waiting -= sum(self._rows(queue, t) for t in queue.again if t.shard == shard)
        queue.again = [t for t in queue.again if t.shard != shard]
        split = queue.splits.pop(shard, None)
        if split is not None:
            queue.rows_waiting -= split.stop - split.next
            split.next = split.stop
        self.failed[name, shard] = why
        dropped = [(name, shard)]
        for other in self._queues.values():
            if name in other.stage.needs and shard in other.blocked:
                del other.blocked[shard]
                other.rows_waiting -= other.stage.num_rows[shard]
                dropped += self._drop(other, shard, f"needs {name}, which failed: {why}")
        return dropped

    def measured(self, name: str, seconds_per_row: float) -> None:
        """What a row of a stage really takes on one worker, as far as is known."""
        self._queues[name].seconds_per_row = seconds_per_row


def single(
    worker: Worker,
    tasks: Sequence[Task],
    num_rows: Mapping[int, int] | None = None,
    *,
    name: str = "all",
    gpus: float = 0,
) -> Stage:
    """One stage of whole tasks; of equal size when `num_rows` does not say otherwise."""
    rows = num_rows or {t.shard: 1 for t in tasks}
    # A window of everything: no task of it can be split.
    return Stage(name=name, worker=worker, tasks=tuple(tasks), num_rows=rows, window=1 << 40, num_gpus=gpus)
