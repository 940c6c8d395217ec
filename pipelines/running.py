"""Run tasks with a progress bar, an event log and a limit on failures: what ingest, label and tokenize share."""

from __future__ import annotations

import dataclasses
import json
import os
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from dataengine.manifest import Dataset
from dataengine.work import Report, Task, Worker

console = Console(stderr=True, soft_wrap=True)

Runner = Literal["ray", "local"]


class TooManyBad(RuntimeError):
    """More samples were refused or could not be labelled than the caller allows."""


@dataclass
class Summary:
    """What a run did."""

    what: str
    num_tasks: int
    num_samples: int = 0
    num_refused: int = 0
    num_bytes: int = 0
    seconds: float = 0.0
    invalid: Counter[str] = field(default_factory=Counter)
    labelled: Counter[str] = field(default_factory=Counter)
    reasons: Counter[str] = field(default_factory=Counter)

    def add(self, report: Report) -> None:
        """Count one report."""
        self.num_refused += report.num_refused
        self.num_samples += max((c.num_samples for c in report.cells), default=0)
        for cell in report.cells:
            self.num_bytes += cell.num_bytes
            self.invalid[cell.modality] += cell.num_invalid
            self.labelled[cell.modality] += cell.num_samples
            self.reasons.update({f"{cell.modality}: {why}": n for why, n in cell.reasons.items()})

    def check(self, max_bad_fraction: float) -> None:
        """TooManyBad when a modality has too many invalid labels, or ingest refused too many items."""
        seen = self.num_samples + self.num_refused
        if seen and self.num_refused / seen > max_bad_fraction:
            raise TooManyBad(
                f"{self.num_refused} of {seen} items were refused, more than --max-bad-fraction {max_bad_fraction}; "
                "the reasons are in quarantine/"
            )
        for modality, bad in self.invalid.items():
            if bad / max(self.labelled[modality], 1) > max_bad_fraction:
                why = "; ".join(f"{n} x {r}" for r, n in self.reasons.most_common(3))
                raise TooManyBad(
                    f"{bad} of {self.labelled[modality]} {modality} labels failed, more than --max-bad-fraction "
                    f"{max_bad_fraction}: {why}"
                )

    def as_json(self) -> dict[str, Any]:
        """The summary as plain values."""
        counts = {name: dict(getattr(self, name)) for name in ("invalid", "labelled", "reasons")}
        return {**vars(self), **counts, "seconds": round(self.seconds, 3)}


def execute(
    dataset: Dataset,
    worker: Worker,
    tasks: Sequence[Task],
    *,
    what: str,
    runner: Runner,
    workers: int,
    device: str,
    max_bad_fraction: float,
    recipe: Any = None,
) -> Summary:
    """Run the tasks, show progress, log events under `runs/`, and stop once the failures are too many."""
    from dataengine import local

    summary = Summary(what, len(tasks))
    if not tasks:
        return summary
    if runner == "ray":
        from dataengine import actors

        run = actors.run
    else:
        run = local.run
    began = time.time()
    log = f"runs/{time.strftime('%Y%m%dT%H%M%S', time.gmtime(began))}-{what}-{os.getpid()}/events.jsonl"
    cells = sum(len(t.specs) for t in tasks)
    _event(dataset, log, "start", what=what, runner=runner, workers=workers, device=device, cells=cells, recipe=recipe)
    with Progress(
        TextColumn(f"{what:<10}"), BarColumn(), MofNCompleteColumn(), TextColumn("shards"), TimeElapsedColumn(),
        TextColumn("left"), TimeRemainingColumn(), TextColumn("{task.fields[note]}"), console=console,
    ) as bar:  # fmt: skip
        progress = bar.add_task(what, total=len(tasks), note="")

        def on_report(report: Report) -> None:
            summary.add(report)
            _event(dataset, log, "shard", **dataclasses.asdict(report))
            rate = summary.num_samples / max(time.time() - began, 1e-9)
            bad = sum(summary.invalid.values()) + summary.num_refused
            bar.update(progress, advance=1, note=f"{rate:.1f} images/s" + (f", {bad} bad" if bad else ""))
            if _beyond(summary, tasks, dataset, max_bad_fraction):
                summary.check(max_bad_fraction)

        try:
            run(worker, tasks, workers=workers, device=device, on_report=on_report)
        finally:
            summary.seconds = time.time() - began
            _event(dataset, log, "end", **summary.as_json())
    summary.check(max_bad_fraction)
    return summary


def _beyond(summary: Summary, tasks: Sequence[Task], dataset: Dataset, limit: float) -> bool:
    """Whether even a flawless rest of the run could not bring the failures under the limit."""
    total = dataset.plan.num_items * len(tasks) / max(dataset.plan.num_shards, 1)
    worst = max([summary.num_refused, *summary.invalid.values()], default=0)
    return worst > limit * total


def _event(dataset: Dataset, log: str, kind: str, **values: Any) -> None:
    dataset.store.append(log, json.dumps({"time": round(time.time(), 3), "event": kind, **values}, default=str))
