"""Run stages in this process: for laptops, tests and debuggers. The bytes are those of `actors.run_stages`.

Nothing watches: a labeler that ends the process ends the run, and running it again goes on from there.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import Any

from threadpoolctl import threadpool_limits

from dataengine.events import Event, reports
from dataengine.schedule import Schedule, Stage, single
from dataengine.work import Report, Task, Work, Worker

BUSY_SECONDS = 1.0
"""When to ask again for a shard that another run holds."""


def run_stages(
    stages: Sequence[Stage],
    *,
    on_event: Callable[[Event], None] = lambda event: None,
    device: str = "cpu",
    max_workers: int | None = None,
    batch_seconds: float = 0.0,
) -> None:
    """Run every task, one after another; what fails is raised. The last two settings have no effect here."""
    stages = [s for s in stages if s.tasks]
    schedule, works = Schedule(stages), dict[str, Work]()

    def tell(kind: str, stage: str, task: Task | None = None, **values: Any) -> None:
        shard, rows = (None, None) if task is None else (task.shard, task.rows)
        on_event(Event(time.time(), kind, stage, "local" if kind != "stage" else "", "", shard, rows, values))

    for stage in stages:
        tell("stage", stage.name, **stage.described())
    with threadpool_limits(limits=1):  # the workers say so, too, but never take it back
        while not schedule.finished:
            waiting = True
            for stage in stages:
                task = schedule.take(stage.name, 1)
                if task is None:
                    continue
                if stage.name not in works:
                    began = time.perf_counter()
                    works[stage.name] = stage.worker.start(device)
                    tell("worker-up", stage.name, seconds=round(time.perf_counter() - began, 3))
                tell("start", stage.name, task, attempt=1)
                report = works[stage.name](task)
                if report.outcome == "done":
                    waiting = False
                    tell("report", stage.name, task, **asdict(report))
                    schedule.done(stage.name, task)
                else:
                    tell("lost", stage.name, task, cause=report.outcome)
                    schedule.again(stage.name, task, later=True)
            if waiting:
                time.sleep(BUSY_SECONDS)


def run(
    worker: Worker, tasks: Sequence[Task], *, workers: int, device: str, on_report: Callable[[Report], None]
) -> None:
    """Run the tasks of one worker as one stage; `workers` is taken for the signature's sake."""
    run_stages([single(worker, tasks)], on_event=reports(on_report), device=device)
