"""What a run knows of one stage: a reducer over its events, and the rates that follow. No clock: `now` is given."""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from dataengine.events import Event

Rows = tuple[int, int] | None

MIN_WINDOW, MAX_WINDOW = 60.0, 3600.0
"""Bounds, in seconds, of the time that `images_per_second` looks back."""
MEASURED = 64
"""Reports that the seconds a row takes are measured over: the last ones, so that a change of batch size shows."""


@dataclass
class WorkerState:
    """A worker that is up, and the stage it works for."""

    stage: str
    node: str
    mark: float
    """The time up to which its seconds are in its stage's account."""
    tasks: int = 0
    """What it was handed and has not ended: the first is under way, the others wait behind it."""
    since: float = 0.0
    """When the first of them began."""

    def busy(self, time: float) -> float:
        """Seconds of the task under way that are in no account yet."""
        return max(0.0, time - max(self.mark, self.since)) if self.tasks else 0.0


@dataclass
class StageState:
    """One stage: its tasks by state, counted by shard; its rows; where the seconds of its workers went.

    A shard is running while any part of it is; done once a report without rows says so; failed once given up.
    """

    name: str
    tasks: int = 0
    rows: int = 0
    declared: float = 1.0
    """Seconds a row is said to take on one worker; only its ratio to other stages counts."""
    num_cpus: float = 1.0
    num_gpus: float = 0.0
    labelers: tuple[str, ...] = ()
    modalities: tuple[str, ...] = ()
    needs: tuple[str, ...] = ()
    wanted: dict[str, int] = field(default_factory=dict)
    """Cells to make, by modality, where the run said so."""

    running: dict[tuple[int, Rows], tuple[str, float]] = field(default_factory=dict)
    """Who works on it, and since when."""
    done: set[int] = field(default_factory=set)
    failed: dict[int, str] = field(default_factory=dict)
    parts: dict[int, set[tuple[int, int]]] = field(default_factory=dict)
    """Rows that are in staging, of shards that are not done."""

    images: int = 0
    """Images this run labelled."""
    refused: int = 0
    settled: float = 0.0
    """Rows of the plan that are behind it: labelled, found committed, or given up; each shard counts as many as the
    average, since reports count images, and a plan may count anything that adds up."""
    bad: int = 0
    """Labels that failed."""
    cells: Counter[str] = field(default_factory=Counter)
    lost: Counter[str] = field(default_factory=Counter)
    held: int = 0
    """Attempts that found their shard in the hands of another run: nothing was done, and nothing lost."""
    workers_lost: Counter[str] = field(default_factory=Counter)

    workers: int = 0
    began: float | None = None
    """When its first worker was up."""
    last: float = 0.0
    spent: Counter[str] = field(default_factory=Counter)
    start_seconds: float = 0.0
    active_seconds: float | None = None
    """Seconds of workers that had started, up to the end of the last task; None before it."""
    worker_seconds: float = 0.0
    """Seconds of workers that had started, up to their last report or end; without the time they took to start."""
    task_seconds: float = 0.0
    """Of these, in tasks that ended in a report or in good order."""
    lost_seconds: float = 0.0
    """Of these, in attempts that were lost."""

    _recent: deque[tuple[int, int, float, int]] = field(default_factory=lambda: deque(maxlen=int(MAX_WINDOW)))
    _service: deque[tuple[float, float]] = field(default_factory=lambda: deque(maxlen=MEASURED))

    def declare(self, values: Mapping[str, Any]) -> None:
        """Take what a `stage` event says."""
        self.tasks = int(values.get("tasks", self.tasks))
        self.rows = int(values.get("rows", self.rows))
        self.declared = float(values.get("seconds_per_row", self.declared))
        self.num_cpus = float(values.get("num_cpus", self.num_cpus))
        self.num_gpus = float(values.get("num_gpus", self.num_gpus))
        self.labelers = tuple(values.get("labelers", self.labelers))
        self.modalities = tuple(values.get("modalities", self.modalities))
        self.needs = tuple(values.get("needs", self.needs))
        self.wanted = dict(values.get("cells", self.wanted))

    def start(self, event: Event, worker: WorkerState | None) -> None:
        """A task was handed to a worker."""
        self.began = event.time if self.began is None else self.began
        if worker is not None:
            worker.since = worker.since if worker.tasks else event.time
            worker.tasks += 1
        self.running[event.shard or 0, event.rows] = (event.worker, event.time)

    def end_attempt(self, event: Event, worker: WorkerState | None) -> float:
        """An attempt is over, one way or the other: the seconds it took, as far as they are known."""
        self.last = max(self.last, event.time)
        shard = event.shard or 0
        ended = [(shard, event.rows)] if (shard, event.rows) in self.running else []
        if event.kind == "failed":  # the whole shard, whatever part of it was at hand
            ended = [k for k, (who, _) in self.running.items() if k[0] == shard and who == event.worker]
        for key in ended:
            del self.running[key]
        if worker is None or not ended:
            return 0.0
        seconds = worker.busy(event.time)
        self.account(worker, event.time)
        worker.tasks, worker.since = max(0, worker.tasks - len(ended)), event.time
        return seconds

    def account(self, worker: WorkerState, time: float) -> None:
        """Add a worker's seconds since its mark."""
        self.worker_seconds += max(0.0, time - worker.mark)
        worker.mark = max(worker.mark, time)

    def report(self, event: Event, cells: list[Mapping[str, Any]], seconds: float) -> None:
        """A task ended after `seconds`: count its rows once, whoever else reported them."""
        values, shard, rows = event.values, event.shard or 0, event.rows
        self.task_seconds += seconds
        self.spent.update({name: float(n) for name, n in values.get("spent", {}).items()})
        if values.get("outcome", "done") != "done" or shard in self.done:
            return
        parts = self.parts.setdefault(shard, set())
        before = sum(b - a for a, b in parts)
        if rows is None:
            images = max(0, max((int(c["num_samples"]) for c in cells), default=0) - before)
            settled = max(0.0, self._share() - before)
            self.refused += int(values.get("num_refused", 0))
        else:
            images = 0 if rows in parts else rows[1] - rows[0]
            settled = float(images)
            parts.add(rows)
        self.images += images
        if shard in self.failed:
            settled = 0.0
        self.settled += settled
        if rows is None:
            self.done.add(shard)
            self.failed.pop(shard, None)
            del self.parts[shard]
        self._measure(int(event.time), images, settled, seconds or float(values.get("seconds", 0.0)))

    def _measure(self, bucket: int, images: int, settled: float, seconds: float) -> None:
        if settled and seconds:
            self._service.append((seconds, settled))
        reports = 1
        if self._recent and self._recent[-1][0] >= bucket:
            bucket, more_images, more_settled, more_reports = self._recent.pop()
            images, settled, reports = images + more_images, settled + more_settled, reports + more_reports
        self._recent.append((bucket, images, settled, reports))

    def give_up(self, event: Event) -> None:
        """A task was given up: the rows of its shard will not come."""
        shard = event.shard or 0
        if shard in self.done or shard in self.failed:
            return
        self.settled += max(0.0, self._share() - sum(b - a for a, b in self.parts.pop(shard, set())))
        self.failed[shard] = str(event.values.get("cause", ""))

    def _share(self) -> float:
        """Rows of a shard that did not say how many it has."""
        return self.rows / self.tasks if self.tasks else 0.0

    def counts(self) -> dict[str, int]:
        """Tasks by state; they always add up to the tasks there are."""
        running = len({s for s, _ in self.running if s not in self.done and s not in self.failed})
        done, failed = len(self.done), len(self.failed)
        waiting = max(0, self.tasks - running - done - failed)
        return {"waiting": waiting, "running": running, "done": done, "failed": failed}

    @property
    def finished(self) -> bool:
        """Whether every task is done or given up."""
        return self.tasks > 0 and len(self.done) + len(self.failed) >= self.tasks

    def recent(self, now: float) -> tuple[float, float, int]:
        """Of late: images a second, rows of the plan a second, and the reports that this rests on.

        It looks back over four tasks' time, so that shards that take long do not make it flicker, between a minute and
        an hour.
        """
        if self.began is None or self.finished:
            return 0.0, 0.0, 0
        each = sum(s for s, _ in self._service) / len(self._service) if self._service else 0.0
        since = max(self.began, now - min(max(MIN_WINDOW, 4 * each), MAX_WINDOW))
        found = [entry[1:] for entry in self._recent if entry[0] > since]
        images, rows, reports = (sum(column) for column in zip(*found, strict=True)) if found else (0, 0.0, 0)
        span = max(now - since, 1.0)
        return images / span, rows / span, int(reports)

    def overall(self, now: float) -> float:
        """Images a second since its first worker was up, until now or, once it is finished, its last report."""
        if self.began is None:
            return 0.0
        return self.images / max((self.last if self.finished else now) - self.began, 1e-3)

    def seconds_per_row(self) -> float | None:
        """What a row takes one worker, measured over the last reports; None before the first."""
        rows = sum(n for _, n in self._service)
        return sum(s for s, _ in self._service) / rows if rows else None

    def remaining(self, now: float, seconds_per_row: float, workers: Mapping[str, WorkerState]) -> float:
        """Rows still to come; of the task each worker is at, what its time so far lets expect is taken off."""
        if self.finished:
            return 0.0
        under_way, seen = 0.0, set()
        for (shard, part), (who, _) in self.running.items():
            if who in seen or who not in workers or shard in self.done or shard in self.failed:
                continue
            seen.add(who)
            size = part[1] - part[0] if part else self._share() - sum(b - a for a, b in self.parts.get(shard, ()))
            under_way += max(0.0, min(workers[who].busy(now) / max(seconds_per_row, 1e-9), 0.95 * size))
        return max(0.0, self.rows - self.settled - under_way)

    def device_busy(self) -> float | None:
        """Share of its workers' time in which a labeler ran, from when they had started until the stage was finished.

        None before a labeler was timed.
        """
        labelling = [seconds for name, seconds in self.spent.items() if name.startswith("label:")]
        whole = self.worker_seconds if self.active_seconds is None else self.active_seconds
        return min(1.0, sum(labelling) / whole) if labelling and whole else None
