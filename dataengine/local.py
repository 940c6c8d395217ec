"""Run tasks in this process: for laptops, tests and debuggers. The bytes are those of `actors.run`."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from dataengine.work import Report, Task, Worker


def run(
    worker: Worker, tasks: Sequence[Task], *, workers: int, device: str, on_report: Callable[[Report], None]
) -> None:
    """Run every task, one after another; `workers` is taken for the signature's sake and has no effect here."""
    if not tasks:
        return
    work = worker.start(device)
    for task in tasks:
        on_report(work(task))
