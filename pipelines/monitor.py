"""Everything that looks on while a run goes on: state, log, live table or lines, status, metrics, final report."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from types import TracebackType
from typing import Any, Protocol

from rich.console import Console
from rich.live import Live

from dataengine.eventlog import EventLog, without_secrets
from dataengine.events import Event
from dataengine.manifest import Dataset
from dataengine.storage import Store
from pipelines import metrics, report
from pipelines.live import Prices, RunState, as_json
from pipelines.table import View, plain

STATUS_SECONDS = 5.0
"""How often `status.json` and the metrics are brought up to date."""
PLAIN_SECONDS = 30.0
"""How often a line is printed where there is no terminal."""
USAGE_SECONDS = 60.0
"""How often the log says how busy a node is: the table hears it every few seconds, weeks of which fill a disk."""
PATIENCE_SECONDS = 30.0
"""How long the end of a run waits for a store that does not answer."""


class Meters(Protocol):
    """Where metrics go: `dataengine._ray_metrics.Meters`, or nowhere."""

    def update(self, values: Iterable[tuple[str, Mapping[str, str], float]]) -> None:
        """Take the values of the metrics as they are now."""


def _why(error: BaseException | None) -> dict[str, str]:
    return {} if error is None else {"error": f"{type(error).__name__}: {error}"[:500]}


class Monitor:
    """Shows, logs and reports a run while the context is open; `on_event` takes what happens.

    No store, meter or terminal that fails stops the run: what failed becomes a note. After the context is left,
    `report` is the final report, which then also lies in `runs/<id>/report.json`. `beat` is how often, in seconds, a
    thread does what is due; None leaves that to `tick`.
    """

    def __init__(
        self,
        store: Store,
        run_id: str,
        console: Console,
        *,
        prices: Prices | None = None,
        light: Mapping[str, float] | None = None,
        meters: Meters | None = None,
        clock: Callable[[], float] = time.time,
        beat: float | None = 0.5,
    ) -> None:
        self.state = RunState()
        self.report: dict[str, Any] = {}
        self._store, self._run_id, self._console = store, run_id, console
        self._prices, self._light, self._meters = prices, light, meters
        self._clock, self._beat = clock, beat
        self._lock = threading.Lock()
        self._log = EventLog(store, run_id, on_problem=self._note)
        self._told: set[str] = set()
        self._usage: dict[str, float] = {}
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None
        self._live: Live | None = None
        self._status_due = self._plain_due = 0.0

    def on_event(self, event: Event) -> None:
        """Take what happened; from any thread."""
        event = without_secrets(event)
        with self._lock:
            if event.kind != "usage" or event.time - self._usage.get(event.node, 0.0) >= USAGE_SECONDS:
                self._log.add(event)
                if event.kind == "usage":
                    self._usage[event.node] = event.time
            try:
                self.state.apply(event)
            except Exception as error:
                # A view that cannot read an event is a fault of the view.
                self._once(f"a {event.kind} event could not be read: {type(error).__name__}: {error}")

    def status(self, now: float | None = None) -> dict[str, Any]:
        """The run as plain values, as of now."""
        with self._lock:
            return as_json(self.state, self._clock() if now is None else now, self._prices, self._run_id)

    def __enter__(self) -> Monitor:
        now = self._clock()
        self._plain_due = now + PLAIN_SECONDS
        if self._console.is_terminal and not self._console.is_dumb_terminal:
            self._live = Live(
                console=self._console, get_renderable=lambda: View(self.status()), refresh_per_second=4, transient=True
            )
            self._live.start()
        if self._beat is not None:
            self._thread = threading.Thread(target=self._run, args=(self._beat,), name="monitor", daemon=True)
            self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop.set()
        if self._thread is not None:
            self._thread.join(PATIENCE_SECONDS)
        if self._live is not None:
            self._live.stop()
        now = self._clock()
        if self.state.ended is None:
            # However it ended, its log says so: only a killed driver leaves a run without an end.
            self.on_event(Event(now, "end", values=_why(error)))
        with self._lock:
            self.state.summary |= _why(error)
            self.report = self._build(now)
        if self._thread is not None and self._thread.is_alive():
            self._console.print("the store does not answer: the log and report of this run are not complete")
            return
        self._log.close()
        self._put_status(now)
        self._put("report.json", self.report)

    def _build(self, now: float) -> dict[str, Any]:
        made = {"run_id": self._run_id, "light": self._light, "prices": self._prices}
        try:
            examples = report.examples_of(Dataset(self._store.url))
            return report.build(self.state, now, examples=examples, **made)  # type: ignore[arg-type]
        except Exception as error:
            # Commit records that cannot be read just now must not hide how the run went.
            self._once(f"no keys of failed labels: {type(error).__name__}: {error}")
            return report.build(self.state, now, **made)  # type: ignore[arg-type]

    def _run(self, beat: float) -> None:
        while not self._stop.wait(beat):
            self.tick(self._clock())

    def tick(self, now: float) -> None:
        """Do what is due at `now`: write the log and the status, update the metrics, print a line."""
        self._log.flush(now)
        if now >= self._status_due:
            self._status_due = now + STATUS_SECONDS
            self._put_status(now)
        if self._live is None and now >= self._plain_due:
            self._plain_due = now + PLAIN_SECONDS
            self._console.print(plain(self.status(now)), markup=False, highlight=False)

    def _put_status(self, now: float) -> None:
        self._put("status.json", self.status(now))
        if self._meters is not None:
            try:
                with self._lock:
                    values = list(metrics.values(self.state, now, self._prices))
                self._meters.update(values)
            except Exception as error:
                self._meters = None
                self._note(f"metrics have stopped: {type(error).__name__}: {error}")

    def _put(self, name: str, value: Mapping[str, Any]) -> None:
        try:
            self._store.put(f"runs/{self._run_id}/{name}", json.dumps(value, indent=1, default=str).encode())
        except Exception as error:
            # Whatever a store throws: a run is worth more than its status.
            self._note(f"{name} is not being written: {type(error).__name__}: {error}")

    def _note(self, text: str) -> None:
        with self._lock:
            self._once(text)

    def _once(self, text: str) -> None:
        if text not in self._told and len(self._told) < 100:
            self._told.add(text)
            self.state.note(self._clock(), text)
