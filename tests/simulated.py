"""Event streams of runs that never were, with the truth about them counted beside, by other means than the state's."""

from __future__ import annotations

import dataclasses
import heapq
import itertools
import random
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

from dataengine.events import Event
from dataengine.work import CellReport, Report

T0 = 1_767_258_000.0
ROWS = 100


@dataclass
class Truth:
    """What happened in a simulated run."""

    done: Counter[str] = field(default_factory=Counter)
    failed: Counter[str] = field(default_factory=Counter)
    images: Counter[str] = field(default_factory=Counter)
    lost: Counter[str] = field(default_factory=Counter)
    bad: Counter[str] = field(default_factory=Counter)
    cells: Counter[str] = field(default_factory=Counter)
    num_bytes: Counter[str] = field(default_factory=Counter)
    workers_lost: int = 0
    label_seconds: Counter[str] = field(default_factory=Counter)


def report(
    shard: int, modality: str, labeler: str, seconds: float, bad: int = 0, rows: tuple[int, int] | None = None
) -> Report:
    """A report of one labeler's task that took `seconds`, nine tenths of them in the labeler."""
    reasons = {f"torch.OutOfMemoryError: tried to allocate {shard} MiB": bad} if bad else {}
    cell = CellReport(modality, ROWS, bad, 1000 + shard, seconds, reasons)
    spent = {"read": 0.02 * seconds, "decode": 0.3 * seconds, f"label:{labeler}": 0.9 * seconds}
    return Report(shard, () if rows else (cell,), seconds, rows=rows, spent=spent)


def reported(time: float, stage: str, worker: str, made: Report, node: str = "") -> Event:
    """The event of a report."""
    return Event(time, "report", stage, worker, node, made.shard, made.rows, dataclasses.asdict(made))


def declared(stage: str, tasks: int, **values: Any) -> Event:
    """The event of a stage with one labeler and one modality, both of its name."""
    values = {"labelers": [stage], "modalities": [stage], "num_cpus": 1.0, "num_gpus": 0.0, **values}
    return Event(T0, "stage", stage, values={"tasks": tasks, "rows": tasks * ROWS, **values})


def steady(workers: int = 4, tasks: int = 40, seconds: float = 20.0, rounds: int = 5) -> list[Event]:
    """Workers that all take `seconds` for a shard of 100 rows and never pause, seen after `rounds` shards each."""
    log = [Event(T0, "run", values={"what": "label"}), declared("depth", tasks, num_gpus=0.5, num_cpus=2.0)]
    names = [f"w{i}" for i in range(workers)]
    log += [Event(T0 + 10, "worker-up", "depth", w, "n0", values={"seconds": 10.0}) for w in names]
    for k, (i, w) in itertools.product(range(rounds), enumerate(names)):
        at, shard = T0 + 10 + k * seconds, k * workers + i
        log.append(Event(at, "start", "depth", w, "n0", shard))
        log.append(reported(at + seconds, "depth", w, report(shard, "depth", "depth", seconds)))
    return sorted(log, key=lambda e: e.time)


def simulate(seed: int, stages: tuple[str, ...] = ("depth", "edges"), tasks: int = 12) -> tuple[list[Event], Truth]:
    """A run with workers that die, tasks that are drained, split in parts or given up, and labels that fail."""
    rng, truth = random.Random(seed), Truth()
    log = [Event(T0, "run", values={"what": "label", "runner": "ray"})]
    for name in stages:
        log.append(declared(name, tasks))
        todo: list[tuple[int, tuple[int, int] | None]] = [(shard, None) for shard in range(tasks)]
        parts: Counter[int] = Counter()
        attempts: Counter[int] = Counter()
        free: list[tuple[float, str]] = []
        for i in range(3):
            heapq.heappush(free, (T0 + 5.0 + i, f"{name}-{i}"))
            log.append(Event(T0 + 5.0 + i, "worker-up", name, f"{name}-{i}", "n0", values={"seconds": 4.0}))
        while todo:
            now, worker = heapq.heappop(free)
            shard, rows = todo.pop(0)
            if rows is None and parts[shard] == 0 and rng.random() < 0.2:
                todo[:0] = [(shard, (0, 40)), (shard, (40, 80))]
                shard, rows = todo.pop(0)
            elif rows is None and 0 < parts[shard] < 2:
                todo.append((shard, rows))
                heapq.heappush(free, (now + 0.5, worker))
                continue
            seconds = rng.uniform(5, 15)
            end, dice = now + seconds + 0.25, rng.random()
            log.append(Event(now, "start", name, worker, "n0", shard, rows, {"attempt": attempts[shard] + 1}))
            if dice < 0.1:
                attempts[shard] += 1
                truth.lost[name] += 1
                truth.workers_lost += 1
                log.append(Event(end, "worker-down", name, worker, "n0", values={"cause": "crash", "planned": False}))
                log.append(Event(end, "lost", name, worker, "n0", shard, rows, {"cause": "WorkerCrashedError: 9"}))
                worker = worker + "+"
                log.append(Event(end + 3.0, "worker-up", name, worker, "n0", values={"seconds": 3.0}))
                end += 3.0
                todo.insert(0, (shard, rows))
            elif dice < 0.15 and rows is None and parts[shard] == 0:
                truth.failed[name] += 1
                log.append(Event(end, "failed", name, worker, "n0", shard, rows, {"cause": "killed 3 workers"}))
            elif dice < 0.2 and rows is None:
                drained = Report(shard, (), seconds, outcome="drained", spent={f"label:{name}": seconds})
                truth.label_seconds[name] += seconds
                log.append(reported(end, name, worker, drained))
                todo.insert(0, (shard, rows))
            else:
                bad = rng.choice((0, 0, 0, 2))
                truth.label_seconds[name] += 0.9 * seconds
                log.append(reported(end, name, worker, report(shard, name, name, seconds, bad, rows)))
                if rows is not None:
                    parts[shard] += 1
                    truth.images[name] += 40
                    if parts[shard] == 2:
                        todo.append((shard, None))
                else:
                    truth.images[name] += ROWS - (80 if parts[shard] else 0)
                    truth.done[name] += 1
                    truth.bad[name] += bad
                    truth.cells[name] += 1
                    truth.num_bytes[name] += 1000 + shard
            heapq.heappush(free, (end, worker))
    last = max(e.time for e in log)
    log.append(Event(last, "end", values={"what": "label"}))
    return sorted(log, key=lambda e: e.time), truth
