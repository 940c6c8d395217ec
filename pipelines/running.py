"""Run stages with everything that looks on, and a limit on failures: what ingest, label, tokenize and pack share."""

from __future__ import annotations

import os
import platform
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from dataengine.events import Event
from dataengine.manifest import Dataset
from dataengine.schedule import Stage
from dataengine.work import Report
from pipelines.live import Prices
from pipelines.metrics import METRICS
from pipelines.monitor import Monitor
from pipelines.visible import SafeConsole

console = SafeConsole(stderr=True, soft_wrap=True)

Runner = Literal["ray", "local"]

BATCH_SECONDS = 300.0
"""How long a labeler may take for one batch before its process counts as hung."""


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
    report: dict[str, Any] = field(default_factory=dict)
    """The final report, as `runs/<id>/report.json` holds it."""

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
        values = {k: v for k, v in vars(self).items() if k != "report"}
        return {**values, **counts, "seconds": round(self.seconds, 3)}


def execute(
    dataset: Dataset,
    stages: Sequence[Stage],
    *,
    what: str,
    runner: Runner,
    workers: int | None,
    device: str,
    max_bad_fraction: float,
    recipe: Any = None,
    prices: Prices | None = None,
    light: Mapping[str, float] | None = None,
    batch_seconds: float = BATCH_SECONDS,
) -> Summary:
    """Run stages under the eyes of a monitor (table, log, metrics, report), and stop once the failures are too many."""
    stages = [s for s in stages if s.tasks]
    summary = Summary(what, sum(len(s.tasks) for s in stages))
    if not stages:
        return summary
    began = time.time()
    run_id = f"{time.strftime('%Y%m%dT%H%M%S', time.gmtime(began))}-{what}-{os.getpid()}"
    meters = None
    if runner == "ray":
        from dataengine import _ray_metrics, actors

        run_stages, meters = actors.run_stages, _ray_metrics.make_meters(METRICS)
    else:
        from dataengine import local

        run_stages = local.run_stages
    with Monitor(dataset.store, run_id, console, prices=prices, light=light, meters=meters) as monitor:
        values = {"what": what, "runner": runner, "device": device, "recipe": recipe, "pid": os.getpid()}
        monitor.on_event(Event(began, "run", values={**values, "host": platform.node()}))

        def on_event(event: Event) -> None:
            monitor.on_event(event)
            if event.kind == "report" and event.rows is None:
                summary.add(Report.of(event.values))
                if _beyond(summary, stages, max_bad_fraction):
                    summary.check(max_bad_fraction)

        try:
            run_stages(stages, on_event=on_event, device=device, max_workers=workers, batch_seconds=batch_seconds)
        finally:
            summary.seconds = time.time() - began
            monitor.on_event(Event(time.time(), "end", values=summary.as_json()))
    summary.report = monitor.report
    summary.check(max_bad_fraction)
    return summary


def _beyond(summary: Summary, stages: Sequence[Stage], limit: float) -> bool:
    """Whether even a flawless rest of the run could not bring the failures under the limit."""
    total = max(sum(s.num_rows[t.shard] for t in s.tasks) for s in stages)
    return max([summary.num_refused, *summary.invalid.values()], default=0) > limit * total
