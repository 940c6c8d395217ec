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
    """A worker that is up. `mark` is the time up to which its seconds are in its stage's account."""

    stage: str
    node: str
    mark: float


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
    """Rows of the plan that are behind it: labelled, found committed, or given up."""
    bad: int = 0
    """Labels that failed."""
    cells: Counter[str] = field(default_factory=Counter)
    lost: Counter[str] = field(default_factory=Counter)
    workers_lost: Counter[str] = field(default_factory=Counter)

    workers: int = 0
    began: float | None = None
    last: float = 0.0
    spent: Counter[str] = field(default_factory=Counter)
    start_seconds: float = 0.0
    worker_seconds: float = 0.0
    """Seconds of workers that had started, up to their last report or end; without the time they took to start."""
    report_seconds: float = 0.0
    lost_seconds: float = 0.0
    num_reports: int = 0

    _recent: deque[tuple[int, int, int]] = field(default_factory=lambda: deque(maxlen=int(MAX_WINDOW)))
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

    def start(self, event: Event) -> None:
        """A task was handed to a worker."""
        self.began = event.time if self.began is None else self.began
        if event.shard is not None:
            self.running[event.shard, event.rows] = (event.worker, event.time)

    def end_attempt(self, event: Event, worker: WorkerState | None) -> float:
        """An attempt is over, one way or the other: its seconds, as far as they are known."""
        self.last = max(self.last, event.time)
        _, since = self.running.pop((event.shard or 0, event.rows), ("", event.time))
        if worker is not None:
            self.account(worker, event.time)
        return max(0.0, event.time - since)

    def account(self, worker: WorkerState, time: float) -> None:
        """Add a worker's seconds since its mark."""
        self.worker_seconds += max(0.0, time - worker.mark)
        worker.mark = max(worker.mark, time)

    def report(self, event: Event, cells: list[Mapping[str, Any]]) -> None:
        """A task ended: count its rows once, whoever else reported them."""
        values, shard, rows = event.values, event.shard or 0, event.rows
        seconds = float(values.get("seconds", 0.0))
        self.num_reports += 1
        self.report_seconds += seconds
        self.spent.update({name: float(n) for name, n in values.get("spent", {}).items()})
        if values.get("outcome", "done") != "done" or shard in self.done:
            return
        parts = self.parts.setdefault(shard, set())
        before = sum(b - a for a, b in parts)
        if rows is None:
            made = max((int(c["num_samples"]) for c in cells), default=0)
            refused = int(values.get("num_refused", 0))
            images, settled = max(0, made - before), max(0.0, (made + refused or self._share()) - before)
            self.refused += refused
        else:
            images = 0 if rows in parts else rows[1] - rows[0]
            settled = float(images)
            parts.add(rows)
        self.images += images
        if shard not in self.failed:
            self.settled += settled
        if rows is None:
            self.done.add(shard)
            self.failed.pop(shard, None)
            del self.parts[shard]
        self._measure(event.time, images, seconds, settled)

    def _measure(self, time: float, images: int, seconds: float, settled: float) -> None:
        bucket = int(time)
        if self._recent and self._recent[-1][0] >= bucket:
            at, rows, reports = self._recent.pop()
            self._recent.append((at, rows + images, reports + 1))
        else:
            self._recent.append((bucket, images, 1))
        if settled and seconds:
            self._service.append((seconds, settled))

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

    def recent(self, now: float) -> tuple[float, int]:
        """Images a second of late, and the reports that this rests on.

        It looks back over four tasks' time, so that shards that take long do not make it flicker, between a minute and
        an hour.
        """
        if self.began is None or self.finished:
            return 0.0, 0
        each = sum(s for s, _ in self._service) / len(self._service) if self._service else 0.0
        since = max(self.began, now - min(max(MIN_WINDOW, 4 * each), MAX_WINDOW))
        found = [(rows, reports) for at, rows, reports in self._recent if at > since]
        return sum(r for r, _ in found) / max(now - since, 1.0), sum(n for _, n in found)

    def overall(self, now: float) -> float:
        """Images a second since its first task began, up to now or, once it is finished, its last report."""
        if self.began is None:
            return 0.0
        return self.images / max((self.last if self.finished else now) - self.began, 1e-3)

    def seconds_per_row(self) -> float | None:
        """What a row takes one worker, measured over the last reports; None before the first."""
        rows = sum(n for _, n in self._service)
        return sum(s for s, _ in self._service) / rows if rows else None

    def remaining(self, now: float, seconds_per_row: float) -> float:
        """Rows still to come; of tasks in progress, what their time so far lets expect is taken off."""
        if self.finished:
            return 0.0
        rows = 0.0
        for (shard, part), (_, since) in self.running.items():
            if shard not in self.done and shard not in self.failed:
                size = part[1] - part[0] if part else self._share() - sum(b - a for a, b in self.parts.get(shard, ()))
                rows += min((now - since) / max(seconds_per_row, 1e-9), 0.95 * max(size, 0.0))
        return max(0.0, self.rows - self.settled - max(rows, 0.0))

    def device_busy(self) -> float | None:
        """Share of its workers' time, since they started, in which a labeler ran; None before one was timed."""
        labelling = [seconds for name, seconds in self.spent.items() if name.startswith("label:")]
        return min(1.0, sum(labelling) / self.worker_seconds) if labelling and self.worker_seconds else None
