"""What happens in a run, as one stream of small records: the live table, metrics, log and report read it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from dataengine.work import Report

KINDS = {
    "run": "the run began; values: what, runner, device, recipe, pid, host",
    "stage": "a stage; values: tasks, rows, cells (by modality), needs, seconds_per_row, num_cpus, num_gpus, labelers, "
    "modalities",
    "worker-up": "a worker has started; values: seconds",
    "worker-down": "a worker is gone; values: cause, planned (no longer needed, or told to go)",
    "node-up": "a node joined; values: resources",
    "node-down": "a node is gone; values: cause",
    "node-draining": "a node announced its end; values: deadline",
    "start": "a task was handed to a worker; values: attempt",
    "report": "a task ended; values: the fields of its Report",
    "lost": "an attempt at a task was lost and will be made again; values: cause",
    "failed": "a task was given up; values: cause",
    "usage": "how busy a node is; values: cpu (0..1), gpus (list of 0..1), memory (bytes)",
    "end": "the run ended; values: the summary",
}
"""Every kind of event and what its `values` hold."""


@dataclass(frozen=True)
class Event:
    """One thing that happened. `time` is seconds since the epoch; names that do not apply are empty or None."""

    time: float
    kind: str
    stage: str = ""
    worker: str = ""
    node: str = ""
    shard: int | None = None
    rows: tuple[int, int] | None = None
    values: dict[str, Any] = field(default_factory=dict)


def reports(on_report: Callable[[Report], None]) -> Callable[[Event], None]:
    """A taker of events that passes reports on, for who wants nothing else."""

    def on_event(event: Event) -> None:
        if event.kind == "report":
            on_report(Report.of(event.values))

    return on_event
